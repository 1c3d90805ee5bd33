"""The head's duties next to Ray: services, status, releasing old workers, requeueing itself."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from cluster import autoscaling
from cluster.bills import JobBook
from cluster.directory import Directory
from cluster.job_tag import JobTag
from cluster.node import gcs
from cluster.node.allocation import Allocation
from cluster.node.network import free_ports
from cluster.node.ray_process import RayProcess
from cluster.slurm import Slurm
from raylab.errors import RaylabError, SlurmError
from raylab.files import atomic_write, write_json

if TYPE_CHECKING:
    from cluster.node.agent import Signals

log = logging.getLogger("raylab.head")
STATUS_SECONDS = 3.0
JOBS_SECONDS = 15.0  # between two looks at what Slurm has given to this cluster
SERVICE_SECONDS = 10.0  # between two starts of a service that keeps ending
END_SECONDS = 60.0  # for Slurm to end this job after a requeue

# The autoscaler gives up on nodes that are queued for longer than this, but Slurm may keep them waiting for days.
# Queued jobs that nothing needs any more are cancelled.
AUTOSCALER = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": str(30 * 86400),
    "RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S": "120",
    "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S": "60",
    "AUTOSCALER_UPDATE_INTERVAL_S": "2",
}
PORT = "{port}"  # in a service's command: replaced by a free port, recorded in head.json
RESOURCE = "raylab_head"  # drivers of trials request it, because the head outlives workers


class Head:
    """The head of a cluster, on the node `ip`, as restart `generation` of Slurm job `job`.

    `allocation`: what Ray's tasks may use on this node; None: it has no CPUs for work.
    """

    def __init__(
        self,
        directory: Directory,
        ray: RayProcess,
        ip: str,
        signals: "Signals",
        job: str,
        generation: int,
        allocation: Allocation | None,
    ) -> None:
        self.directory, self.ray, self.ip, self.signals = directory, ray, ip, signals
        self.job, self.generation, self.allocation = job, generation, allocation
        self.spec, self.site = directory.spec, directory.site
        self.slurm = Slurm()
        self.book = JobBook(directory.path, self.spec, self.slurm)
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self.started: dict[str, float] = {}

    def serve(self) -> None:
        """Serve until Ray ends or Slurm signals the end of the job."""
        self._start()
        self._release()
        if self.generation:
            self._run("requeue", *self.spec.hooks.requeue)
        looked, noted = 0.0, float("-inf")
        try:
            while self.signals.received is None and self.ray.ended is None:
                self._keep_services()
                if time.monotonic() - looked > STATUS_SECONDS:
                    self._status()
                    looked = time.monotonic()
                if time.monotonic() - noted > JOBS_SECONDS:
                    self.book.note()
                    noted = time.monotonic()
                time.sleep(0.5)
            if self.ray.ended is not None:
                log.error("Ray's head has ended with %s", self.ray.ended)
            elif not self._down():
                self._drain()
        finally:
            for service in self.services.values():
                service.terminate()

    def _start(self) -> None:
        port, dashboard, client = free_ports(self.ip, 3)
        wanted = [name for name, command in self.spec.hooks.services.items() if PORT in command]
        self.ports = dict(zip(wanted, free_ports("127.0.0.1", len(wanted)), strict=True))
        self.address, self.dashboard = f"{self.ip}:{port}", f"http://127.0.0.1:{dashboard}"
        options = [
            "--head", f"--port={port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--resources={json.dumps({RESOURCE: 1000})}",
        ]  # fmt: skip
        environment = {"RAY_ADDRESS": self.address, "RAY_CLOUD_INSTANCE_ID": "head", "RAY_NODE_TYPE_NAME": "head"}
        if not self.spec.static:
            path = self.directory.path / "autoscaling.json"
            with atomic_write(path) as beside:
                beside.write_text(autoscaling.configuration(self.spec, self.directory.path, self.generation))
            options += [f"--autoscaling-config={path}"]
            # the most a run may request: requests are all or nothing (raylab/distributed/allocation.py)
            environment |= {**AUTOSCALER, "RAYLAB_CLUSTER_CAPACITY": json.dumps(autoscaling.capacity(self.spec))}
        self.environment = {**os.environ, **environment}
        self.ray.start(sys.executable, self.ip, options, environment, self.allocation)
        # the dashboard's agent accepts jobs and starts last
        for ip, at in ((self.ip, port), ("127.0.0.1", dashboard), (self.ip, self.ray.agent_port)):
            self.ray.wait_for(ip, at)
        facts = {
            "job": self.job, "generation": self.generation, "node": socket.gethostname(), "ip": self.ip,
            "address": self.address, "dashboard": self.dashboard, "ports": self.ports, "since": time.time(),
        }  # fmt: skip
        write_json(self.directory.path / "head.json", facts)
        log.info("head %d ready on %s", self.generation, self.address)

    def _release(self) -> None:
        """Cancel the workers of earlier heads of this cluster."""
        comments = [(job, JobTag.parse(job.comment)) for job in self._jobs()]
        old = [
            job.id
            for job, comment in comments
            if comment is not None and comment.cluster == self.spec.id
            and comment.kind == "worker" and comment.generation < self.generation
        ]  # fmt: skip
        if old:
            log.info("releasing workers of an earlier head: %s", " ".join(old))
            self.slurm.cancel(old)

    def _jobs(self) -> list[Any]:
        try:
            return self.slurm.jobs()
        except SlurmError as error:
            log.warning("%s", error.what)
            return []

    def _keep_services(self) -> None:
        for name, command in self.spec.hooks.services.items():
            command = [str(self.ports.get(name)) if word == PORT else word for word in command]
            running = self.services.get(name)
            if running is not None and running.poll() is None:
                continue
            if time.monotonic() - self.started.get(name, float("-inf")) > SERVICE_SECONDS:
                self.started[name] = time.monotonic()
                self.services[name] = self._spawn(name, command)

    def _spawn(self, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        with (self.directory.logs / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.spec.code,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _run(self, name: str, *command: str, seconds: float | None = None) -> None:
        """Run a hook: without `seconds` in the background, else wait that long for its end."""
        if not command:
            return
        process = self._spawn(name, list(command))
        if seconds is not None:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                log.warning("%s took more than %.0f s", name, seconds)

    def _status(self) -> None:
        try:
            status = gcs.status(self.address, self.dashboard)
        except Exception as error:  # Ray's store may be busy or ending: try again next time
            log.warning("no status: %s", error)
            return
        write_json(self.directory.path / "status.json", {**status, "generation": self.generation, "time": time.time()})

    def _drain(self) -> None:
        """Let every run commit a checkpoint within the remaining time."""
        received = self.signals.received
        log.info("%s: %.0f s left", received.name if received else "", self.signals.left)
        try:
            gcs.drain(self.address, self.signals.left, "the head ends", with_head=self.allocation is not None)
        except Exception as error:  # as in the workers' agent
            log.warning("Ray could not drain the workers: %s", error)
        self._run("drain", *self.spec.hooks.drain, seconds=self.signals.left)

    def _down(self) -> bool:
        return (self.directory.path / "down").exists()

    def requeue(self) -> int:
        """Ask Slurm to restart this job as the next generation, unless `down` was called or Slurm already ends it (for
        example to requeue it). Returns the exit code."""
        try:
            ours = next((job for job in self.slurm.jobs() if job.id == self.job), None)
            if self._down() or ours is None or not ours.running:
                return 0
            self.slurm.requeue(self.job)
        except RaylabError as error:
            log.info("not requeued: %s", error)
            return 0
        log.info("requeued")
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
        return 1
