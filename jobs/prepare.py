"""raylab prepare: raw tables or images -> a checked data directory."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.progress import say
from raylab.config import assignments
from raylab.errors import UsageError

EXAMPLE = "raylab prepare ards --source synthetic --patients 400 --seed 0 --out prepared/ards"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["ards", "covidnet"])
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--source", help="ards: physionet2012, meds, mimic3, yaib, synthetic; covidnet: covidx, synthetic"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits and of synthetic data")
    parser.add_argument("--patients", type=int, default=400, help="synthetic: how many")
    ards = parser.add_argument_group("ards")
    ards.add_argument("--path", type=Path, help="directory of the raw tables")
    ards.add_argument("--landmark", type=float, default=12, help="hours after admission at which is predicted")
    ards.add_argument("--horizon", type=float, default=24, help="hours after landmark and gap in which onset counts")
    ards.add_argument("--gap", type=float, default=0, help="hours after the landmark that no onset may fall into")
    ards.add_argument("--label", default="ahrf", help="ahrf, berlin-oxygenation, global-2023")
    ards.add_argument(
        "--label-set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="windows of the label, for example persist_h=8 fio2_back_h=4",
    )  # fmt: skip
    ards.add_argument("--rolling", action="store_true", help="predict every hour from the landmark until onset")
    ards.add_argument("--until", type=float, default=48, help="rolling: the last hour at which is predicted")
    ards.add_argument("--mapping", type=Path, metavar="TOML", help="meds: what the codes mean; MIMIC-IV's otherwise")
    ards.add_argument("--sensitivity", action="store_true", help="count onsets over windows of FiO2 and persistence")
    images = parser.add_argument_group("covidnet")
    images.add_argument("--images", type=Path, help="folder that the lists' file names start from")
    for split in ("train", "val", "test"):
        images.add_argument(f"--{split}", type=Path, metavar="LIST", help=f"COVIDx label list of {split}")
    images.add_argument("--size", type=int, default=224, help="pixels a side of the cache")
    images.add_argument("--domain", choices=["A", "B"], default="A", help="synthetic: which of two drawn hospitals")
    images.add_argument("--skip-bad", action="store_true", help="leave unreadable images out, listed")


def main(args: argparse.Namespace) -> dict[str, Any]:
    meta = _ards(args) if args.task == "ards" else _covidnet(args)
    if not args.quiet:
        _tell(args.task, args.out, meta)
    told = {k: v for k, v in meta.items() if k not in {"statistics", "files"}}
    return {"out": str(args.out.absolute()), **told}


def _ards(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.data.icu import prepare_ards
    from raylab.data.onset import label

    source = args.source or ("physionet2012" if args.path else None)
    if source is None:
        raise UsageError("prepare ards needs --source", do="add --source physionet2012 --path DIR, or synthetic")
    if source != "synthetic" and args.path is None:
        raise UsageError(f"source {source} needs --path DIR", do=f"raylab prepare ards --source {source} --path DIR")
    return prepare_ards(
        source,
        args.path,
        args.out,
        args.landmark,
        args.horizon,
        args.patients,
        args.seed,
        rule=label(args.label, assignments(args.label_set)),
        gap=args.gap,
        framing="rolling" if args.rolling else "landmark",
        until=args.until,
        mapping=args.mapping,
        grid_of_windows=args.sensitivity,
    )


def _covidnet(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.data.images import prepare_covidnet

    def progress(done: int, total: int) -> None:
        if sys.stdout.isatty() and not args.quiet:
            say(f"\rdecoded {done}/{total} images", end="\n" if done == total else "")

    return prepare_covidnet(
        args.out,
        args.images,
        args.train,
        args.val,
        args.test,
        source=args.source or "covidx",
        size=args.size,
        patients=args.patients,
        seed=args.seed,
        skip_bad=args.skip_bad,
        progress=progress,
        domain=args.domain,
    )


def _tell(task: str, out: Path, meta: dict[str, Any]) -> None:
    say(f"prepared {out} from {meta['source']}{' (SYNTHETIC data)' if meta['synthetic'] else ''}")
    _table(meta["attrition"])
    for cohort, steps in meta.get("cohort_attrition", {}).items():
        if cohort != "all":
            say(f"  cohort {cohort}")
            _table(steps[1:], "    ")
    for split, count in meta["counts"].items():
        say(f"  {split}: " + ", ".join(f"{what} {n}" for what, n in count.items()))
    if task == "ards":
        _tell_ards(meta)
    if outside := {k: n for k, n in (meta.get("out_of_range") or {}).items() if n}:
        say("  outside plausible range, set missing: " + ", ".join(f"{k} {n}" for k, n in outside.items()))
    if skipped := meta.get("skipped"):
        say(f"  unreadable and skipped: {len(skipped)}")
    say(f"next: raylab train {task} --data {out}")


def _table(rows: list[dict[str, Any]], indent: str = "  ") -> None:
    width = max(len(row["step"]) for row in rows)
    for row in rows:
        counts = "  ".join(f"{n:>7,} {what}" for what, n in row.items() if what != "step")
        say(f"{indent}{row['step']:<{width}}  {counts}")


def _tell_ards(meta: dict[str, Any]) -> None:
    label = meta["label"]
    say(f"  label {label['name']} version {label['version']}: {label['onset']}")
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
    for name in meta["left_out"]:
        say(f"  {name} is left out: most of its values cannot be in its unit")
    for note in meta["notes"]:
        say(f"  note: {note}")


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
