"""One Ray node as a process group: its ports, temporary directory, resources and end."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from raylab.errors import SlurmError, UsageError
from raylab.scratch import Scratch

OBJECT_STORE_SHARE, OBJECT_STORE_MOST, OBJECT_STORE_LEAST = 0.1, 2 * 10**9, 80 * 10**6  # data is read from files
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


@dataclass(frozen=True)
class Allocation:
    """The resources that Slurm allocated to this job on this node."""

    cpus: int
    gpus: int
    memory: int  # bytes

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Allocation":
        """From the variables of a step; Ray itself would count the whole machine (ray#13607)."""
        cpus = int(environment.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
        per_node, per_cpu = environment.get("SLURM_MEM_PER_NODE"), environment.get("SLURM_MEM_PER_CPU")
        if per_node:
            memory = int(per_node) << 20
        elif per_cpu:
            memory = (int(per_cpu) << 20) * cpus
        else:
            memory = psutil.virtual_memory().total
        return cls(cpus, int(environment.get("SLURM_GPUS_ON_NODE") or 0), memory)

    def options(self, shared_memory: int) -> list[str]:
        """`ray start` options; `shared_memory`: bytes free in /dev/shm."""
        most = min(OBJECT_STORE_MOST, int(0.8 * shared_memory))
        store = max(OBJECT_STORE_LEAST, min(most, int(OBJECT_STORE_SHARE * self.memory)))
        return [
            f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}",
            f"--memory={max(0, self.memory - store)}", f"--object-store-memory={store}",
        ]  # fmt: skip


def address_of(interface: str | None) -> str:
    """The address at which other nodes reach this one. Raises SlurmError for an interface that does not exist."""
    here = {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if not here.get(interface):
            raise SlurmError(
                f"this node has no network interface '{interface}'",
                f"it has: {', '.join(name for name, found in here.items() if found)}",
                "correct `interface` of the site",
            )
        return str(here[interface][0])
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127.0.0.1"
    if not named.startswith("127."):
        return named
    others = [a for name, found in here.items() if name != "lo" for a in found if not a.startswith("127.")]
    return others[0] if others else named


def free_ports(host: str, count: int) -> list[int]:
    """`count` different ports that are free on `host` now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    except OSError as error:
        raise SlurmError(f"no free port on {host}", str(error), "use another node") from error
    finally:
        for probe in probes:
            probe.close()


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

    def start(self, python: str, ip: str, options: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start Ray with `options`, and with free ports wherever two Rays on a node would collide."""
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
        shm = shutil.disk_usage("/dev/shm").free
        command += [*options, *(Allocation.read(os.environ).options(shm) if "--num-cpus=0" not in options else [])]
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
