"""Runs that Python code, such as a notebook, starts and that outlive it: each is a process of its own, here or a job on
a cluster, and is found again by its name.

    HOME/submitted/NAME.json    the call, and the process or job that carries it out
    HOME/submitted/NAME.log     what that process prints, without a cluster

    python -m jobs.common.submitted HOME/submitted/NAME.json    carries the call out; a run that exists is resumed
"""

import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

import raylab
from jobs import cli
from jobs.common import home
from jobs.common.environment import verb_environment
from jobs.common.interrupts import handle_interrupts
from jobs.common.results import Run
from raylab.config.recipe import Recipe
from raylab.documents import read_document
from raylab.errors import RaylabError, RunError, UsageError
from raylab.files import is_unlocked, locked, write_json
from raylab.processes import StartedProcess, find_own
from raylab.tasks.plugins import load_all, loaded_code
from raylab.tasks.recipes import parse_recipe
from raylab.training.run_record import FILE, RESUMABLE, RunRecord

CODE = Path(__file__).resolve().parents[2]
WATCH_SECONDS = {"running": 1.0, "submitted": 5.0}  # between two looks; a queue is asked less often


class Submission(StartedProcess):
    """HOME/submitted/NAME.json"""

    function: str
    arguments: dict[str, Any]
    cluster: str | None = None
    """name of the Slurm cluster; none for this machine"""
    time: float = 0.0
    """Unix time in seconds at which it was started last"""
    job: str = ""
    """id of the cluster's job"""
    host: str = ""
    """the machine of the process, without a cluster"""
    pid: int = Field(0, ge=0)
    started: float = 0.0
    error: str | None = None
    """why the call failed"""
    plugins: list[tuple[str, str]] = Field([])
    """name and text of the files that `raylab.load_plugin` had loaded"""


@dataclass(frozen=True)
class Process:
    """What carries out a submission: a job of a cluster, or a process of a machine."""

    job: str = ""
    host: str = ""
    pid: int = 0
    started: float = 0.0
    start: str = ""


class Cluster(ABC):
    """Where submitted runs are carried out: a Slurm cluster, or this machine."""

    name: str | None
    home: Path

    def submit(self, function: Callable[..., Run], *arguments: Any, **options: Any) -> "SubmittedRun":
        """Call `raylab.train`, `transfer` or `tune` with these arguments in a process that outlives this one.

        `name` is required: where its run exists already, it is the one that is returned; if it was interrupted, it is
        resumed. So the same lines, executed again, come back to the same run. Raises UsageError if the run of this name
        was submitted with other arguments, or in another way, or if a new one costs more than what is left of the
        cluster's budget.
        """
        with verb_environment():
            call = describe_call(function, arguments, options)
            name = call.arguments["name"]
            home.check_name(name)
            run = SubmittedRun(name, self)
            path = run.submission_path
            with locked(path.with_name(f".{name}.lock")):
                known = read_submission(path)
                record = run.record
                is_worked_on = run.is_worked_on()
                if record is not None or is_worked_on:
                    refuse_other(name, known, call, self.name)
                if not is_worked_on and (record is None or record.status != "FINISHED"):
                    if record is None:
                        self.check(call)
                    started = call.model_copy(update={"cluster": self.name, "time": time.time()})
                    write_json(path, started.to_json())  # first: the process reads it
                    words = ["-m", "jobs.common.submitted", str(path)]
                    process = self.start(name, words)
                    write_json(path, started.model_copy(update=vars(process)).to_json())
            return run

    @abstractmethod
    def check(self, call: Submission) -> None:
        """Raise UsageError if the new run or search of `call` costs more than what is left of the budget."""

    @abstractmethod
    def start(self, name: str, words: list[str]) -> Process:
        """Start `python WORDS` for the run `name`."""

    @abstractmethod
    def is_alive(self, submission: Submission, name: str) -> bool:
        """Whether something carries out this submission of the run `name`, or is about to."""

    @abstractmethod
    def stop(self, submission: Submission) -> None:
        """Interrupt the process of a submission; its run can be resumed."""


