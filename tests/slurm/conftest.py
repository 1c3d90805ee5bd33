"""One testbed (cluster/testbed) for all tests here, in a directory of its own: real Slurm, three nodes."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.testbed import control
from cluster.testbed.faults import Fault
from tests.verbs import MODULES, Verbs
from tests.wait import wait_for

ROOT = Path(__file__).parents[2]


class Bed:
    """A running testbed. `shared` is a directory that all nodes and this process see; `environment` is for processes
    of this host that call Slurm, such as raylab's command line."""

    def __init__(self, root: Path) -> None:
        self.root, self.shared = root, root / "shared"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{root}/bin:{os.environ['PATH']}",
            "RAYLAB_TESTBED": str(root),
        }

    def verb(self, *words: str) -> str:
        """Output of `python -m cluster.testbed WORDS`."""
        return self._output([sys.executable, "-m", "cluster.testbed", *words], cwd=ROOT)

    def run(self, command: str, on: str = "ctl") -> str:
        """Output of a shell command on a machine of the testbed, in its shared directory; it must succeed."""
        return self._output(control.command(self.root, ["bash", "-c", command], on), cwd=self.shared)

    def _output(self, words: list[str], cwd: Path) -> str:
        done = subprocess.run(
            words, cwd=cwd, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def has_cgroups(self) -> bool:
        """Where a host has none of version 1, Slurm tracks processes and memory less strictly."""
        return "cgroup" in self.run("scontrol show config | grep ProctrackType")

    def submit(self, options: str, script: str) -> str:
        """Id of a batch job. Its output comes to `output(id)`, of all its starts."""
        lines = f"#!/bin/bash\n{script}\n"
        words = [f"{self.root}/bin/sbatch", "--parsable", "--open-mode=append", f"--output={self.shared}/%j.out"]
        done = subprocess.run(
            [*words, *options.split()], input=lines, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait_until_idle(self) -> None:
        """Until no job is left and every node answers."""
        states = "sinfo --noheader --Node --format=%t || true"  # the controller may just start
        wait_for(lambda: set(self.run(states).split()) == {"idle"}, 60, "idle nodes")

    def resume_drained(self) -> None:
        """What an administrator does after a break of the network: Slurm drains a node that is to start a job while it
        still runs there from before."""
        for node in set(self.run("sinfo --noheader --Node --states=drain --format=%n").split()):
            self.run(f"scontrol update nodename={node} state=resume")

    def output(self, job: str) -> str:
        file = self.shared / f"{job}.out"
        return file.read_text() if file.exists() else ""

    def job_state(self, job: str) -> str:
        """RUNNING, PENDING, ...; of jobs that have ended too."""
        found = re.search(r"JobState=(\w+)", self.run(f"scontrol --oneliner show job {job}"))
        assert found
        return found[1]

    def wait_for_state(self, job: str, state: str, seconds: float = 30) -> None:
        wait_for(lambda: self.job_state(job) == state, seconds, f"job {job} to be {state}")

    def wait_for_output(self, job: str, text: str, seconds: float = 30) -> str:
        wait_for(lambda: text in self.output(job), seconds, f"'{text}' from job {job}")
        return self.output(job)

    def processes(self, node: str) -> str:
        """Command lines of all processes of a node."""
        return self.run("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '", node)


def make_testbed(*faults: Fault, accounts: bool = False) -> Iterator[Bed]:
    """A testbed, with faults of foreign sites or Slurm's accounting, and a process beside it that waits for our end, of
    whatever kind, and then removes it."""
    if why := control.obstacle():
        pytest.skip(f"no Slurm testbed: {why}")
    directory = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    root = directory / "bed"
    remove = 'cat; "$0" -m cluster.testbed down; rmdir "$1"'
    watcher = subprocess.Popen(
        ["sh", "-c", remove, sys.executable, str(directory)],
        stdin=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "RAYLAB_TESTBED": str(root)},
        start_new_session=True,
    )
    try:
        control.up(root, accounts, frozenset(faults))
        yield Bed(root)
    finally:
        watcher.communicate(timeout=60)
        assert watcher.returncode == 0 and not directory.exists()


@pytest.fixture(scope="session")
def verbs() -> Iterator[Verbs]:
    """raylab outside of the cluster. Without Ray, which reads a cluster's token when it is imported."""
    made = Verbs(os.environ, (*MODULES, "jobs.cluster", "jobs.sync"))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def testbed() -> Iterator[Bed]:
    yield from make_testbed()
