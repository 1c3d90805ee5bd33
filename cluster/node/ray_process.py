"""One Ray node as a process group: its ports, temporary directory and end."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from cluster.node.allocation import OBJECT_STORE_LEAST, Allocation
from cluster.node.network import free_ports
from raylab.errors import SlurmError, UsageError
from raylab.scratch import Scratch

START_SECONDS = 120.0

# A node that ends is noticed after 5 s, because its port refuses connections; one that does not answer, after half a
# minute: on a busy node an answer takes seconds, and a node that is given up by mistake restarts its run. On workers
# these settings detect the absence of the head.
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_initial_delay_ms": "15000",
}
WORKER = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}  # on the head this makes a successful run exit with code 1
COMMON = {
    "RAY_worker_niceness": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_BACKEND_LOG_LEVEL": "warning",
    # Ray's Prometheus servers require no token, so none is started: with port -1 Ray continues without that server
    "RAY_enable_metrics_collection": "false",
    "RAY_kill_worker_timeout_milliseconds": "1000",  # a worker that hangs is killed after so long, not after 5 s
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


class StartError(SlurmError):
    """Ray did not start."""


class RayProcess:
    """`ray start --block` in its own session. It is ended by killing its process group, never with `ray stop`."""

    def __init__(self, scratch: str, log: Path) -> None:
        try:
            self.scratch = Scratch([scratch])
        except UsageError as error:
            raise SlurmError(
                f"no directory for Ray can be created in {scratch}", error.why, "correct `scratch` of the site"
            ) from error
        self.temp = self.scratch.ray
        self.log = log
        self.agent_port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.started: list[psutil.Process] = []

    def start(
        self,
        python: str,
        ip: str,
        options: Sequence[str],
        environment: Mapping[str, str],
        allocation: Allocation | None,
    ) -> None:
        """Start Ray with `options`, and with free ports wherever two Rays on a node would collide.

        `allocation`: what Ray's tasks may use; None: no tasks run on this node.
        """
        ports = free_ports(ip, 6)
        self.agent_port = ports[4]
        names = (
            "node-manager-port", "object-manager-port", "metrics-export-port", "runtime-env-agent-port",
            "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
        )  # fmt: skip
        command = [python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [
            f"--node-ip-address={ip}",
            "--include-log-monitor=false",
            "--min-worker-port=0",
            "--max-worker-port=0",
        ]
        command += [f"--temp-dir={self.temp}", *(f"--{name}={port}" for name, port in zip(names, ports, strict=True))]
        if allocation is None:
            resources = ["--num-cpus=0", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_LEAST}"]
        else:
            resources = allocation.options(shutil.disk_usage("/dev/shm").free)
        command += [*resources, *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **HEALTH,
                    **COMMON,
                    "TMPDIR": str(self.scratch.path),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.scratch.path,
                pass_fds=[self.scratch.lock],  # held by Ray itself, so that no other agent removes the directory in use
            )

    def wait_for(self, ip: str, port: int) -> None:
        """Wait until Ray listens there. Raises StartError if it ends first, or does not listen within START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.ended is None:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((ip, port)) == 0:
                    return
            time.sleep(0.2)
        how = f"it ended with {self.ended}" if self.ended is not None else f"nothing answers at {ip}:{port}"
        raise StartError("Ray did not start on this node", how, f"read {self.log}")

    @property
    def ended(self) -> int | None:
        """Ray's exit code, None while it runs."""
        return None if self.process is None else self.process.poll()

    def busy(self) -> bool:
        """Whether a Ray worker process here is busy; the title of an idle one is ray::IDLE."""
        for process in self._family():
            try:
                title = (process.cmdline() or [""])[0]
            except psutil.Error:
                continue
            if title.startswith("ray::") and not title.startswith("ray::IDLE"):
                return True
        return False

    def end(self) -> None:
        """Kill the process group and its descendants, and remove the temporary directory."""
        family = self._family()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(family, timeout=5)
        self.scratch.close()

    def keep_logs(self, directory: Path) -> None:
        """Copy the newest of Ray's log files to `directory`."""
        self.scratch.keep_logs(directory)

    def _family(self) -> list[psutil.Process]:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(psutil.Error):
                self.started = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in self.started if process.is_running()]
