"""raylab rm: print what runs occupy on disk, and remove runs or parts of them."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import cli
from jobs.common import home
from jobs.common.console import say
from jobs.common.disk_use import NOTHING, PARTS, REST, Use, list_paths, measure_parts, show_bytes
from jobs.common.results import find_run
from raylab.errors import UsageError
from raylab.training.run_record import FILE, RunRecord
from tracking import runs

EXAMPLE = "raylab rm NAME --only checkpoints --dry-run"


class Row(NamedTuple):
    """A run, and what each of its parts occupies."""

    run: str
    status: str
    uses: dict[str, Use]


def arguments(parser: argparse.ArgumentParser) -> None:
    what = "name, MLflow run id or directory of a run or search; without one, print what all runs occupy"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=what)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                        help=f"remove only these parts of finished runs: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--older-than", type=days, metavar="DAYS",
                        help="choose all runs that have ended and have not changed for this many days")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed, and remove nothing")


def days(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.older_than is not None:
        if args.runs:
            raise UsageError("runs were given by name and by --older-than", do="give only one of them")
        directories = choose_old(args.older_than, args.only, args.quiet)
    elif args.runs:
        directories = list(dict.fromkeys(find_run(run) for run in args.runs))
        records = [] if args.only else list(home.records())
        for directory in directories:
            check(directory, directories, args.only, records)
    elif args.only:
        raise UsageError("--only needs runs", do="name runs, or add --older-than DAYS; raylab rm lists all runs")
    else:
        return tell([directory for directory, _ in home.records()], [*PARTS, REST], args.quiet)
    result = tell(directories, args.only or [*PARTS, REST], args.quiet)
    if args.dry_run:
        if not args.quiet:
            say("nothing was removed")
        return {**result, "removed": False}
    for directory in directories:
        if args.only is None:
            remove(directory)
        else:
            remove_parts(directory, args.only)
    if not args.quiet:
        say(f"removed {show_bytes(result['bytes'])} in {result['files']} files")
        if args.only is None:
            say("in MLflow these runs are marked as deleted; `mlflow gc` on its server frees their artifacts")
    return {**result, "removed": True}


def choose_old(age: float, only: list[str] | None, quiet: bool) -> list[Path]:
    """The runs that have ended and have not changed for `age` days, except those that something still needs."""
    until, records = time.time() - age * 86400, list(home.records())
    chosen = [path for path, record in records if record.status != "RUNNING" and home.changed_at(path) <= until]
    kept: list[UsageError] = []
    while True:  # a run that is kept may need another one
        refused = []
        for directory in chosen:
            try:
                check(directory, chosen, only, records)
            except UsageError as error:
                kept.append(error)
                refused.append(directory)
        if not refused:
            break
        chosen = [directory for directory in chosen if directory not in refused]
    if not quiet:
        for refusal in kept:
            say(f"kept: {refusal.what}")
    return chosen


def check(
    directory: Path, others: list[Path], only: list[str] | None, records: Sequence[tuple[Path, RunRecord]]
) -> None:
    """Raise UsageError if a run of `records` still needs the run in `directory`, or if its parts are still needed.
    `others` go with it."""
    record = home.note(directory)
    if directory.is_symlink():
        raise UsageError(
            f"{directory} is a link to a run",
            "what it refers to may not be yours to remove",
            f"name the run itself, {directory.resolve()}, or remove the link: rm {directory}",
        )
    if only is not None:
        if record.status != "FINISHED":
            raise UsageError(
                f"run '{directory.name}' has not finished ({record.status})",
                "it resumes from its checkpoints",
                f"raylab resume {directory.name}, or remove the whole run",
            )
        if "trials" in only and (waiting := find_unsent(directory)):
            raise UsageError(f"the models of {', '.join(waiting)} are not in MLflow yet", do="raylab sync")
        return
    if record.registered is not None:
        raise UsageError(
            f"the model of '{directory.name}' is registered as {record.registered}",
            "the registry would refer to a run that no longer exists",
            "delete that version in MLflow first, or remove only parts of the run (--only)",
        )
    for child, of_child in records:
        if child not in others and of_child.status != "FINISHED" and is_parent(directory, record, of_child):
            raise UsageError(
                f"'{child.name}' starts from the weights of '{directory.name}', and has not finished",
                do=f"raylab resume {child.name}, or remove both",
            )


def find_unsent(directory: Path) -> list[str]:
    """The names of a search's trials whose model MLflow does not have yet."""
    trials = [home.note(path.parent) for path in directory.glob(f"trials/*/{FILE}")]
    return [record.name for record in trials if record.model_logged is False]


def is_parent(directory: Path, record: RunRecord, child: RunRecord) -> bool:
    """Whether the run `child` starts from the weights of the run `record` in `directory`."""
    return str(directory) == child.parent_directory or (child.parent_directory is None and child.parent == record.name)


def tell(directories: list[Path], names: list[str], quiet: bool) -> dict[str, Any]:
    """Print a table of what the parts `names` of the runs occupy; return it with the sums."""
    rows = [
        Row(directory.name, str(home.note(directory).status), measure_parts(directory)) for directory in directories
    ]
    total = sum((row.uses[name] for row in rows for name in names), NOTHING)
    if not quiet:
        width = max(len("total"), *(len(row.run) for row in rows)) if rows else len("total")
        say(f"{'run':{width}}  {'status':8}" + "".join(f"{name:>24}" for name in names))
        for row in rows:
            say(f"{row.run:{width}}  {row.status:8}" + "".join(f"{show_use(row.uses[name]):>24}" for name in names))
        say(f"{'total':{width}}  {show_use(total)}")
    return {
        "runs": [
            {"run": row.run, "status": row.status, "parts": {name: row.uses[name]._asdict() for name in names}}
            for row in rows
        ],
        "files": total.files,
        "bytes": total.bytes,
    }


def show_use(use: Use) -> str:
    return f"{show_bytes(use.bytes)} in {use.files} files"


def remove(directory: Path) -> None:
    """Remove a run and its trials, in MLflow first: if this is interrupted, the same command completes it."""
    with home.lock_run(directory):
        for path in (*sorted(directory.glob(f"trials/*/{FILE}")), directory / FILE):
            record = home.note(path.parent)
            if record.run_id is not None:
                runs.delete_run(record.uri, record.run_id)
        home.remove(directory)


def remove_parts(directory: Path, parts: list[str]) -> None:
    with home.lock_run(directory):
        for path in (path for part in parts for path in list_paths(directory, part)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


if __name__ == "__main__":
    sys.exit(cli.main(["rm", *sys.argv[1:]]))
