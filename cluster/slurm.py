"""Slurm's commands: submit, list, cancel, requeue. The only module that runs them."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from types import MappingProxyType

from cluster import slurm_proxy
from raylab.errors import SlurmError, UsageError

ANSWER_SECONDS = 30.0  # a command that takes longer counts as unanswered
TRIES = 3
PROXY = "RAYLAB_SLURM_PROXY"  # in a container: the socket of cluster/slurm_proxy.py, which runs the commands outside
# Secrets in the environment that other nodes do not need: they get the paths of files of mode 0600 instead
SECRETS = ("RAY_AUTH_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
CONFIGURATION = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")  # of the commands themselves
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}

# squeue's columns and widths; raylab's comments have under 100 characters
COLUMNS = {"JobID": 20, "State": 20, "RestartCnt": 10, "TimeLeft": 20, "NodeList": 120, "Reason": 60, "Comment": 200}

# Patterns of Slurm's refusals, and what to change. The error also quotes Slurm's own words.
REFUSALS = (
    (r"accounting/QOS policy|QOSMax|QOSGrp|AssocMax|AssocGrp", "fewer or smaller nodes, or another partition"),
    (
        r"account/partition",
        "correct `account` or `partition` of the site; `sacctmgr show associations user=$USER` lists yours",
    ),
    (r"partition", "correct `partition` of the site; `sinfo` lists the partitions"),
    (r"account|association", "correct `account` of the site; `sacctmgr show associations user=$USER` lists yours"),
    (r"qos", "correct `qos` of the site; `sacctmgr show associations user=$USER format=qos` lists yours"),
    (r"time limit", "a shorter --time; `sinfo -o '%P %l'` lists the limits"),
    (r"node configuration|cpu count|memory|gres", "a smaller node type of the site; `sinfo -o %c,%m,%G` lists nodes"),
    (r"features?", "correct `features` of the node type; `sinfo -o '%P %f'` lists them"),
    (r"limit|policy", "fewer or smaller nodes, or another partition"),
)  # fmt: skip

LAUNCH_FAILED = "launch failed requeued held"

# Slurm's reasons for a waiting job, in plain words
REASONS = {
    "Priority": "other jobs have a higher priority",
    "Resources": "no free node at present",
    "Dependency": "it waits for another job",
    "BeginTime": "it starts again after a short pause (it was requeued)",
    "PartitionConfig": "its partition has no node of this size: it will never start",
    "PartitionDown": "its partition is down",
    "PartitionNodeLimit": "its partition has too few nodes",
    "PartitionTimeLimit": "its time limit is above the partition's",
    "ReqNodeNotAvail": "the nodes it needs are down or reserved",
    "NodeDown": "the nodes it needs are down",
    "AssocGrpCPUMinutesLimit": "the project's compute time is used up",
    "AssocGrpBillingMinutes": "the project's compute time is used up",
    "AssocGrpGRES": "the project uses all the GPUs it is allowed",
    "QOSMaxJobsPerUserLimit": "you already run the maximum number of jobs",
    "JobHeldUser": "it is held by its owner: scontrol release",
    "JobHeldAdmin": "it is held by an administrator",
    LAUNCH_FAILED: "its node could not start it, so Slurm holds it: scontrol release",
    "JobArrayTaskLimit": "its array already runs the maximum number of tasks",
    "None": "it was just submitted",
}


@dataclass(frozen=True)
class Job:
    """A job as squeue shows it. `left`: seconds to its limit, None if unknown; `node`: "" while it waits."""

    id: str
    state: str
    restarts: int
    left: float | None
    node: str
    reason: str
    comment: str

    @property
    def running(self) -> bool:
        return self.state == "RUNNING"

    @property
    def alive(self) -> bool:
        return self.state not in ENDED and self.state != "COMPLETING"

    @property
    def failed_to_launch(self) -> bool:
        """Whether Slurm holds it for ever, because a node could not start it: its prolog failed, or after a break of
        the network the job that was requeued still ran there."""
        return self.reason == LAUNCH_FAILED

    def why(self) -> str:
        """Slurm's reason for waiting, in plain words."""
        return REASONS.get(self.reason.split(",")[0], self.reason)


