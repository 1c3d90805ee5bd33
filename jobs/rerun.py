"""raylab rerun: train the run behind a figure, a report or a name again, and compare the weights to the bit."""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import cli, resume, train
from jobs.common import home, provenance, research_object, run_tracking
from jobs.common.console import say, set_status
from jobs.common.environment import verb_environment
from jobs.common.run_tracking import CODE
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data import datalad
from raylab.data.prepared import META
from raylab.errors import DataError, RunError, UsageError, unknown
from raylab.files import write_json
from raylab.tasks import find_task
from raylab.tasks.recipes import parse_stored_recipe, read_recipe
from raylab.training.cpu import cpu_kind
from raylab.training.model_note import PLACE
from tracking import runs
from tracking.outbox import Outbox
from tracking.provenance import Provenance, read_provenance

EXAMPLE = "raylab rerun scores/val-roc.png"
DIRTY = "-dirty"

# Run by the Python of this environment in a directory with another revision of the code
ELSEWHERE = """
import sys
from pathlib import Path
from jobs.resume import resume
from jobs.train import train
from raylab.errors import RaylabError
from raylab.tasks.recipes import read_recipe
recipe, data, name, parent, begun = sys.argv[1:]
try:
    if begun:
        resume(name)
    else:
        train(read_recipe(Path(recipe)), Path(data), workers=0, name=name, parent=Path(parent) if parent else None)
except RaylabError as error:
    sys.exit(f"{error}")
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="FILE|RUN", help="PNG figure, HTML report, research object, or name, MLflow run id or directory"
    )
    parser.add_argument("--run", metavar="NAME", help="the run to repeat, of a file that has several")
    text = "prepared directory with the run's data (default: where runs of this home have it)"
    parser.add_argument("--data", type=Path, metavar="DIR", help=text)
    text = "name of the new run (default: made from the run's and the time); one that was interrupted is continued"
    parser.add_argument("--name", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    return rerun(args.what, run=args.run, data=args.data, name=args.name, quiet=args.quiet)


@verb_environment()
def rerun(
    what: str | Path,
    *,
    run: str | None = None,
    data: Path | str | None = None,
    name: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the run behind `what`, a file with its provenance or a run, once more in this process.

    Code of another revision is checked out with `git worktree` for it. If `name` is a repetition of the same run that
    was interrupted, it is continued. A run from the weights of another one starts from that run, if this home has it
    with the same weights, else from its repetition. Returns {"run", "name", "weights_sha256", "expected", "same",
    "differences": what differs from the first time, "exit_code": 0 if the weights are the same, else 1}. Raises
    DataError or UsageError if something that it needs is missing.
    """
    goal = find_goal(what, run)
    if zipfile.is_zipfile(what):
        research_object.load_code(Path(what), goal.name)
    directory, differences = repeat(goal, None if data is None else Path(data).absolute(), name, quiet)
    weights = home.note(directory).weights_sha256
    same = weights == goal.weights_sha256
    tags = {"raylab.rerun_of": goal.run_id or goal.name, "raylab.rerun_same": str(same).lower()}
    Outbox(directory / "outbox").append({"kind": "tags", "values": tags})
    run_tracking.forward_now(directory)
    if not quiet:
        say(f"{goal.name}: weights {goal.weights_sha256[:16] or 'not recorded'}")
        say(f"{directory.name}: weights {(weights or '')[:16]}")
        say("the same to the bit" if same else "NOT the same")
        for line in differences:
            say(f"  differs: {line}")
    return {
        "run": goal.name,
        "name": directory.name,
        "weights_sha256": weights,
        "expected": goal.weights_sha256,
        "same": same,
        "differences": differences,
        "exit_code": 0 if same else 1,
    }


def find_goal(what: str | Path, run: str | None) -> Provenance:
    """The provenance of the trained run that is meant: of an evaluation, the run whose model it scores."""
    if Path(what).is_file():
        found = {one.name: one for one in read_provenance(Path(what))}
        if not found:
            raise UsageError(f"{what} shows no run", do="give another file, or the name of the run")
        if run is None and len(found) > 1:
            raise UsageError(f"{what} shows {len(found)} runs: {', '.join(found)}", do=f"--run {next(iter(found))}")
        if run is not None and run not in found:
            raise unknown("run", run, found)
        goal = found[run] if run is not None else next(iter(found.values()))
    else:
        if run is not None:
            raise UsageError(f"--run chooses among the runs of a file, and {what} is a run", do="leave it out")
        goal = provenance.describe(home.find(str(what)))
    if goal.kind == "evaluate" and goal.parent is not None:
        goal = goal.parent
    if goal.kind == "federate":
        raise UsageError(
            f"{goal.name} was trained across sites, whose rows are not here",
            "with a privacy budget nobody can repeat it: the noise was secret, and no seed gives it again",
            "without one, where the data of all sites may be in one place: raylab federate pool",
        )
    if goal.kind not in provenance.TRAINED:
        raise UsageError(
            f"{goal.name} trains no network, it is a run of '{goal.kind or 'an unknown kind'}'",
            "only training is repeated; simulate, fit and benchmark continue from their results",
            "run the same command again",
        )
    return goal


