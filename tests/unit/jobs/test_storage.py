"""Every verb on a disk that is full, read-only or not ours: a clear error before any work, and nothing half-written.

The verbs and their options are those of the parser, so that a new verb joins by itself.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from jobs import cli
from jobs.common import home, run_tracking
from raylab.errors import DataError, RunError
from raylab.storage import check_writable, explain_storage_error
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.run import write_model
from tests.others import give_up_override
from tests.verbs import Verbs
from tracking import runs
from tracking.outbox import Outbox

pytestmark = pytest.mark.timeout(900)

# What a verb that writes into the home is asked. {ards}: prepared data, {new}: a directory that does not exist.
WORDS: Mapping[str, str] = {
    "train": "ards --data {ards} --smoke --workers 0",
    "transfer": "ards --from first --data {ards} --workers 0",
    "tune": "ards --data {ards} --smoke --trials 1",
    "resume": "first",
    "rerun": "first",
    "evaluate": "ards --run first --data {ards}",
    "explain": "ards --run first --data {ards} --rows 4",
    "predict": "ards --run first --data {ards} --out {new}.parquet",
    "simulate": "view",
    "fit": "--source synthetic --patients 4 --hours 12 --out {new}",
    "benchmark": "ards --landmarks 12 --folds 2 --trials 1 --models last_pf --patients 60 --out {new}",
    "compare": "",
    "sync": "",
    "ui": "--detach --quiet",
}
EXEMPT = {
    "completion": "it writes nothing",
    "concepts": "it writes nothing",
    "recipe": "it writes nothing",
    "models": "it writes nothing",
    "runs": "it writes nothing",
    "estimate": "it writes nothing",
    "notebook": "it writes nothing into the home",
    "verify": "it writes nothing",
    "export": "it writes nothing into the home",
    "federate": "it needs an agreement that all sites have signed before it writes anything into the home",
    "cost": "it needs runs of Slurm jobs before it writes anything",
    "prepare": "it writes nothing into the home",
    "cluster": "it needs Slurm before it writes anything",
    "doctor": "it needs Slurm before it writes anything",
    "site": "it needs Slurm before it writes anything",
    "warm": "it checks the home before it starts a Ray",
    "rm": "it writes nothing, and removes what fills a disk",
    "demo": "it begins as `ui` does, and then calls verbs that are here",
}
# The rest of a command line that asks for an output, where the verb needs one to be parsed
FILLED = {
    "prepare": "ards --source synthetic --patients 20 --out {new}",
    "simulate": "living --size 8",
    "recipe": "ards",
    "estimate train": "ards --data {ards} --smoke",
    "estimate tune": "ards --data {ards} --smoke",
    "completion": "bash",
    "verify": "first",
    "export": "first --out {new}",
    "federate keys": "--site here --out {new}",
    "federate agree": "ards --exchange {new} --sites a.json b.json --rows 8 8",
    "federate sign": "--exchange {new} --key here.key",
    "federate run": "--exchange {new} --key here.key --data {ards}",
    "federate pool": "--exchange {new} --data here={ards} --out {new}",
    "cluster up": "--site local",
    "cluster logs": "job",
    "cluster stop": "job",
    "site new": "ours",
    "site check": "local",
}
FAULTS = {"full": "no space", "read-only": "read-only", "denied": "permission denied"}

Forks = tuple[Verbs, dict[str, str]]


class Disk:
    """A small file system of its own. Its home has one finished run."""

    def __init__(self, path: Path) -> None:
        self.path, self.home, self.empty, self.ballast = path, path / "home", path / "empty", path / "ballast"

    def contents(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.path)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in self.path.rglob("*")
            if path != self.ballast and path.suffix != ".lock"  # which are empty
        }

    def fail(self, how: str) -> None:
        if how == "full":
            with self.ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        elif how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)
        else:
            for path in (self.path, *self.path.rglob("*")):
                path.chmod(0o500 if path.is_dir() else 0o400)

    def mend(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", self.path], check=True)
        for path in (self.path, *self.path.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
        self.ballast.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, ards_data: Path) -> Iterator[Disk]:
    if os.geteuid():
        pytest.skip("only root may mount a file system")
    made, aside = Disk(tmp_path_factory.mktemp("disk")), tmp_path_factory.mktemp("aside") / "home"
    # It is made before the mount and then copied: this process keeps the database open, and nothing may be open there
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(made.home))
        task, recipe = find_task("ards"), shipped_recipe("ards", smoke=True)
        first, uri = home.new_run("first", "ards"), runs.address(made.home)
        new = run_tracking.describe_run(first, recipe, task.read_meta(ards_data), ards_data, "train", uri)
        with run_tracking.open_run(first, new):
            pass
        samples = task.load(ards_data, "train", recipe.data, None)
        write_model(first / "model", task.model(recipe, samples.spec).state_dict(), recipe, samples.spec)
        Outbox(first / "outbox").append({"kind": "tags", "values": {"waits": "for sync"}})
    made.home.rename(aside)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "raylab-test", made.path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    try:
        shutil.copytree(aside, made.home)
        made.empty.mkdir()
        yield made
    finally:
        subprocess.run(["umount", made.path], check=True)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    environment = {**os.environ, "RAYLAB_HOME": str(tmp_path_factory.mktemp("good")), "MLFLOW_TRACKING_URI": ""}
    modules = ("mlflow.pytorch", *(f"jobs.{verb}" for verb in cli.VERBS), "raylab.distributed.tune")
    started = Verbs(environment, modules, before=give_up_override)
    yield started, environment
    started.stop()


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest, disk: Disk) -> Iterator[str]:
    try:
        disk.fail(request.param)
        yield request.param
    finally:
        disk.mend()


def find_faults(disk: Disk, forks: Forks, fault: str, asked: Mapping[str, str], own_home: Path | None = None) -> str:
    """Run commands whose output cannot be written; return what is wrong with what they said or left."""
    verbs, environment = forks
    said_to = Path(environment["RAYLAB_HOME"]) / "said.txt"
    if own_home is not None:
        environment = {**environment, "RAYLAB_HOME": str(own_home)}
    before, wrong = disk.contents(), []
    for label, words in asked.items():
        verb = verbs.start(words.split(), environment, said_to)
        said = verb.communicate(300)
        if verb.returncode not in (1, 2) or FAULTS[fault] not in said.lower() or str(disk.path) not in said:
            wrong.append(f"{label}: exit {verb.returncode}: {said[-800:]}")
        elif "Traceback" in said or "next: " not in said:
            wrong.append(f"{label}: {said[-2000:]}")
        after = disk.contents()
        if after != before:
            wrong.append(f"{label} left {sorted(set(after.items()) ^ set(before.items()))}")
            before = after
    return "\n".join(wrong)


def list_commands(verb: str) -> Iterator[tuple[str, set[str]]]:
    """(verb and subcommand, names of its options), from the parser."""
    parser, _ = cli.build_parser(verb)
    commands = {verb: parser}
    for action in parser._actions:
        if action.dest == "do":
            commands = {f"{verb} {name}": one for name, one in dict(action.choices or {}).items()}
    for words, one in commands.items():
        yield words, {action.dest for action in one._actions}


def test_every_verb_is_here_or_exempt() -> None:
    assert set(WORDS) | set(EXEMPT) == set(cli.VERBS) and not set(WORDS) & set(EXEMPT)


@pytest.mark.fault(17, 20)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    fault: str, disk: Disk, forks: Forks, ards_data: Path, tmp_path: Path
) -> None:
    asked = {}
    for verb in cli.VERBS:
        for command, options in list_commands(verb):
            rest = (FILLED.get(command) or WORDS.get(verb, "")).format(ards=ards_data, new=tmp_path / "new")
            end = " -- true" if command == "cluster submit" else ""
            asked[f"{command} --json"] = f"{command} {rest} --json {disk.empty}/deep/file.json{end}"
            if "out" in options and verb not in ("predict", "compare"):  # their run is looked up first: see below
                asked[f"{command} --out"] = f"{command} {rest.partition(' --out')[0]} --out {disk.empty}/deep/dir"
    assert len(asked) > len(cli.VERBS) + 4
    assert not (wrong := find_faults(disk, forks, fault, asked)), wrong


@pytest.mark.fault(20)
def test_a_home_that_cannot_be_written_is_refused_before_the_work(
    fault: str, disk: Disk, forks: Forks, ards_data: Path, tmp_path: Path
) -> None:
    asked = {verb: f"{verb} {words}".format(ards=ards_data, new=tmp_path / "new") for verb, words in WORDS.items()}
    asked["predict --out"] = f"predict ards --run first --data {ards_data} --split val --out {disk.empty}/p.parquet"
    asked["compare --out"] = f"compare --out {disk.empty}/report.html"
    assert not (wrong := find_faults(disk, forks, fault, asked, disk.home)), wrong


def test_what_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "file")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        check_writable(tmp_path / "file" / "below")


def test_the_cause_is_found_behind_the_errors_of_libraries() -> None:
    wrapped = ValueError("could not save")
    wrapped.__cause__ = OSError(28, "No space left on device", "/disk/file")
    explained = explain_storage_error(wrapped)
    assert isinstance(explained, RunError) and "/disk/file" in explained.what and "no space" in explained.why
    readonly = explain_storage_error(RuntimeError("(sqlite3.OperationalError) attempt to write a readonly database"))
    assert isinstance(readonly, DataError) and "read-only" in readonly.why
    assert explain_storage_error(ValueError("there is no column 'x'")) is None