class ThisMachine(Cluster):
    """The machine of this process: each submitted run has processes of its own, which nothing here ends."""

    def __init__(self) -> None:
        self.name, self.home = None, home.home()

    def __repr__(self) -> str:
        return f"this machine, runs in {self.home}"

    def check(self, call: Submission) -> None:
        """This machine has no budget."""

    def start(self, name: str, words: list[str]) -> Process:
        # Jupyter's variables are of no use there; a session of its own, so that the end of this one is not its end
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("JPY_", "MPLBACKEND"))}
        environment |= {"RAYLAB_HOME": str(self.home), "PYTHONPATH": str(CODE)}
        log = self.home / "submitted" / f"{name}.log"
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Process(host=socket.gethostname(), **StartedProcess.of(process.pid).to_json())

    def is_alive(self, submission: Submission, name: str) -> bool:
        return submission.host == socket.gethostname() and find_own(submission) is not None

    def stop(self, submission: Submission) -> None:
        if self.is_alive(submission, ""):
            os.kill(submission.pid, signal.SIGTERM)


@dataclass(frozen=True)
class SubmittedRun:
    """A run that was submitted; other functions accept its `result()`."""

    name: str
    cluster: Cluster

    @property
    def directory(self) -> Path:
        return self.cluster.home / "runs" / self.name

    @property
    def submission_path(self) -> Path:
        return self.cluster.home / "submitted" / f"{self.name}.json"

    @property
    def record(self) -> RunRecord | None:
        """What is recorded of the run; None until it exists."""
        return home.note(self.directory) if (self.directory / FILE).is_file() else None

    @property
    def status(self) -> str:
        """ "submitted" until the run exists, then "running", "finished", "failed" or "killed"; "lost" if it has not
        ended and nothing works on it."""
        record = self.record
        if record is not None and record.status != "RUNNING":
            return str(record.status).lower()
        if self.is_worked_on():
            return "submitted" if record is None else "running"
        again = self.record  # it may have ended meanwhile
        return "lost" if again is None or again.status == "RUNNING" else str(again.status).lower()

    def is_worked_on(self) -> bool:
        """Whether a process works on the run, or is about to."""
        if self.record is not None and not is_unlocked(self.directory / "lock"):
            return True  # without asking Slurm
        known = read_submission(self.submission_path)
        return known is not None and known.error is None and self.cluster.is_alive(known, self.name)

    def watch(self) -> Run:
        """Show the curve of the run, or of every trial of the search, until it has ended; returns its `result`.

        Ending this early, by an interrupt or with its process, does not end the run.
        """
        from jobs.common.live_curve import LiveCurve

        curve = LiveCurve(self.name, self.directory)
        while (status := self.status) in WATCH_SECONDS:
            curve.show(status)
            time.sleep(WATCH_SECONDS[status])
        curve.show(status)
        return self.result()

    def result(self) -> Run:
        """The finished run. Raises RunError if it has not finished, with the reason."""
        status = self.status
        if status == "finished":
            return Run.read(self.directory)
        known, record = read_submission(self.submission_path), self.record
        why = (record.error if record is not None else None) or (known.error if known is not None else None) or ""
        if status in WATCH_SECONDS:
            raise RunError(f"run '{self.name}' has not ended: it is {status}", do="watch() waits for its end")
        what = {"lost": "nothing works on run '{}' any more", "failed": "run '{}' failed"}.get(
            status, "run '{}' was stopped"
        )
        do = record.do if record is not None and status == "failed" else None
        raise RunError(what.format(self.name), why, do or "submit it again: it continues where it stopped")

    def stop(self) -> None:
        """Interrupt the run; submitting it again resumes it."""
        known = read_submission(self.submission_path)
        if known is not None:
            self.cluster.stop(known)

    def __repr__(self) -> str:
        return f"run '{self.name}': {self.status}"


