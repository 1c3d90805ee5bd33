"""raylab prepare: raw tables or images -> a checked data directory."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home
from jobs.common.progress import say
from jobs.common.session import ray_session
from raylab.config.assignments import parse_assignments
from raylab.data.icu import labels
from raylab.data.images.manifest import discover
from raylab.errors import UsageError

EXAMPLE = "raylab prepare ards --source synthetic --patients 400 --seed 0 --out prepared/ards"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=[*labels.TASKS, "covidnet"])
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--replace", action="store_true", help="replace data of the task in --out, once the new data is complete"
    )
    parser.add_argument(
        "--source", help="ards: physionet2012, meds, mimic3, yaib, synthetic; covidnet: covidx, synthetic"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits and of synthetic data")
    parser.add_argument("--patients", type=int, default=400, help="synthetic: how many")
    parser.add_argument("--path", type=Path, help="ards: directory of the raw tables; covidnet: folder of a data set")
    icu = parser.add_argument_group("intensive care: " + ", ".join(labels.TASKS))
    icu.add_argument("--landmark", type=float, default=12, help="hours after admission at which is predicted")
    icu.add_argument("--horizon", type=float, default=24, help="hours after landmark and gap in which onset counts")
    icu.add_argument("--gap", type=float, default=0, help="hours after the landmark that no onset may fall into")
    icu.add_argument("--label", help="ards: ahrf (unless given), berlin-oxygenation, global-2023")
    icu.add_argument(
        "--label-set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="windows of the label, for example persist_h=8 fio2_back_h=4",
    )  # fmt: skip
    icu.add_argument("--rolling", action="store_true", help="predict every hour from the landmark until onset")
    icu.add_argument("--until", type=float, default=48, help="rolling: the last hour at which is predicted")
    icu.add_argument("--mapping", type=Path, metavar="TOML", help="meds: what the codes mean; MIMIC-IV's otherwise")
    icu.add_argument("--sensitivity", action="store_true", help="count onsets over windows of FiO2 and persistence")
    icu.add_argument("--virtual-patient", action="store_true", help="fit the lung model to the gases before the "
                      "landmark: features for --set data.virtual_patient=true")  # fmt: skip
    icu.add_argument(
        "--from", dest="origin", type=Path, nargs="+", metavar="D", help="prepared directories, pooled and split anew"
    )
    icu.add_argument(
        "--split-by", default="patient:0/5", help="with --from: patient:K/N, temporal, temporal:PERIOD or site:SOURCE"
    )
    images = parser.add_argument_group("covidnet")
    images.add_argument("--images", type=Path, help="folder that the lists' file names start from")
    for split in ("train", "val", "test"):
        images.add_argument(f"--{split}", type=Path, metavar="LIST", help=f"COVIDx label list of {split}")
    images.add_argument(
        "--manifest", type=Path, metavar="CSV", help="instead of lists; beside them, for views and groups"
    )
    images.add_argument("--size", type=int, default=224, help="pixels a side of the cache")
    images.add_argument(
        "--domain", help="which part of a folder or manifest; synthetic: A or B, of two drawn hospitals"
    )
    images.add_argument(
        "--apart-from",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="leave out copies of images prepared there",
    )
    images.add_argument("--skip-bad", action="store_true", help="leave unreadable images out, listed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    meta = _icu(args) if args.task in labels.TASKS else _covidnet(args)
    if not args.quiet:
        tell(args.task, args.out, meta)
    told = {k: v for k, v in meta.items() if k not in {"statistics", "files"}}
    return {"out": str(args.out.absolute()), **without_names(told)}


def without_names(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` as it may be printed: file names can name patients, and stay in meta.json."""
    shown: dict[str, Any] = {"warnings": [text.splitlines()[0].rstrip(":") for text in meta.get("warnings", [])]}
    if "skipped" in meta:
        shown["skipped"] = len(meta["skipped"])
    return {**meta, **{name: value for name, value in shown.items() if name in meta}}