class Slurm:
    """The commands in `directory`, else on PATH."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    def submit(self, script: Path) -> str:
        """Submit a job and return its id. Raises UsageError with Slurm's own words if Slurm refuses it."""
        return self._sbatch(script, "--parsable").strip().split(";")[0]

    def test(self, script: Path) -> None:
        """Submit nothing; raise UsageError with Slurm's own words if Slurm would refuse the job."""
        self._sbatch(script, "--test-only")

    def _sbatch(self, script: Path, option: str) -> str:
        try:
            return self.run("sbatch", option, str(script), once=True)
        except _Refused as error:
            text = error.text
            advice = next((do for pattern, do in REFUSALS if re.search(pattern, text, re.IGNORECASE)), "see the script")
            raise UsageError(f"Slurm refused the job {script.name}", text, advice) from error

    def jobs(self) -> list[Job]:
        """This user's jobs that have not ended. Raises SlurmError if Slurm does not answer."""
        return [parse_job(row) for row in self.read_queue(COLUMNS)]

    def read_queue(self, widths: Mapping[str, int], *options: str) -> list[dict[str, str]]:
        """This user's jobs as squeue lists them: {column: text} of each. `widths`: of the columns, by name."""
        columns = ",".join(f"{name}:{width}" for name, width in widths.items())
        table = self.run("squeue", "--noheader", f"--user={os.getuid()}", *options, f"--Format={columns}")
        return read_columns(table, widths)

    def cancel(self, ids: Sequence[str]) -> None:
        """Ask Slurm to end these jobs; a job that has already ended is not an error."""
        if ids:
            self.run("scancel", *ids, allow=r"Invalid job id|already completing")

    def requeue(self, id: str) -> None:
        self.run("scontrol", "requeue", id)

    def config(self) -> dict[str, str]:
        """`scontrol show config`: {"KillWait": "30 sec", ...}."""
        pairs = (line.split("=", 1) for line in self.run("scontrol", "show", "config").splitlines() if "=" in line)
        return {name.strip(): value.strip() for name, value in pairs}

    def run(
        self,
        command: str,
        *arguments: str,
        allow: str | None = None,
        once: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Standard output of one Slurm command.

        Raises SlurmError if the command does not exist or does not answer within 30 s, three times in a row, and
        _Refused with Slurm's words if Slurm refuses (`allow`: a pattern of refusals that are acceptable). `once`: do
        not retry a command that Slurm may have executed although its answer was lost. `environment`: more
        variables, which the proxy of a container does not pass on.
        """
        program = command if self.directory is None else str(self.directory / command)
        for attempt in range(TRIES):
            if attempt:
                sleep(2.0**attempt)  # a failover of slurmctld takes seconds
            try:
                code, output, complaint = _call([program, *arguments], environment)
            except FileNotFoundError as error:
                raise SlurmError(
                    f"{command} was not found",
                    "this machine has no Slurm",
                    "work on a login node of the site",
                ) from error
            except TimeoutError:
                text = f"no answer within {ANSWER_SECONDS:.0f} s"
                if once:
                    break
                continue
            text = (complaint.strip() or output.strip()).removeprefix(f"{command}: ").removeprefix("error: ")
            if code == 0 or (allow and re.search(allow, text)):
                return output
            if not re.search(r"[Uu]nable to contact|[Ss]ocket timed out|[Cc]onnection refused|try again", text):
                raise _Refused(command, text)
            if once and "timed out" in text:
                break
        raise SlurmError(f"Slurm does not answer ({command})", text, "try again in a minute; running jobs continue")


def _call(words: list[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command; in a container, run by the proxy of the job script.

    Raises TimeoutError after ANSWER_SECONDS, FileNotFoundError if the command does not exist.
    """
    if path := os.environ.get(PROXY):
        try:
            code, output, complaint = slurm_proxy.ask(path, words, ANSWER_SECONDS)
        except TimeoutError:
            raise
        except OSError as error:
            raise SlurmError(
                f"the Slurm proxy at {path} does not answer", str(error), "the job's output says why it ended"
            ) from error
        if code == slurm_proxy.ABSENT:
            raise FileNotFoundError(complaint)
        return code, output, complaint
    try:
        done = subprocess.run(
            words,
            env=clean_environment(os.environ) | dict(environment),
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    return done.returncode, done.stdout, done.stderr


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for Slurm's commands: without secrets, because sbatch passes all of it to Slurm, which stores it;
    without a format of times, which are parsed here; and without the variables of a job in which this process runs. A
    new job would inherit that one's binding to cores (SLURM_CPU_BIND), and its srun would end over two memory limits.
    """
    of_job = ("SLURM_", "SRUN_") if "SLURM_JOB_ID" in environment else ()
    return {
        name: value
        for name, value in environment.items()
        if name not in (*SECRETS, "SLURM_TIME_FORMAT") and (name in CONFIGURATION or not name.startswith(of_job))
    }


class _Refused(SlurmError):
    def __init__(self, command: str, text: str) -> None:
        super().__init__(f"{command} refused", text, f"see `{command} --help`")
        self.text = text


def read_columns(table: str, widths: Mapping[str, int]) -> list[dict[str, str]]:
    """{column: text} of each line of a fixed-width table."""
    rows = []
    for line in filter(str.strip, table.splitlines()):
        row, at = {}, 0
        for name, width in widths.items():
            row[name] = line[at : at + width].strip()
            at += width
        rows.append(row)
    return rows


def parse_job(row: Mapping[str, str]) -> Job:
    """The job in a row of squeue (see COLUMNS)."""
    return Job(
        id=row["JobID"],
        state=row["State"],
        restarts=int(row["RestartCnt"] or 0),
        left=parse_duration(row["TimeLeft"]),
        node=row["NodeList"],
        reason=row["Reason"].strip("()"),
        comment=row["Comment"],
    )


def parse_duration(text: str) -> float | None:
    """A duration of squeue, D-HH:MM:SS or MM:SS, in seconds; None for INVALID, UNLIMITED, NOT_SET."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