def describe_call(function: Callable[..., Run], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Submission:
    """The call as a submission; UsageError if `function` cannot be submitted or does not take these arguments."""
    name = getattr(function, "__name__", repr(function))
    if name not in RESUMABLE or getattr(raylab, name) is not function:
        names = " or ".join(f"raylab.{known}" for known in RESUMABLE)
        raise UsageError(
            f"'{name}' cannot be submitted", "only what makes a run that can be resumed", f"submit {names}"
        )
    try:
        bound = inspect.signature(function).bind(*arguments, **options).arguments
    except TypeError as error:
        raise UsageError(f"raylab.{name}: {error}", do=f"help(raylab.{name})") from error
    if not bound.get("name"):
        raise UsageError(
            "a submitted run needs a name", "by which it is found again", f"submit(raylab.{name}, ..., name=...)"
        )
    plain = {key: to_plain_argument(key, value) for key, value in bound.items()}
    own = {"plugins": codes} if (codes := loaded_code()) else {}
    return Submission(function=name, arguments=plain, **own)


def to_plain_argument(name: str, value: Any) -> Any:
    """An argument as JSON; paths of data become absolute, because the process may run elsewhere."""
    if name == "data":
        return str(Path(value).absolute())
    if isinstance(value, Recipe):
        return value.model_dump(mode="json")
    if isinstance(value, Run | SubmittedRun):
        return str(value.directory)
    if isinstance(value, Mapping):
        return {key: to_plain_argument("", item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def arguments_of(call: Submission) -> dict[str, Any]:
    """The arguments of a call, from their JSON; the plugins that it needs are loaded."""
    load_all(call.plugins)
    recipe = call.arguments.get("recipe")
    return {**call.arguments, "recipe": parse_recipe(recipe)} if isinstance(recipe, dict) else dict(call.arguments)


def refuse_other(name: str, known: Submission | None, call: Submission, cluster: str | None) -> None:
    """Raise UsageError if the run `name` was not made by this call."""
    do = "choose another name, or remove it: raylab rm " + name
    if known is None:
        raise UsageError(f"there is already a run named '{name}', which was not submitted from Python", do=do)
    if known.cluster != cluster:
        place = "on this machine" if known.cluster is None else f"to cluster '{known.cluster}'"
        raise UsageError(f"run '{name}' was submitted {place}", do=do)
    if known.function != call.function:
        raise UsageError(f"run '{name}' was submitted with raylab.{known.function}", do=do)
    changed = [
        key for key in {**known.arguments, **call.arguments} if known.arguments.get(key) != call.arguments.get(key)
    ]
    if changed:
        was = ", ".join(f"{key}={known.arguments.get(key)!r}" for key in changed)
        raise UsageError(f"run '{name}' was submitted with other arguments: {was}", do=do)


def read_submission(path: Path) -> Submission | None:
    """The submission in `path`; None if there is none."""
    return read_document(path, Submission, "remove it") if path.is_file() else None


def carry_out(path: Path) -> Run:
    """Call what the submission in `path` says, or resume its run if it exists. An error is noted in the file."""
    call = read_document(path, Submission)
    name = call.arguments["name"]
    try:
        if (home.home() / "runs" / name / FILE).is_file():
            return raylab.resume(name)
        run: Run = getattr(raylab, call.function)(**arguments_of(call))
        return run
    except RaylabError as error:
        with suppress(OSError):  # of a full disk; the error is printed as well
            now = read_document(path, Submission)  # with this process or job
            write_json(path, now.model_copy(update={"error": f"{error.what}: {error.why}"}).to_json())
        raise


def main() -> int:
    handle_interrupts()
    code = 0
    try:
        carry_out(Path(sys.argv[1]))
    except (Exception, KeyboardInterrupt) as error:
        code = cli.explain_end(error, "train")
    cli.end_stuck_ray(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