def _icu(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.data.icu.prepare import prepare_ards
    from raylab.data.icu.resplit import parse, resplit

    if args.origin is not None:
        if args.source is not None or args.path is not None:
            raise UsageError("--from takes prepared directories, and so no --source and no --path")
        if args.task != "ards":
            raise UsageError(f"prepare {args.task} takes no --from", do="--source and --path")
        directories = [directory.absolute() for directory in args.origin]
        return resplit(directories, args.out, parse(args.split_by), args.seed, args.replace)
    source = args.source or ("physionet2012" if args.path else None)
    if source is None:
        raise UsageError(
            f"prepare {args.task} needs --source", do="add --source physionet2012 --path DIR, or synthetic"
        )
    if source != "synthetic" and args.path is None:
        raise UsageError(
            f"source {source} needs --path DIR", do=f"raylab prepare {args.task} --source {source} --path DIR"
        )
    name = args.label or labels.default_label(args.task).name
    rule = labels.label(name, parse_assignments(args.label_set))
    if rule.task != args.task:
        raise UsageError(f"the label '{rule.name}' is not of the task {args.task}", do="leave --label out")
    return prepare_ards(
        source,
        args.path,
        args.out,
        args.landmark,
        args.horizon,
        args.patients,
        args.seed,
        rule=rule,
        gap=args.gap,
        framing="rolling" if args.rolling else "landmark",
        until=args.until,
        mapping=args.mapping,
        grid_of_windows=args.sensitivity,
        virtual=args.virtual_patient,
        replace=args.replace,
    )


def _covidnet(args: argparse.Namespace) -> dict[str, Any]:
    lists = {split: getattr(args, split) for split in ("train", "val", "test")}
    images, manifest = args.images, args.manifest
    if args.path is not None and args.source != "synthetic":
        found = discover(args.path, args.domain)
        given = any(lists.values())
        lists = lists if given else {split: found.lists.get(split) for split in lists}
        images, manifest = images or found.images, manifest or found.manifest
    return covidnet(
        args.out,
        images,
        lists,
        quiet=args.quiet,
        source=args.source or "covidx",
        size=args.size,
        patients=args.patients,
        seed=args.seed,
        skip_bad=args.skip_bad,
        domain=args.domain,
        manifest=manifest,
        apart_from=args.apart_from,
        replace=args.replace,
    )


def covidnet(
    out: Path, images: Path | None, lists: Mapping[str, Path | None], quiet: bool, **options: Any
) -> dict[str, Any]:
    """prepare_covidnet in this process, or, where RAY_ADDRESS names a cluster, decoding over its nodes."""
    from raylab.data.images.prepare import prepare_covidnet

    def progress(done: int, total: int) -> None:
        if sys.stdout.isatty() and not quiet:
            say(f"\rdecoded {done}/{total} images", end="\n" if done == total else "")

    def prepared(**how: Any) -> dict[str, Any]:
        train, val, test = (lists.get(split) for split in ("train", "val", "test"))
        return prepare_covidnet(out, images, train, val, test, progress=progress, **options, **how)

    if options["source"] == "synthetic" or not os.environ.get("RAY_ADDRESS"):
        return prepared()
    with ray_session(0, home.home() / "prepare-ray.log"):
        from raylab.distributed.map import run_chunks

        return prepared(spread=run_chunks)


def tell(task: str, out: Path, meta: dict[str, Any]) -> None:
    say(f"prepared {out} from {meta['source']}{' (SYNTHETIC data)' if meta['synthetic'] else ''}")
    _table(meta["attrition"])
    for cohort, steps in meta.get("cohort_attrition", {}).items():
        if cohort != "all":
            say(f"  cohort {cohort}")
            _table(steps[1:], "    ")
    for split, count in meta["counts"].items():
        say(f"  {split}: " + ", ".join(f"{what} {n}" for what, n in count.items()))
    if task in labels.TASKS:
        _tell_icu(meta)
    shown = without_names(meta)
    if skipped := shown.get("skipped"):
        say(f"  unreadable and skipped: {skipped}")
    if copies := (meta.get("duplicates") or {}).get("pairs"):
        say(f"  pairs of copies: {copies}, {meta['duplicates']['of_different_patients']} of them of different patients")
    if published := meta.get("published"):
        differs = "; ".join(published["differs"]) or "as the lecture counts"
        say(f"  counts of {published['table']}: {differs}")
    for warning in shown.get("warnings", []):
        say(f"  warning: {warning}")
    if skipped or shown.get("warnings"):
        say(f"  the files: {out / 'meta.json'}")
    verb = "train" if "train" in meta["counts"] else "evaluate"
    say(f"next: raylab {verb} {task}{'' if verb == 'train' else ' --run RUN'} --data {out}")


def _table(rows: list[dict[str, Any]], indent: str = "  ") -> None:
    width = max(len(row["step"]) for row in rows)
    for row in rows:
        counts = "  ".join(f"{n:>7,} {what}" for what, n in row.items() if what != "step")
        say(f"{indent}{row['step']:<{width}}  {counts}")


def _tell_icu(meta: dict[str, Any]) -> None:
    label = meta["label"]
    say(f"  label {label['name']} version {label['version']}: {label['onset']}")
    if "onsets" in meta:
        onsets = ", ".join(f"{what.replace('_', ' ')} {n:,}" for what, n in meta["onsets"].items())
        say(f"  onsets at any time: {onsets}")
    say("  how the rows end: " + ", ".join(f"{how} {n:,}" for how, n in meta["ends"].items()))
    for cell in meta.get("sensitivity", ()):
        say(
            f"  FiO2 {cell['fio2_back_h']:g} h back, persistence {cell['persist_h']:>2g} h: {cell['stays']:>6,} onsets"
            f", {cell['after_6_h']:,} after 6 h, {cell['after_12_h']:,} after 12 h"
        )
    if dropped := {what: n for what, n in meta["dropped"].items() if n}:
        say("  rows not used: " + ", ".join(f"{what} {n:,}" for what, n in dropped.items()))
    _tell_values(meta)
    for name in meta["left_out"]:
        say(f"  {name} is left out: most of its values cannot be in its unit")
    for note in meta["notes"]:
        say(f"  note: {note}")


def _tell_values(meta: dict[str, Any]) -> None:
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
        if counts := meta.get(what):
            say(f"  {words}: " + ", ".join(f"{name} {_by_unit(n)}" for name, n in counts.items()))


def _by_unit(n: int | dict[str, int]) -> str:
    return f"{n:,}" if isinstance(n, int) else ", ".join(f"'{unit}' {count:,}" for unit, count in n.items())


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
