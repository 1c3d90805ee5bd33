"""The agent of one node, which a Slurm step runs: starts Ray, hears Slurm's signals, drains, ends what it started.

    python -m cluster.node.agent DIRECTORY head|worker|static --generation N [--type T]

USR1 comes ahead of the time limit, TERM at a preemption or a cancellation. Either way the node is drained with the
time that it truly has, so that runs commit a checkpoint and move away, and it ends as soon as it has nothing to do.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from cluster.directory import Directory, versions
from cluster.node import gcs
from cluster.node.head import Head
from cluster.node.ray_process import WORKER, RayProcess, StartError, address_of
from raylab.errors import RaylabError, SlurmError
from raylab.loopback import no_proxy

log = logging.getLogger("raylab.node")
HEAD_SECONDS = 180.0  # a worker waits this long for its head
MARGIN = 2.0  # seconds before the true deadline at which a node ends by itself
POLL = 0.5
STARTS = 3  # of Ray, which gives its own helpers 15 s: on a busy node they may need another go


class Signals:
    """Notes Slurm's signals. `leave`: seconds that are left, once one has come."""

    def __init__(self, lead_seconds: float, kill_seconds: float) -> None:
        self.seconds = {signal.SIGUSR1: lead_seconds, signal.SIGTERM: kill_seconds}
        self.came: signal.Signals | None = None
        self.deadline = float("inf")
        for number in self.seconds:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(number)
        self.deadline = min(self.deadline, time.monotonic() + self.seconds[self.came] - MARGIN)

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.node.agent")
    parser.add_argument("directory", type=Path)
    parser.add_argument("role", choices=("head", "worker", "static"))
    parser.add_argument("--generation", type=int, required=True)
    parser.add_argument("--type", default="")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    directory = Directory(args.directory)
    # what runs here shall find the same Python as we: `ray job submit -- python ...`
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.update(no_proxy(dict(os.environ)))
    job = os.environ["SLURM_JOB_ID"]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    leads = args.role == "head" or (args.role == "static" and os.environ["SLURM_PROCID"] == "0")
    try:
        spec = directory.spec
        signals = Signals(directory.site.lead_seconds, spec.kill_seconds)
        compare(spec.versions)
        name = f"{job}.{restarts}.{os.environ['SLURM_PROCID']}"
        # a requeued head is a new generation: the workers of the one before are not its own
        generation = restarts if leads or args.role == "static" else args.generation
        for attempt in range(STARTS):
            try:
                with RayNode(directory, name) as node:
                    if not leads:
                        return node.work(signals, generation, args.type, f"{job}.{restarts}")
                    head = Head(directory, node.ray, node.ip, signals, job, generation, args.role == "static")
                    head.serve()
                return head.requeue()
            except StartError as error:
                if attempt == STARTS - 1 or signals.came is not None:
                    raise
                log.warning("%s; once more", error)
        return 1
    except RaylabError as error:
        log.error("%s", error)
        if args.directory.is_dir():
            directory.problem(f"{job}.{restarts}", f"{socket.gethostname()}: {error}")
        return error.exit_code


def compare(wanted: dict[str, str]) -> None:
    """Raise SlurmError where this node's Python or packages are not those of the cluster."""
    here = versions()
    if different := [f"{name} {here[name]} instead of {wanted[name]}" for name in wanted if here[name] != wanted[name]]:
        raise SlurmError(
            f"this node has {', '.join(different)}",
            f"its Python is {sys.executable}; all nodes of a cluster need the same",
            "put the environment on shared storage, or correct `python`, `setup` or `image` of the site",
        )


class RayNode:
    """Ray on this node while open; at the end its logs are in the cluster's directory and nothing of it is left."""

    def __init__(self, directory: Directory, name: str) -> None:
        self.directory, self.name = directory, name
        site = directory.site
        self.ip = address_of(site.interface)
        self.ray = RayProcess(site.scratch, directory.logs / f"ray-{name}.out")

    def __enter__(self) -> "RayNode":
        return self

    def __exit__(self, *error: object) -> None:
        self.ray.keep_logs(self.directory.logs / f"ray-{self.name}")
        self.ray.end()

    def work(self, signals: Signals, generation: int, kind: str, instance: str) -> int:
        """Be a worker of the head of `generation` until Slurm or the head wants no more; the exit code."""
        address = self.head(signals, generation)
        if address is None:
            return 0
        environment = {
            **WORKER,
            "RAY_ADDRESS": address,
            "RAY_CLOUD_INSTANCE_ID": instance,
            "RAY_NODE_TYPE_NAME": kind,
        }
        self.ray.start(sys.executable, self.ip, [f"--address={address}"], environment)
        self.ray.wait_for(self.ip, self.ray.agent_port)
        log.info("worker %s of %s on %s", instance, address, self.ip)
        while signals.came is None:
            if self.ray.ended is not None:
                log.info("Ray has ended with %s: the head is gone", self.ray.ended)
                return 0
            time.sleep(POLL)
        log.info("%s: %.0f s left", signals.came.name, signals.left)
        if (self.directory.path / "down").exists():  # its head goes too: a store that is gone is waited for too long
            return 0
        try:
            gcs.drain(address, signals.left, f"Slurm: {signals.came.name}", instance)
        except Exception as error:  # whatever Ray raises: leaving in time matters more
            log.warning("Ray could not be told: %s", error)
        while signals.left > 0 and self.ray.ended is None and self.ray.busy():
            time.sleep(POLL)
        log.info("leaving with %.0f s left", signals.left)
        return 0

    def head(self, signals: Signals, generation: int) -> str | None:
        """The address of the head of `generation`; None when it has been replaced or this node is to leave."""
        deadline = time.monotonic() + HEAD_SECONDS
        while time.monotonic() < deadline and signals.came is None:
            found = self.directory.read("head")
            if found is not None and found["generation"] == generation:
                return str(found["address"])
            if found is not None and found["generation"] > generation:
                log.info("head %d has been replaced by %d", generation, found["generation"])
                return None
            time.sleep(POLL)
        if signals.came is not None:
            return None
        raise SlurmError(
            f"no head within {HEAD_SECONDS:.0f} s", f"{self.directory.path}/head.json does not name it",
            "look at the head's log; is the directory shared between nodes?",
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