def repeat(goal: Provenance, data: Path | None, name: str | None, quiet: bool) -> tuple[Path, list[str]]:
    """Train `goal` again; returns the new run and what differs from the first time. Whatever is missing is found before
    anything is trained."""
    if goal.recipe is None:
        raise DataError(
            f"the recipe of {goal.name} is not known",
            "an earlier version wrote the file, or the run is no longer in this home",
            "give the run's directory, or a figure of its own",
        )
    recipe = override(parse_goal(goal), {"scaling.workers": 0})
    source = find_data(goal, data)
    with checked_out(goal) as (code, differences):
        differences = differences + compare_environment(goal)
        parent, of_parent = find_parent(goal, data, quiet)
        begun = None if name is None else find_begun(name, goal, recipe, source)
        new = begun or home.new_run(name, f"{goal.name}-rerun")
        if not quiet:
            say(f"training {goal.name} again as {new.name}{', which was begun before' if begun else ''}")
        if code != CODE:
            train_elsewhere(code, recipe, source, new.name, parent, begun is not None)
        elif begun:
            resume.resume(begun, quiet=quiet)
        else:
            train.train(recipe, source, name=new.name, parent=parent, quiet=quiet)
    return new, [*of_parent, *differences]


def parse_goal(goal: Provenance) -> Recipe:
    """The recipe of `goal`, without its search; UsageError if it is damaged."""
    document = {**(goal.recipe or {}), "search": {}}
    return parse_stored_recipe(
        document, f"the recipe of {goal.name} is damaged", "give another copy of the file or run"
    )


def find_begun(name: str, goal: Provenance, recipe: Recipe, data: Path) -> Path | None:
    """The run `name` of this home if it is an earlier repetition of `goal`, by its recipe and data; else None."""
    directory = home.home() / "runs" / name
    if not home.is_open(directory):
        return None
    record = home.note(directory)
    is_goal = record.run_id == goal.run_id if goal.run_id else name == goal.name
    if is_goal or Path(record.data) != data or read_recipe(directory / "recipe.json") != recipe:
        return None
    return directory


def find_data(goal: Provenance, data: Path | None) -> Path:
    """The prepared directory with the data of `goal`: `data`, or where a run of this home has it."""
    task = find_task(goal.task)
    known = [Path(record.data) for _, record in home.records() if record.data_hash == goal.data_hash]
    places = [data] if data is not None else [path for path in dict.fromkeys(known) if (path / META).is_file()]
    for place in places:
        if any(datalad.is_absent(path) for path in datalad.list_files(place)):
            set_status(f"fetching the content of {place} by git-annex")
            datalad.fetch_content(place)
        meta = task.read_meta(place)
        if (meta.data_hash, meta.split_hash) == (goal.data_hash, goal.split_hash):
            return place
    seen = [f"{place} has other data" for place in places] or ["no run of this home has it"]
    if goal.datalad_id:
        dataset = f"it was in the DataLad dataset {goal.datalad_id} at commit {goal.datalad_commit}"
        seen.append(dataset)
    raise DataError(
        f"the data of {goal.name} is missing: {goal.data_source}, data hash {goal.data_hash[:16]}",
        "; ".join(seen),
        f"give --data DIR; raylab prepare {goal.task} makes the same from the same source, options and version",
    )


