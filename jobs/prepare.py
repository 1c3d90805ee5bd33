"""raylab prepare: raw tables or images -> a checked data directory."""

import argparse
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home
from jobs.common.environment import verb_environment
from jobs.common.progress import say
from jobs.common.results import PreparedData
from jobs.common.session import ray_session
from raylab.config.assignments import parse_assignments
from raylab.data.icu import labels
from raylab.data.icu.meta import IcuMeta
from raylab.data.images.manifest import discover
from raylab.data.images.meta import ImageMeta
from raylab.data.prepared import META, Meta
from raylab.errors import UsageError, unknown

EXAMPLE = "raylab prepare ards --source synthetic --patients 400 --seed 0 --out prepared/ards"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The defaults of options are those of the functions below."""
    parser.add_argument("task", choices=[*labels.TASKS, "covidnet"])
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--replace", action="store_true", help="replace data of the task in --out, once the new data is complete"
    )
    parser.add_argument(
        "--source", help="ards: physionet2012, meds, mimic3, yaib, synthetic; covidnet: covidx, synthetic"
    )
    parser.add_argument("--seed", type=int, help="of the splits and of synthetic data")
    parser.add_argument("--patients", type=int, help="synthetic: how many")
    parser.add_argument("--path", type=Path, help="ards: directory of the raw tables; covidnet: folder of a data set")
    icu = parser.add_argument_group("intensive care: " + ", ".join(labels.TASKS))
    icu.add_argument("--landmark", type=float, help="hours after admission at which is predicted")
    icu.add_argument("--horizon", type=float, help="hours after landmark and gap in which onset counts")
    icu.add_argument("--gap", type=float, help="hours after the landmark that no onset may fall into")
    icu.add_argument("--label", help="ards: ahrf (unless given), berlin-oxygenation, global-2023")
    icu.add_argument(
        "--label-set", dest="label_windows", nargs="+", action="extend", metavar="NAME=VALUE",
        help="windows of the label, for example persist_h=8 fio2_back_h=4",
    )  # fmt: skip
    icu.add_argument("--rolling", action="store_true", help="predict every hour from the landmark until onset")
    icu.add_argument("--until", type=float, help="rolling: the last hour at which is predicted")
    icu.add_argument("--mapping", type=Path, metavar="TOML", help="meds: what the codes mean; MIMIC-IV's otherwise")
    icu.add_argument("--sensitivity", action="store_true", help="count onsets over windows of FiO2 and persistence")
    icu.add_argument("--virtual-patient", action="store_true", help="fit the lung model to the gases before the "
                      "landmark: features for --set data.virtual_patient=true")  # fmt: skip
    icu.add_argument(
        "--from", dest="origin", type=Path, nargs="+", metavar="D", help="prepared directories, pooled and split anew"
    )
    icu.add_argument("--split-by", help="with --from: patient:K/N, temporal, temporal:PERIOD or site:SOURCE")
    images = parser.add_argument_group("covidnet")
    images.add_argument("--images", type=Path, help="folder that the lists' file names start from")
    for split in ("train", "val", "test"):
        images.add_argument(f"--{split}", type=Path, metavar="LIST", help=f"COVIDx label list of {split}")
    images.add_argument(
        "--manifest", type=Path, metavar="CSV", help="instead of lists; beside them, for views and groups"
    )
    images.add_argument("--size", type=int, help="pixels a side of the cache")
    images.add_argument(
        "--domain", help="which part of a folder or manifest; synthetic: A or B, of two drawn hospitals"
    )
    images.add_argument(
        "--apart-from",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="leave out copies of images prepared there",
    )
    images.add_argument("--skip-bad", action="store_true", help="leave unreadable images out, listed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    for name in ("task", "out", "json"):
        given.pop(name, None)
    if "label_windows" in given:
        given["label_windows"] = parse_assignments(given["label_windows"])
    if lists := {split: given.pop(split) for split in ("train", "val", "test") if split in given}:
        given["lists"] = lists
    return prepare(args.task, args.out, **given).details


def prepare(task: str, out: Path | str, **options: Any) -> PreparedData:
    """Make the prepared directory `out` of a task from raw tables or images.

    `options` are those of `prepare_icu` or `prepare_images`, whichever the task's data is. Raises UsageError with the
    right names for an option that it does not have, and DataError for raw data that cannot be used; nothing is then
    left half-written.
    """
    make = prepare_icu if task in labels.TASKS else prepare_images
    known = inspect.signature(make).parameters.keys() - {"task", "out"}
    for name in options:
        if name not in known:
            raise unknown(f"option of prepare {task}", name, known)
    return make(task, out, **options)


@verb_environment()
def prepare_icu(
    task: str,
    out: Path | str,
    *,
    source: str | None = None,
    path: Path | str | None = None,
    patients: int = 400,
    seed: int = 0,
    landmark: float = 12,
    horizon: float = 24,
    gap: float = 0,
    label: str | None = None,
    label_windows: Mapping[str, Any] | None = None,
    rolling: bool = False,
    until: float = 48,
    mapping: Path | str | None = None,
    sensitivity: bool = False,
    virtual_patient: bool = False,
    origin: Sequence[Path | str] | None = None,
    split_by: str = "patient:0/5",
    replace: bool = False,
    quiet: bool = False,
) -> PreparedData:
    """Prepare a task on intensive-care data: from the raw tables of `source` in `path`, from `patients` synthetic ones,
    or by pooling the prepared directories `origin` and splitting them anew as `split_by` says.

    Times are hours. `label_windows`: windows of the label, {"persist_h": 8}. `rolling`: a row every hour from the
    landmark `until` then. `replace`: data of the task in `out`, once the new data is complete.
    """
    from raylab.data.icu.prepare import prepare_ards
    from raylab.data.icu.resplit import parse, resplit

    out, path = Path(out), None if path is None else Path(path)
    if origin is not None:
        if source is not None or path is not None:
            raise UsageError("--from takes prepared directories, and so no --source and no --path")
        if task != "ards":
            raise UsageError(f"prepare {task} takes no --from", do="--source and --path")
        directories = [Path(directory).absolute() for directory in origin]
        return _prepared(task, out, resplit(directories, out, parse(split_by), seed, replace), quiet)
    source = source or ("physionet2012" if path else None)
    if source is None:
        raise UsageError(f"prepare {task} needs --source", do="add --source physionet2012 --path DIR, or synthetic")
    if source != "synthetic" and path is None:
        raise UsageError(f"source {source} needs --path DIR", do=f"raylab prepare {task} --source {source} --path DIR")
    rule = labels.label(label or labels.default_label(task).name, dict(label_windows or {}))
    if rule.task != task:
        raise UsageError(f"the label '{rule.name}' is not of the task {task}", do="leave --label out")
    meta = prepare_ards(
        source,
        path,
        out,
        landmark,
        horizon,
        patients,
        seed,
        rule=rule,
        gap=gap,
        framing="rolling" if rolling else "landmark",
        until=until,
        mapping=None if mapping is None else Path(mapping),
        grid_of_windows=sensitivity,
        virtual=virtual_patient,
        replace=replace,
    )
    return _prepared(task, out, meta, quiet)


@verb_environment()
def prepare_images(
    task: str,
    out: Path | str,
    *,
    source: str = "covidx",
    path: Path | str | None = None,
    images: Path | str | None = None,
    lists: Mapping[str, Path | str | None] | None = None,
    manifest: Path | str | None = None,
    size: int = 224,
    domain: str | None = None,
    apart_from: Sequence[Path | str] = (),
    skip_bad: bool = False,
    patients: int = 400,
    seed: int = 0,
    replace: bool = False,
    quiet: bool = False,
) -> PreparedData:
    """Prepare a task on images: from a data set in the folder `path`, from `lists` {split: label list} of files below
    `images`, from a `manifest`, or from `patients` synthetic ones of `domain` A or B.

    `size`: pixels a side of the cache. `apart_from`: prepared directories whose images are left out. `skip_bad` leaves
    unreadable images out. `replace`: data of the task in `out`, once the new data is complete. Where RAY_ADDRESS names
    a cluster, its nodes decode.
    """
    found = {split: _path((lists or {}).get(split)) for split in ("train", "val", "test")}
    images, manifest = _path(images), _path(manifest)
    if path is not None and source != "synthetic":
        folder = discover(Path(path), domain)
        found = found if any(found.values()) else {split: folder.lists.get(split) for split in found}
        images, manifest = images or folder.images, manifest or folder.manifest
    meta = _decode(
        Path(out),
        images,
        found,
        quiet,
        source=source,
        size=size,
        patients=patients,
        seed=seed,
        skip_bad=skip_bad,
        domain=domain,
        manifest=manifest,
        apart_from=[Path(directory) for directory in apart_from],
        replace=replace,
    )
    return _prepared(task, Path(out), meta, quiet)


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _prepared(task: str, out: Path, meta: Meta, quiet: bool) -> PreparedData:
    """What was prepared, also said unless `quiet`."""
    if not quiet:
        tell(task, out, meta)
    told = {k: v for k, v in without_names(meta).to_json().items() if k not in {"statistics", "files"}}
    if isinstance(meta, ImageMeta):
        told["skipped"] = len(meta.skipped)
    return PreparedData(out.absolute(), task, {"out": str(out.absolute()), **told})


def without_names(meta: Meta) -> Meta:
    """`meta` as it may be printed: file names can name patients, and stay in meta.json."""
    return meta.model_copy(update={"warnings": [text.splitlines()[0].rstrip(":") for text in meta.warnings]})


def _decode(out: Path, images: Path | None, lists: Mapping[str, Path | None], quiet: bool, **options: Any) -> ImageMeta:
    """prepare_covidnet in this process, or, where RAY_ADDRESS names a cluster, decoding over its nodes."""
    from raylab.data.images.prepare import prepare_covidnet

    def progress(done: int, total: int) -> None:
        if sys.stdout.isatty() and not quiet:
            say(f"\rdecoded {done}/{total} images", end="\n" if done == total else "")

    def prepared(**how: Any) -> ImageMeta:
        train, val, test = (lists.get(split) for split in ("train", "val", "test"))
        return prepare_covidnet(out, images, train, val, test, progress=progress, **options, **how)

    if options["source"] == "synthetic" or not os.environ.get("RAY_ADDRESS"):
        return prepared()
    with ray_session(0, home.home() / "prepare-ray.log"):
        from raylab.distributed.map import run_chunks

        return prepared(spread=run_chunks)


def tell(task: str, out: Path, meta: Meta) -> None:
    say(f"prepared {out} from {meta.source}{' (SYNTHETIC data)' if meta.synthetic else ''}")
    _table(meta.attrition)
    if isinstance(meta, IcuMeta):
        for cohort, steps in meta.cohort_attrition.items():
            if cohort != "all":
                say(f"  cohort {cohort}")
                _table(steps[1:], "    ")
    for split, count in meta.counts.items():
        say(f"  {split}: " + ", ".join(f"{what} {n}" for what, n in count.items()))
    if isinstance(meta, IcuMeta):
        _tell_icu(meta)
    skipped = 0
    if isinstance(meta, ImageMeta):
        skipped = len(meta.skipped)
        _tell_images(meta)
    warnings = without_names(meta).warnings
    for warning in warnings:
        say(f"  warning: {warning}")
    if skipped or warnings:
        say(f"  the files: {out / META}")
    verb = "train" if "train" in meta.counts else "evaluate"
    say(f"next: raylab {verb} {task}{'' if verb == 'train' else ' --run RUN'} --data {out}")


def _tell_images(meta: ImageMeta) -> None:
    if meta.skipped:
        say(f"  unreadable and skipped: {len(meta.skipped)}")
    if meta.duplicates and (copies := meta.duplicates.pairs):
        say(f"  pairs of copies: {copies}, {meta.duplicates.of_different_patients} of them of different patients")
    if meta.published:
        differs = "; ".join(meta.published.differs) or "as the lecture counts"
        say(f"  counts of {meta.published.table}: {differs}")


def _table(rows: list[dict[str, int | str]], indent: str = "  ") -> None:
    width = max(len(str(row["step"])) for row in rows)
    for row in rows:
        counts = "  ".join(f"{n:>7,} {what}" for what, n in row.items() if what != "step")
        say(f"{indent}{row['step']:<{width}}  {counts}")


def _tell_icu(meta: IcuMeta) -> None:
    label = meta.label
    say(f"  label {label['name']} version {label['version']}: {label['onset']}")
    if meta.onsets is not None:
        onsets = ", ".join(f"{what.replace('_', ' ')} {n:,}" for what, n in meta.onsets.items())
        say(f"  onsets at any time: {onsets}")
    say("  how the rows end: " + ", ".join(f"{how} {n:,}" for how, n in meta.ends.items()))
    for cell in meta.sensitivity:
        say(
            f"  FiO2 {cell['fio2_back_h']:g} h back, persistence {cell['persist_h']:>2g} h: {cell['stays']:>6,} onsets"
            f", {cell['after_6_h']:,} after 6 h, {cell['after_12_h']:,} after 12 h"
        )
    if dropped := {what: n for what, n in meta.dropped.items() if n}:
        say("  rows not used: " + ", ".join(f"{what} {n:,}" for what, n in dropped.items()))
    _tell_values(meta)
    for note in meta.notes:
        say(f"  note: {note}")


def _tell_values(meta: IcuMeta) -> None:
    """What was set missing, converted or guessed, by concept. Directories prepared before some of it was counted have
    no such line."""
    for what, words in (
        ("out_of_range", "outside plausible range, set missing"),
        ("unreadable", "not a number, set missing"),
        ("unknown_units", "unit not understood, set missing"),
        ("converted", "units converted"),
        ("no_unit", "no unit given, the usual one taken"),
        ("percent", "read as percent"),
        ("room_air", "20 to 21 %, read as room air"),
    ):
        if counts := getattr(meta, what):
            say(f"  {words}: " + ", ".join(f"{name} {_by_unit(n)}" for name, n in counts.items()))


def _by_unit(n: int | dict[str, int]) -> str:
    return f"{n:,}" if isinstance(n, int) else ", ".join(f"'{unit}' {count:,}" for unit, count in n.items())


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
