"""raylab prepare: raw tables or images -> a checked data directory."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from jobs import cli
from jobs.common import home
from jobs.common.console import list_counts, say
from jobs.common.environment import verb_environment
from jobs.common.results import PreparedData
from jobs.common.session import ray_session
from raylab.data import datalad
from raylab.data.prepared import META, Meta
from raylab.errors import UsageError
from raylab.tasks import TASKS, find_task
from raylab.tasks.plugins import options_for
from raylab.tasks.preparation import Preparation, PrepareOptions, Resources, RunChunks, attrition_lines

EXAMPLE = "raylab prepare ards --source synthetic --patients 400 --seed 0 --out prepared/ards"


def arguments(parser: argparse.ArgumentParser) -> None:
    preparations = {name: task.preparation for name, task in TASKS.items() if task.preparation is not None}
    parser.add_argument("task", choices=list(preparations))
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--replace", action="store_true", help="replace data of the task in --out, once the new data is complete"
    )
    kinds: dict[type[PrepareOptions], str] = {of.options: of.title for of in preparations.values()}
    by_name: dict[str, dict[str, FieldInfo]] = {}  # by title of the kind of data
    for options, title in kinds.items():
        for name, field in options.model_fields.items():
            by_name.setdefault(name, {})[title] = field
    # of every kind of data, or of several
    shared = {name: of for name, of in by_name.items() if name in PrepareOptions.model_fields or len(of) > 1}
    for name, fields in shared.items():
        _add_option(parser, name, fields, is_of_all=len(fields) == len(kinds))
    for options, title in kinds.items():
        tasks = ", ".join(name for name, of in preparations.items() if of.options is options)
        group = parser.add_argument_group(f"{title} ({tasks})")
        for name, field in options.model_fields.items():
            if name not in shared:
                _add_option(group, name, {title: field}, is_of_all=True)


def _add_option(parser: Any, name: str, fields: Mapping[str, FieldInfo], is_of_all: bool) -> None:
    """An option that some kinds of data have, or all. One that is not given is left out of the namespace: its default
    is that of the kind's field."""
    field = next(iter(fields.values()))
    option = f"--{(field.alias or name).replace('_', '-')}"
    types = {_type_of(one) for one in fields.values()}
    # where kinds of data differ, the checked field of the kind makes it a number
    more: dict[str, Any] = {"type": types.pop() if len(types) == 1 else str, "metavar": (field.alias or name).upper()}
    if field.annotation is bool:
        more = {"action": "store_true"}
    elif isinstance(field.default, tuple):
        more |= {"nargs": "+", "action": "extend"}
    titles: dict[str, list[str]] = {}  # by what the option means to them
    for title, one in fields.items():
        titles.setdefault(_describe(one), []).append(title)
    is_one = is_of_all and len(titles) == 1
    texts = list(titles) if is_one else [f"{', '.join(of)}: {text}" for text, of in titles.items()]
    parser.add_argument(option, dest=name, default=argparse.SUPPRESS, help="; ".join(texts), **more)


def _type_of(field: FieldInfo) -> Any:
    kinds = [kind for kind in get_args(field.annotation) if kind not in (type(None), Ellipsis)] or [field.annotation]
    return kinds[-1]


def _describe(field: FieldInfo) -> str:
    """The description of an option, with its default."""
    text = (field.description or "").replace("\n", " ")
    has_default = field.default is not None and field.default is not False and field.default != ()
    return f"{text} (default: {field.default})" if has_default else text


def main(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: value for name, value in vars(args).items() if name not in {"task", "out", "json"}}
    return prepare(args.task, args.out, **options).details


@verb_environment()
def prepare(task: str, out: Path | str, *, replace: bool = False, quiet: bool = False, **options: Any) -> PreparedData:
    """Prepare data of `task` in the directory `out`, from raw tables or images.

    `options` are those of the task's kind of data: `IcuOptions` in raylab/tasks/icu.py, `ImageOptions` in
    raylab/tasks/images.py. `replace`: replaces data of the task in `out`, once the new data is complete. Raises
    UsageError for an option that the task does not have, and DataError for raw data that cannot be used; nothing is
    then left half-written.
    """
    out = Path(out)
    meta = write_prepared(task, out, replace, quiet, options)
    if not quiet:
        verb = "train" if "train" in meta.counts else "evaluate"
        plugin = options_for(task) if verb == "train" else ""  # a run has its own copy
        say(f"next: raylab {verb} {task}{plugin}{'' if verb == 'train' else ' --run RUN'} --data {out}")
        if verb == "evaluate":
            say("      there are no train rows: a model of other data can be scored on these, but none be trained")
    details = {k: v for k, v in meta.to_json().items() if k not in {"statistics", "files"}}
    details["warnings"] = meta.printable_warnings
    if "skipped" in details:
        details["skipped"] = len(details["skipped"])
    return PreparedData(out.absolute(), task, {"out": str(out.absolute()), **details})


def write_prepared(task: str, out: Path, replace: bool, quiet: bool, options: dict[str, Any]) -> Meta:
    """Do what `prepare` does, for it and for verbs that prepare data on their way."""
    preparation = find_task(task).preparation
    if preparation is None:
        raise UsageError(f"there is no data to prepare for '{task}'", do=f"{find_task(task).meta.made_by} {out}")
    parsed = preparation.parse(task, options)
    for path in (value for _, value in parsed if isinstance(value, Path)):
        datalad.check_content(path)
    meta: Meta = preparation.run(task, out, parsed, replace, _resources(quiet))
    if not quiet:
        tell(preparation, out, meta)
    return meta


def _resources(quiet: bool) -> Resources:
    def progress(done: int, total: int) -> None:
        if sys.stdout.isatty() and not quiet:
            say(f"decoded {done}/{total} images", start="\r", end="\n" if done == total else "")

    @contextmanager
    def cluster() -> Iterator[RunChunks | None]:
        """Where RAY_ADDRESS names a cluster, its nodes."""
        if not os.environ.get("RAY_ADDRESS"):
            yield None
            return
        with ray_session(0, home.home() / "prepare-ray.log"):
            from raylab.distributed.map import run_chunks

            yield run_chunks

    return Resources(progress, cluster)


def tell(preparation: Preparation[Any, Any], out: Path, meta: Meta) -> None:
    say(f"prepared {out} from {meta.origin}{' (SYNTHETIC data)' if meta.synthetic else ''}")
    say("\n".join(attrition_lines(meta.attrition)))
    for split, count in meta.counts.items():
        say(f"  {split}: {list_counts(count)}")
    for line in preparation.describe(meta):
        say(line)
    for warning in meta.printable_warnings:
        say(f"  warning: {warning}")
    if meta.warnings or getattr(meta, "skipped", None):
        say(f"  the files: {out / META}")


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
