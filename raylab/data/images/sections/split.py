"""Splits by intervals of consecutive sections: neighbours, which look alike, do not cross."""

from raylab.errors import DataError, UsageError

FOLDS = 5  # every fifth interval is test, and the one after it val
INTERVALS = 15  # at least, unless the length of an interval is given: three of each fold
SPLITS = ("train", "val", "test")


def default_interval(sections: int) -> int:
    """Return the number of sections of an interval that makes about INTERVALS of them; at least two, of which a gap of
    one leaves one to val."""
    return max(2, -(-sections // INTERVALS))


def split_sections(sections: int, interval: int, fold: int, gap: int) -> list[str | None]:
    """Return the split of each of the `sections`, in their order in the brain; None for those that are left out.

    Section i is in interval i // `interval`. Of every FOLDS intervals, number `fold` is test and the next one val, so
    that each section is test in one of the FOLDS folds. Sections of train within `gap` of val or test are left out, and
    sections of val within `gap` of test. Raises UsageError for impossible options, DataError for too few sections.
    """
    if interval < 1 or gap < 0 or not 0 <= fold < FOLDS:
        raise UsageError(
            f"interval {interval}, fold {fold}, gap {gap}",
            f"an interval has at least one section, folds are numbered 0 to {FOLDS - 1}, and a gap is not negative",
            "correct --interval, --fold or --gap",
        )
    name = {fold: "test", (fold + 1) % FOLDS: "val"}
    whole = [name.get(at // interval % FOLDS, "train") for at in range(sections)]

    def is_near(at: int, others: tuple[str, ...]) -> bool:
        return any(part in others for part in whole[max(0, at - gap) : at + gap + 1])

    stays_off = {"train": ("val", "test"), "val": ("test",), "test": ()}
    split = [None if is_near(at, stays_off[part]) else part for at, part in enumerate(whole)]
    if absent := [part for part in SPLITS if part not in split]:
        raise DataError(
            f"no section is left for {', '.join(absent)}",
            f"{sections} sections in intervals of {interval}, with gaps of {gap}",
            f"give more sections ({FOLDS} intervals are needed), or another --interval or --gap",
        )
    return split
