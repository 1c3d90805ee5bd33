"""The agent of one node, run by a Slurm step: starts Ray, handles Slurm's signals, drains, ends what it started.

    python -m cluster.node.agent DIRECTORY head|worker|static --generation N [--type T]

USR1 announces the time limit, TERM a preemption or a cancellation. Either way the node is drained within its remaining
time, so that runs commit a checkpoint and continue elsewhere, and it ends as soon as it is idle.
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

from cluster import image
from cluster.directory import Directory, versions
from cluster.node import gcs
from cluster.node.allocation import Allocation
from cluster.node.head import Head
from cluster.node.network import address_of, socket_variables
from cluster.node.ray_process import WORKER, RayProcess, StartError
from raylab.errors import RaylabError, SlurmError
from raylab.loopback import no_proxy

log = logging.getLogger("raylab.node")
HEAD_SECONDS = 180.0  # a worker waits this long for its head
MARGIN = 2.0  # seconds before the deadline at which a node ends by itself
POLL = 0.5
STARTS = 3  # attempts to start Ray, which gives its helper processes 15 s: too little on a busy node


class Signals:
    """Records Slurm's signals and the deadline that follows from them."""

    def __init__(self, lead_seconds: float, kill_seconds: float) -> None:
        self.seconds = {signal.SIGUSR1: lead_seconds, signal.SIGTERM: kill_seconds}
        self.received: signal.Signals | None = None
        self.deadline = float("inf")
        for number in self.seconds:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.deadline = min(self.deadline, time.monotonic() + self.seconds[self.received] - MARGIN)

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
    # `ray job submit -- python ...` must find the same Python
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.update(no_proxy(dict(os.environ)))
    job = os.environ["SLURM_JOB_ID"]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    leads = args.role == "head" or (args.role == "static" and os.environ["SLURM_PROCID"] == "0")
    try:
        spec = directory.spec
        signals = Signals(directory.site.lead_seconds, spec.kill_seconds)
        if spec.site.image is not None:
            image.check_lock(spec.site.image, image.own_lock(), Path(spec.code))
        compare(spec.versions)
        name = f"{job}.{restarts}.{os.environ['SLURM_PROCID']}"
        # a requeued head is a new generation: workers of earlier generations do not belong to it
        generation = restarts if leads or args.role == "static" else args.generation
        for attempt in range(STARTS):
            try:
                with RayNode(directory, name) as node:
                    if not leads:
                        return node.work(signals, generation, args.type, f"{job}.{restarts}")
                    allocation = read_allocation() if spec.head_type else None
                    if allocation is not None and not spec.static:
                        allocation = allocation.without(spec.site.head)
                    head = Head(directory, node.ray, node.ip, signals, job, generation, allocation)
                    head.serve()
                return head.requeue()
            except StartError as error:
                if signals.received is not None and not leads:
                    log.info("%s came while Ray started", signals.received.name)  # which says nothing of this node
                    return 0
                if attempt == STARTS - 1 or signals.received is not None:
                    raise
                log.warning("%s; trying again", error)
        return 1
    except RaylabError as error:
        log.error("%s", error)
        if args.directory.is_dir():
            directory.problem(f"{job}.{restarts}", f"{socket.gethostname()}: {error}")
        return error.exit_code


def compare(wanted: dict[str, str]) -> None:
    """Raise SlurmError if this node's Python or packages differ from those of the cluster."""
    here = versions()
    if different := [f"{name} {here[name]} instead of {wanted[name]}" for name in wanted if here[name] != wanted[name]]:
        raise SlurmError(
            f"this node has {', '.join(different)}",
            f"its Python is {sys.executable}; all nodes of a cluster need the same",
            "put the environment on shared storage, or correct `python`, `setup` or `image` of the site",
        )


def read_allocation() -> Allocation:
    """What Ray may use on this node; a step that cannot run on all CPUs of its job is logged."""
    allocation = Allocation.read(os.environ)
    if allocation.usable_cpus < allocation.allocated_cpus:
        log.warning(
            "Slurm allocated %d CPUs, but this step may run on %d only, and Ray counts these: raylab doctor checks why",
            allocation.allocated_cpus,
            allocation.usable_cpus,
        )
    return allocation


class RayNode:
    """Ray on this node while the context is open; at its end the logs are copied and everything else is removed."""

    def __init__(self, directory: Directory, name: str) -> None:
        self.directory, self.name = directory, name
        site = directory.site
        self.ip = address_of(site)
        os.environ.update(socket_variables(site, self.ip))
        self.ray = RayProcess(site.scratch, directory.logs / f"ray-{name}.out")

    def __enter__(self) -> "RayNode":
        return self

    def __exit__(self, *error: object) -> None:
        self.ray.keep_logs(self.directory.logs / f"ray-{self.name}")
        self.ray.end()

    def work(self, signals: Signals, generation: int, kind: str, instance: str) -> int:
        """Work for the head of `generation` until Slurm or the head ends this node; the exit code."""
        address = self.head(signals, generation)
        if address is None:
            return 0
        environment = {
            **WORKER,
            "RAY_ADDRESS": address,
            "RAY_CLOUD_INSTANCE_ID": instance,
            "RAY_NODE_TYPE_NAME": kind,
        }
        self.ray.start(sys.executable, self.ip, [f"--address={address}"], environment, read_allocation())
        self.ray.wait_for(self.ip, self.ray.agent_port)
        log.info("worker %s of %s on %s", instance, address, self.ip)
        while signals.received is None:
            if self.ray.ended is not None:
                log.info("Ray has ended with %s: the head is gone", self.ray.ended)
                return 0
            time.sleep(POLL)
        log.info("%s: %.0f s left", signals.received.name, signals.left)
        if (self.directory.path / "down").exists():  # the head ends too, and Ray would wait too long for its store
            return 0
        try:
            gcs.drain(address, signals.left, f"Slurm: {signals.received.name}", instance)
        except Exception as error:  # whatever Ray raises: ending in time matters more
            log.warning("Ray could not drain this node: %s", error)
        while signals.left > 0 and self.ray.ended is None and self.ray.busy():
            time.sleep(POLL)
        log.info("ending with %.0f s left", signals.left)
        return 0

    def head(self, signals: Signals, generation: int) -> str | None:
        """The address of the head of `generation`; None if it has been replaced or this node must end."""
        deadline = time.monotonic() + HEAD_SECONDS
        while time.monotonic() < deadline and signals.received is None:
            head = self.directory.read("head")
            if head is not None and head["generation"] == generation:
                return str(head["address"])
            if head is not None and head["generation"] > generation:
                log.info("head %d has been replaced by %d", generation, head["generation"])
                return None
            time.sleep(POLL)
        if signals.received is not None:
            return None
        raise SlurmError(
            f"no head within {HEAD_SECONDS:.0f} s", f"{self.directory.path}/head.json does not name it",
            "read the head's log; check that the directory is shared between nodes",
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