def find_parent(goal: Provenance, data: Path | None, quiet: bool) -> tuple[Path | None, list[str]]:
    """The run from whose weights `goal` starts, and what differed when it had to be repeated first."""
    parent = goal.parent
    if parent is None:
        return None, []
    for directory, record in home.records():
        is_it = record.run_id == parent.run_id if parent.run_id else record.name == parent.name
        if (is_it or record.weights_sha256 == parent.weights_sha256) and has_weights(directory, parent):
            return directory, []
    if parent.recipe is None:
        raise DataError(
            f"the run {parent.name}, from whose weights {goal.name} starts, is missing",
            "this home has no run with its weights, and its recipe is not known",
            "copy its directory to this home, or repeat it from a figure of its own",
        )
    if not quiet:
        say(f"{parent.name}, from whose weights {goal.name} starts, is not in this home")
    theirs = data if data is not None and parent.data_hash == goal.data_hash else None
    directory, differences = repeat(parent, theirs, None, quiet)
    if not has_weights(directory, parent):
        raise RunError(
            f"the repeated {parent.name} has other weights, so {goal.name} cannot come out the same",
            "; ".join(differences) or "nothing else differs",
            f"see {directory.name}",
        )
    return directory, differences


def has_weights(directory: Path, of: Provenance) -> bool:
    """Whether the run in `directory` ended with the weights of `of`, and still has its model."""
    record = home.note(directory)
    return bool(of.weights_sha256) and record.weights_sha256 == of.weights_sha256 and (directory / PLACE).is_file()


@contextmanager
def checked_out(goal: Provenance) -> Iterator[tuple[Path, list[str]]]:
    """The directory of the code with which `goal` was trained, and how it differs from that: this code if it is the
    same, else a work tree of this repository while the context is open."""
    here, wanted = runs.code_revision(CODE), goal.code_revision
    if wanted == here:
        yield CODE, ["the code had uncommitted changes, which no hash names"] if wanted.endswith(DIRTY) else []
        return
    commit = wanted.removesuffix(DIRTY)
    if not commit or commit.startswith("files-"):
        yield CODE, [f"code: {wanted or 'unknown'}, here {here}; no commit names it, so this code is used"]
        return
    if commit == here:
        yield CODE, [f"code: {commit[:12]} had uncommitted changes, which are lost"]
        return
    if subprocess.run(
        ["git", "-C", str(CODE), "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True
    ).returncode:
        raise DataError(
            f"the code of {goal.name}, commit {commit[:12]}, is not in the repository of {CODE}",
            "it is not a git repository, or has not fetched that commit",
            f"git -C {CODE} fetch origin {commit}",
        )
    with tempfile.TemporaryDirectory(prefix="raylab-rerun-") as scratch:
        code = Path(scratch) / "code"
        set_status(f"checking out {commit[:12]}")
        git(["worktree", "add", "--quiet", "--detach", str(code), commit])
        try:
            yield code, [f"code: {commit[:12]} had uncommitted changes, which are lost"] * wanted.endswith(DIRTY)
        finally:
            git(["worktree", "remove", "--force", str(code)])


def git(words: Sequence[str]) -> None:
    done = subprocess.run(["git", "-C", str(CODE), *words], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"git {words[0]} {words[1]} failed in {CODE}", done.stderr.strip())


def train_elsewhere(code: Path, recipe: Recipe, data: Path, name: str, parent: Path | None, begun: bool) -> None:
    """Train with the code in directory `code`, in a process of its own, as run `name` of this home, or continue it."""
    document = code.with_name("recipe.json")
    write_json(document, recipe.model_dump(mode="json") | {"search": {}})
    words = [sys.executable, "-c", ELSEWHERE, str(document), str(data), name, str(parent or ""), "begun" * begun]
    places = {"PYTHONPATH": str(code), "RAYLAB_HOME": str(home.home())}
    done = subprocess.run(words, cwd=code, env={**os.environ, **places})
    if done.returncode:
        raise RunError(f"the earlier code could not train {name}", "its message is above")


def compare_environment(goal: Provenance) -> list[str]:
    """What of lock, image, torch and CPU differs between the run and this process."""
    here = runs.standard_tags(code=CODE, task="", seed=0, synthetic=False, data_hash="", split_hash="")
    pairs = [
        ("lock file", goal.lock_hash[:16], here["raylab.lock_hash"][:16]),
        ("image", goal.image_digest or "none", here.get("raylab.image_digest", "none")),
        ("torch", goal.torch_version, here["raylab.torch_version"]),
        ("CPU", "; ".join(goal.cpus), cpu_kind()),
    ]
    gpu = ["it was trained on GPUs, which promise no bits"] * (goal.recipe is not None and parse_goal(goal).scaling.gpu)
    return gpu + [f"{what}: {then or 'not recorded'}, here {now}" for what, then, now in pairs if then != now]


if __name__ == "__main__":
    sys.exit(cli.main(["rerun", *sys.argv[1:]]))
