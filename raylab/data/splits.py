"""Patient-level splits, identical on every machine and for every order of the rows."""

import hashlib
import math

from raylab.errors import UsageError


def assign(groups: list[str], strata: list[int], fractions: dict[str, float], seed: int) -> list[str]:
    """The split of every row: all rows of a group (patient) in one split, with similar class fractions in each.

    groups [N] and strata [N] (the labels) are given per row; a group's stratum is the largest label of its rows.
    Within a stratum the groups are sorted by SHA-256(seed, group) and cut at the cumulative `fractions`
    {split: fraction, sum 1}, so nothing depends on the order of the input or on a random generator.
    """
    if not fractions or min(fractions.values()) < 0 or not math.isclose(sum(fractions.values()), 1):
        raise UsageError(
            f"split fractions {fractions} do not add up to 1", "every patient goes to exactly one split", "correct them"
        )
    stratum: dict[str, int] = {}
    for group, label in zip(groups, strata, strict=True):
        stratum[group] = max(label, stratum.get(group, label))
    members: dict[int, list[str]] = {}
    for group, label in stratum.items():
        members.setdefault(label, []).append(group)
    split: dict[str, str] = {}
    for names in members.values():
        names.sort(key=lambda name: hashlib.sha256(f"{seed}\t{name}".encode()).digest())
        start, total = 0, 0.0
        for part, fraction in fractions.items():
            total += fraction
            stop = round(len(names) * total)
            split.update(dict.fromkeys(names[start:stop], part))
            start = stop
    return [split[group] for group in groups]


def folds(groups: list[str], strata: list[int], count: int, seed: int) -> list[int]:
    """The fold, 0 to count - 1, of every row: `assign` with equal parts."""
    if count < 2:
        raise UsageError(
            f"{count} folds are not possible", "each fold is tested by models trained on the others", "use 2 or more"
        )
    parts = assign(groups, strata, {str(k): 1 / count for k in range(count)}, seed)
    return [int(part) for part in parts]
