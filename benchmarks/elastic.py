"""Measure what changes of workers cost: raylab beside stock Ray Train, torchrun and torchft, on this machine, on CPUs.

    python benchmarks/elastic.py [--case kill hang growth start kills step] [--system raylab ray-train torchrun torchft]
        [--data DIR] [--rounds 5] [--seconds 600] [--every 30] [--torchft PYTHON] [--out FILE]

kill    kill -9 of one of two workers, rank 0 and the last rank in turn: seconds to the next new step (one that no
        group had reached before), steps repeated, and seconds until the replacement trains; raylab with five workers
hang    SIGSTOP instead, raylab only, with scaling.silence_seconds=5
growth  a node for two more workers joins a cluster of one: the longest time without a new step until 50 steps of three
        workers are done, beyond the median step of one; beside it the longest step before
start   from the command to the first step of two workers, on a local Ray of its own, on one that already runs, and on
        one whose workers wait (`raylab warm`)
kills   a seeded kill every 30 s for ten minutes: new steps per second over those of the undisturbed run, which is
        measured before and after; and the same weighted by the worker-seconds alive: a killed worker does not count
        from its kill until the replacement trains. A kill is left out while no worker of the newest group lives.
step    a step of two workers with in-place membership over the same step in a fixed group of torch.distributed, with
        raylab's waits for a collective and with plain ones; the variants alternate every 10 steps, ten times a round

All systems train the network of the shipped `ards` recipe at a constant learning rate on the same prepared data
(`--data`, else synthetic patients), one thread a worker, with a checkpoint every 50 steps. raylab is `raylab train` as
it is, with validation after every epoch and MLflow; the stock training (stock_training.py) has neither. Ray has the
same settings for both: raylab's own, with worker niceness 0 and without metrics and dashboard. Ray Train polls its
workers every 0.5 s instead of 2, may fail without limit, and considers a new size every second instead of every minute.
torchrun polls every 0.1 s and makes a store for each start: in the shared one, its default in torch 2.15, the gloo of a
second start finds the addresses of the first and fails several times. torchft has one replica group per worker and no
checkpoints (torchft_training.py). All packages have their bytecode compiled (`make setup`).

Every system's rank 0 appends a line per step, and a line with all pids per group, to a ledger. An observer here looks
at it every 10 ms: its clock is the only one. Only processes that descend from one started here are killed.
"""

import argparse
import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from jobs.common.session import ENVIRONMENT, LOCAL

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STOCK = ROOT / "benchmarks" / "stock_training.py"
TORCHFT = ROOT / "benchmarks" / "torchft_training.py"
SYSTEMS = ("raylab", "ray-train", "torchrun", "torchft")
WITHOUT_RAY = ("torchrun", "torchft")
STOCK_RAY = ("ray-train", "ray-train, rank 0", "ray-train, the last rank")  # what others are compared with
EVERY = 50  # steps between checkpoints
LOOK_SECONDS = 0.01  # between two looks at a ledger
PATIENCE = 300.0  # seconds that anything may take
SILENCE_SECONDS = 5.0  # of the case hang
SETTINGS = ("loop.epochs=100000", "schedule.kind=constant", f"loop.checkpoint_steps={EVERY}")


@dataclass(frozen=True)
class Line:
    """A line of a ledger, and the time (monotonic, seconds) at which it was seen."""

    at: float
    entry: dict[str, Any]


@dataclass(frozen=True)
class Recovery:
    """What followed a fault: `seconds` to the next new step, `repeated` steps before it, and `replaced`: seconds until
    the first step of a group of the full size."""

    seconds: float
    repeated: int
    replaced: float


def steps_of(lines: list[Line]) -> list[tuple[float, int]]:
    """(time, step) of the lines that are steps."""
    return [(line.at, line.entry["step"]) for line in lines if "step" in line.entry]


def new_steps(lines: list[Line]) -> list[tuple[float, int]]:
    """(time, step) of the steps that were not reached before."""
    found, reached = [], 0
    for at, step in steps_of(lines):
        if step > reached:
            found.append((at, step))
            reached = step
    return found


def recovery(lines: list[Line], fault_at: float, size: int) -> Recovery | None:
    """What followed a fault at `fault_at` in a group of `size`; None while the replacement does not train.

    The next new step counts only from a group that formed after the fault: one that was complete on a survivor before
    it, and noted later, is no sign of life.
    """
    formed = [i for i, line in enumerate(lines) if "workers" in line.entry and line.at > fault_at]
    full = [i for i in formed if lines[i].entry["workers"] == size]
    if not full or not (trains := steps_of(lines[full[0] :])):
        return None
    reached = max((step for _, step in steps_of(lines[: formed[0]])), default=0)
    after = steps_of(lines[formed[0] :])
    new = next((i for i, (_, step) in enumerate(after) if step > reached), None)
    return None if new is None else Recovery(after[new][0] - fault_at, new, trains[0][0] - fault_at)


def missing_seconds(lines: list[Line], faults: list[float], size: int, begin: float, end: float) -> float:
    """Worker-seconds between `begin` and `end` in which a killed worker was not replaced yet."""
    events: list[tuple[float, int]] = [(at, 1) for at in faults]
    waiting = False
    for line in lines:
        if "workers" in line.entry:
            waiting = line.entry["workers"] == size
        elif waiting:
            events.append((line.at, 0))  # the first step of a group of the full size: nobody is missing
            waiting = False
    total, missing, since = 0.0, 0, begin
    for at, killed in sorted(events):
        at = min(max(at, begin), end)
        total += missing * (at - since)
        missing, since = (min(size, missing + 1) if killed else 0), at
    return total + missing * (end - since)


class Training:
    """One training of a system, started here and observed from outside. A context: leaving it ends all its processes.

    `workers`: MIN:MAX. `cluster`: the environment of a running Ray; else the system starts what it needs.
    """

    def __init__(
        self,
        system: str,
        bench: "Bench",
        workers: str = "2:2",
        settings: tuple[str, ...] = (),
        cluster: dict[str, str] | None = None,
    ) -> None:
        self.name = f"{system}-{secrets.token_hex(4)}"
        self.folder = bench.folder / self.name
        self.folder.mkdir()
        self.size = int(workers.split(":")[1])
        environment = {**bench.environment, "RAY_TMPDIR": str(self.folder), **(cluster or {})}
        data, python = str(bench.data), sys.executable
        if system == "raylab":
            self.ledger = bench.home / "runs" / self.name / "ledger.jsonl"
            command = [str(BIN / "raylab"), "train", "ards", "--data", data, "--workers", workers, "--name", self.name]
            command += ["--set", *SETTINGS, *settings]
            environment.pop("RAY_TMPDIR")  # it makes its own directory
        else:
            self.ledger = self.folder / "ledger.jsonl"
            if system == "torchft":
                command = [str(bench.torchft), str(TORCHFT), data, str(self.folder), str(self.size)]
                environment |= {"PYTHONPATH": str(ROOT), "RUST_LOG": "error"}
            elif system == "torchrun":
                options = ("--standalone", f"--nproc-per-node={self.size}", "--max-restarts=1000")
                command = [python, "-m", "torch.distributed.run", *options, str(STOCK), data, str(self.folder)]
            else:
                command = [python, str(STOCK), data, str(self.folder), "--ray-train", workers]
        self.lines: list[Line] = []
        self.is_over = threading.Event()
        self.log = self.folder / "output.txt"
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = psutil.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
        self.cluster_pids = [int(pid) for pid in environment.get("PIDS_OF_RAY", "").split()]
        self.observer = threading.Thread(target=self._observe, daemon=True)
        self.observer.start()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.is_over.set()
        self.observer.join()
        if kind is not None and self.log.is_file():
            print(f"{self.name}: {self.log.read_text()[-3000:]}", file=sys.stderr)
        end_tree(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def group(self) -> dict[str, Any] | None:
        """The line of the newest group, if there is one."""
        return next((line.entry for line in reversed(self.lines) if "workers" in line.entry), None)

    def reached(self) -> int:
        """The highest step so far."""
        return max((step for _, step in steps_of(list(self.lines))), default=0)

    def is_full(self) -> bool:
        """Whether the newest group has the full size and has done a step."""
        last = next((i for i in reversed(range(len(self.lines))) if "workers" in self.lines[i].entry), None)
        if last is None or self.lines[last].entry["workers"] != self.size:
            return False
        return any("step" in line.entry for line in self.lines[last:])

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """What `condition` returns as soon as that is true; TimeoutError after PATIENCE."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := condition():
                return found
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended while waiting for {what}")
            time.sleep(LOOK_SECONDS)
        raise TimeoutError(f"{self.name}: waited {PATIENCE:g} s for {what}")

    def wait_for_steps(self, count: int) -> None:
        """Until `count` new steps are done."""
        target = self.reached() + count
        self.wait(lambda: self.reached() >= target, f"step {target}")

    def signal_rank(self, rank: int, number: signal.Signals) -> float | None:
        """Send a signal to a rank of the newest group; returns when, None if its process is gone."""
        group = self.group()
        assert group is not None
        pid = group["pids"][rank]
        roots = [self.process, *map(psutil.Process, self.cluster_pids)]
        if not any(pid == child.pid for root in roots for child in root.children(recursive=True)):
            return None
        at = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return at
        return None

    def _observe(self) -> None:
        position, rest = 0, b""
        while not self.is_over.wait(LOOK_SECONDS):
            if not self.ledger.is_file():
                continue
            with self.ledger.open("rb") as file:
                file.seek(position)
                content = file.read()
            at = time.monotonic()
            position += len(content)
            *complete, rest = (rest + content).split(b"\n")
            for text in complete:
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill has torn
                    self.lines.append(Line(at, json.loads(text)))


def end_tree(process: psutil.Popen, seconds: float = 10.0) -> None:
    """End a process that was started here, and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = process.children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs([process], seconds)
        for each in [*alive, *descendants]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs([*alive, *descendants], 10)


class Cluster:
    """A Ray of this machine with a head of `cpus` logical CPUs, and the nodes added to it."""

    def __init__(self, bench: "Bench", cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="el-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
        port = free_port()
        self.environment = {**bench.environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        del self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # it keeps a Ray to one node
        self.nodes: list[psutil.Popen] = []
        options = f"--head --port {port} --include-dashboard false --temp-dir {self.folder}/r"
        self.add_node(cpus, f"{options} --ray-client-server-port {free_port()}")
        self.wait_for_nodes(1)

    def add_node(self, cpus: int, options: str | None = None) -> None:
        options = options or f"--address {self.environment['RAY_ADDRESS']}"
        always = (
            f"--node-ip-address 127.0.0.1 --dashboard-agent-listen-port {free_port()} --disable-usage-stats --block"
        )
        command = f"{BIN}/ray start {options} {always} --num-cpus {cpus} --object-store-memory 100000000"
        with (self.folder / f"node-{len(self.nodes)}.txt").open("wb") as log:
            self.nodes.append(psutil.Popen(command.split(), env=self.environment, stdout=log, stderr=log))
        self.environment["PIDS_OF_RAY"] = " ".join(str(node.pid) for node in self.nodes)

    def wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            sockets = list(self.folder.glob("r/session_*/sockets/raylet*"))
            if len(sockets) >= count:
                return
            time.sleep(0.1)
        raise TimeoutError(f"Ray did not start: {(self.folder / 'node-0.txt').read_text()[-3000:]}")

    def close(self) -> None:
        for node in reversed(self.nodes):
            end_tree(node)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(bench: "Bench", cpus: int) -> Iterator[Cluster]:
    running = Cluster(bench, cpus)
    try:
        yield running
    finally:
        running.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Bench:
    """What all cases share: the prepared data, a raylab home, the processes' environment, and the results."""

    folder: Path
    data: Path
    systems: list[str]
    torchft: Path | None
    rounds: int
    seconds: float
    every: float
    seed: int
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: threads, loopback, and the same Ray settings for both systems that use it."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
        own = {
            "RAYLAB_HOME": str(self.home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        return {**kept, **ENVIRONMENT, **LOCAL, **own}

    def note(self, case: str, system: str, figures: dict[str, Any]) -> None:
        """Keep a result, with the load of the machine, and print it."""
        load = round(os.getloadavg()[0], 1)
        self.results.append({"case": case, "system": system, "load": load, **figures})
        print(f"{case:7} {system:28} {show(figures)}   load {load}", flush=True)


def show(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_show(value)}" for name, value in figures.items())


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_show, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summarise(recoveries: list[Recovery]) -> dict[str, Any]:
    """The median of each figure, and the seconds of each fault."""
    return {
        "seconds": statistics.median(one.seconds for one in recoveries),
        "repeated": max(one.repeated for one in recoveries),
        "replaced": statistics.median(one.replaced for one in recoveries),
        "each": [round(one.seconds, 3) for one in recoveries],
        "each_repeated": [one.repeated for one in recoveries],
    }


def measure_faults(
    bench: Bench, training: Training, ranks: list[int], number: signal.Signals = signal.SIGKILL
) -> dict[int, list[Recovery]]:
    """Send `number` to each of `ranks` in turn, `bench.rounds` times, at a seeded step between two checkpoints."""
    random = np.random.default_rng(bench.seed)
    found: dict[int, list[Recovery]] = {rank: [] for rank in ranks}
    for _ in range(bench.rounds):
        for rank in ranks:
            training.wait(training.is_full, "all workers")
            target = (training.reached() // EVERY + 2) * EVERY + int(random.integers(5, EVERY - 5))
            training.wait(lambda target=target: training.reached() >= target, f"step {target}")
            at = training.signal_rank(rank, number)
            assert at is not None, "the worker was gone before it was killed"
            after = training.wait(lambda at=at: recovery(list(training.lines), at, training.size), "the recovery")
            found[rank].append(after)
            print(f"  {training.name} rank {rank}: {after}", flush=True)
    return found


def rank_name(rank: int, size: int) -> str:
    return "the last rank" if rank == size - 1 else f"rank {rank}"


def case_kill(bench: Bench) -> None:
    for system in bench.systems:
        with Training(system, bench) as training:
            for rank, found in measure_faults(bench, training, [0, 1]).items():
                bench.note("kill", f"{system}, {rank_name(rank, 2)}", summarise(found))
    if "raylab" in bench.systems:
        with Training("raylab", bench, "5:5") as training:
            for rank, found in measure_faults(bench, training, [0, 2, 4]).items():
                bench.note("kill", f"raylab, 5 workers, {rank_name(rank, 5)}", summarise(found))


def case_hang(bench: Bench) -> None:
    if "raylab" in bench.systems:
        with Training("raylab", bench, settings=(f"scaling.silence_seconds={SILENCE_SECONDS:g}",)) as training:
            for rank, found in measure_faults(bench, training, [0, 1], signal.SIGSTOP).items():
                figures = {"limit": SILENCE_SECONDS, **summarise(found)}
                bench.note("hang", f"raylab, {rank_name(rank, 2)}", figures)


def case_growth(bench: Bench) -> None:
    for system in bench.systems:
        if system in WITHOUT_RAY:
            continue  # its number of workers on one node is fixed
        found = []
        for _ in range(bench.rounds):
            with cluster(bench, 1) as ray, Training(system, bench, "1:3", cluster=ray.environment) as training:
                training.wait_for_steps(4 * EVERY)
                before = gaps(new_steps(list(training.lines)))[EVERY:]
                at = time.monotonic()
                ray.add_node(2)
                training.wait(training.is_full, "three workers")
                training.wait_for_steps(EVERY)
                lines = list(training.lines)
                step = statistics.median(before)
                first = next(line.at for line in lines if line.entry.get("workers") == 3)
                figures = {
                    "longest": max(gaps([one for one in new_steps(lines) if one[0] >= at])) - step,
                    "longest_before": max(before) - step,
                    "step": step,
                    "joined": first - at,
                    "repeated": len(steps_of(lines)) - len(new_steps(lines)),
                }
                print(f"  {training.name}: {show(figures)}", flush=True)
                found.append(figures)
        medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
        most = {"repeated": max(one["repeated"] for one in found)}
        bench.note("growth", system, medians | most | {"each": [round(one["longest"], 3) for one in found]})


def gaps(times: list[tuple[float, int]]) -> list[float]:
    """Seconds between two steps that follow each other."""
    return [after - before for (before, _), (after, _) in itertools.pairwise(times)]


def case_start(bench: Bench) -> None:
    found: dict[str, list[float]] = {}
    for turn in range(bench.rounds):
        for system in bench.systems:
            with Training(system, bench) as training:
                training.wait(training.is_full, "the first step")
                found.setdefault(system, []).append(new_steps(training.lines)[0][0] - training.started)
                print(f"  {system}, round {turn}: {found[system][-1]:.1f} s", flush=True)
        with cluster(bench, 2) as ray:
            for system in bench.systems:
                if system in WITHOUT_RAY:
                    continue
                with Training(system, bench, cluster=ray.environment) as training:
                    training.wait(training.is_full, "the first step")
                    name = f"{system}, Ray runs already"
                    found.setdefault(name, []).append(new_steps(training.lines)[0][0] - training.started)
                    print(f"  {name}, round {turn}: {found[name][-1]:.1f} s", flush=True)
        if "raylab" in bench.systems:
            name = "raylab, workers wait"
            with waiting_workers(bench) as environment, Training("raylab", bench, cluster=environment) as training:
                training.wait(training.is_full, "the first step")
                found.setdefault(name, []).append(new_steps(training.lines)[0][0] - training.started)
                print(f"  {name}, round {turn}: {found[name][-1]:.1f} s", flush=True)
    for name, seconds in found.items():
        bench.note("start", name, {"seconds": statistics.median(seconds), "each": [round(one, 1) for one in seconds]})


@contextlib.contextmanager
def waiting_workers(bench: Bench) -> Iterator[dict[str, str]]:
    """`raylab warm`; yields the environment of commands that use it."""
    environment = bench.environment
    command = [str(BIN / "raylab"), "warm", "--workers", "2", "--quiet"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    try:
        yield {"RAY_AUTH_TOKEN": environment["RAY_AUTH_TOKEN"]}
    finally:
        subprocess.run(
            [*command[:2], "--stop", "--quiet"], env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )


def steps_per_second(training: Training, seconds: float) -> float:
    first, since = training.reached(), time.monotonic()
    time.sleep(seconds)
    return (training.reached() - first) / (time.monotonic() - since)


def case_kills(bench: Bench) -> None:
    calm = max(30.0, bench.seconds / 10)
    for system in bench.systems:
        random = np.random.default_rng(bench.seed)
        with Training(system, bench) as training:
            training.wait(training.is_full, "all workers")
            training.wait_for_steps(2 * EVERY)
            before = steps_per_second(training, calm)
            begin, first, faults, omitted = time.monotonic(), training.reached(), [], 0
            for number in range(int(bench.seconds // bench.every)):
                time.sleep(max(0.0, begin + number * bench.every - time.monotonic()))
                group = training.group()
                assert group is not None
                ranks = random.permutation(group["workers"])
                at = next(
                    (at for rank in ranks if (at := training.signal_rank(rank, signal.SIGKILL)) is not None), None
                )
                if at is None:
                    omitted += 1
                else:
                    faults.append(at)
                print(f"  {training.name}: kill {number + 1}, step {training.reached()}", flush=True)
            time.sleep(max(0.0, begin + bench.seconds - time.monotonic()))
            end, useful = time.monotonic(), training.reached() - first
            training.wait(training.is_full, "all workers")
            after = steps_per_second(training, calm)
            lines, size = list(training.lines), training.size
        pace, duration = (before + after) / 2, end - begin
        missing = missing_seconds(lines, faults, size, begin, end)
        recoveries = [one for at in faults if (one := recovery(lines, at, size)) is not None]
        in_window = [line for line in lines if begin <= line.at <= end]
        figures = {
            "weighted": useful / (pace * (duration - missing / size)),
            "plain": useful / (pace * duration),
            "steps_per_s": useful / duration,
            "undisturbed": [round(before, 2), round(after, 2)],
            "kills": len(faults),
            "omitted": omitted,
            "repeated": len(steps_of(in_window)) - useful,
            "replaced": statistics.median(one.replaced for one in recoveries),
            "replaced_at_most": max(one.replaced for one in recoveries),
            "next_step": statistics.median(one.seconds for one in recoveries),
            "seconds": duration,
        }
        bench.note("kills", system, figures)


def case_step(bench: Bench) -> None:
    """Two actors on a local Ray, each with all variants of the same training; a real membership is a third actor."""
    from jobs.common.session import ray_session

    os.environ["OMP_NUM_THREADS"] = "1"
    with ray_session(2, bench.folder / "ray.log"):
        import ray

        from raylab.distributed.membership import Membership

        membership = ray.remote(num_cpus=0)(Membership).remote(2, 60.0)
        actors = [ray.remote(num_cpus=1)(StepWorker).remote() for _ in range(2)]
        rounds = 10 * bench.rounds
        arguments = (str(bench.data), str(bench.folder / "store"), membership, rounds)
        found = ray.get([actor.measure.remote(rank, *arguments) for rank, actor in enumerate(actors)])[0]
    base = found.pop("membership")
    for name, seconds in found.items():
        ratio = statistics.median(b / a for a, b in zip(base, seconds, strict=True))
        medians = {"ms": statistics.median(base) * 1e3, "ms_fixed": statistics.median(seconds) * 1e3}
        bench.note("step", f"membership over {name}", {"pace": ratio, **medians, "rounds": rounds})


class StepWorker:
    """An actor with one rank of every variant of a step."""

    def measure(self, rank: int, data: str, store: str, membership: Any, rounds: int) -> dict[str, list[float]]:
        """Seconds per step of each variant, by round."""
        import copy

        import ray
        import torch.distributed as dist

        from raylab.config.overrides import override
        from raylab.distributed.member import Member
        from raylab.tasks import find_task
        from raylab.tasks.recipes import shipped_recipe
        from raylab.training.loop import Report, Training
        from raylab.training.peers import FixedPeers

        def with_plain_waits() -> FixedPeers:
            """A fixed group that waits as users of torch.distributed do: until a collective is complete, or fails."""
            peers = FixedPeers()
            group, leader = peers.form_group(-1)
            group._complete = lambda start, tensor: start().wait()
            peers.form_group = lambda position: (group, leader)
            return peers

        def call(method: str, *values: Any) -> Any:
            return ray.get(getattr(membership, method).remote(*values))

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
        # More epochs than any measurement, no checkpoint, no validation: `train_step` alone
        recipe = override(shipped_recipe("ards"), {"loop.epochs": 100_000, "loop.checkpoint_steps": None})
        task = find_task(recipe.task)
        train = task.load(Path(data), "train", recipe.data, None)
        val = task.load(Path(data), "val", recipe.data, train.spec)
        model = task.model(recipe, train.spec)
        peers = {
            "membership": Member(f"worker-{rank}", call, 60.0, {}),
            "a fixed group": FixedPeers(),
            "a fixed group, plain waits": with_plain_waits(),
        }
        trainings = {
            name: Training(recipe, task, copy.deepcopy(model), train, val, Report(), "cpu", False, peers=each)
            for name, each in peers.items()
        }
        for training in trainings.values():
            training.regroup()
        batches = len(train) // recipe.loop.global_batch_size  # full ones in an epoch
        seconds: dict[str, list[float]] = {name: [] for name in trainings}
        done = 0
        for turn in range(rounds + 1):
            for name in sorted(trainings, key=lambda name: (list(trainings).index(name) + turn) % len(trainings)):
                training = trainings[name]
                dist.barrier()
                since = time.perf_counter()
                for number in range(done, done + STEPS):
                    training.progress.step = number // batches * training.batches.per_epoch + number % batches
                    training.train_step()
                    training.fetch_all()
                if turn > 0:  # the first round warms up
                    seconds[name].append((time.perf_counter() - since) / STEPS)
            done += STEPS
        for training in trainings.values():
            training.inputs.close()
        return seconds


STEPS = 10  # of each variant in a round of the case step
CASES: dict[str, Callable[[Bench], None]] = {
    "kill": case_kill,
    "hang": case_hang,
    "growth": case_growth,
    "start": case_start,
    "kills": case_kills,
    "step": case_step,
}


def print_table(results: list[dict[str, Any]]) -> None:
    """The results, each beside its ratio to stock Ray Train, which starts a Ray of its own."""
    main_figure = {"kill": "seconds", "hang": "seconds", "growth": "longest", "start": "seconds", "kills": "weighted"}
    print(f"\n{'case':8}{'system':45}{'figure':>12}{'of Ray Train':>14}{'repeated':>10}{'load':>7}")
    for result in results:
        case, name = result["case"], main_figure.get(result["case"], "pace")
        stock = [r[name] for r in results if r["case"] == case and r["system"] in STOCK_RAY]
        ratio = f"{result[name] / statistics.median(stock):.3f}" if stock else ""
        figure = f"{result[name]:.3f}{'' if name in ('weighted', 'pace') else ' s'}"
        repeated = result.get("repeated", "")
        print(f"{case:8}{result['system']:45}{figure:>12}{ratio:>14}{repeated:>10}{result['load']:>7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--system", nargs="+", choices=SYSTEMS, help="(default: all; torchft only with --torchft)")
    parser.add_argument(
        "--torchft", type=Path, metavar="PYTHON", help="of an environment with torchft beside raylab's packages"
    )
    parser.add_argument("--data", type=Path, help="prepared directory of the task ards (default: synthetic patients)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600, help="duration of the case kills")
    parser.add_argument("--every", type=float, default=30, help="seconds between kills in the case kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    options = parser.parse_args()
    systems = options.system or [name for name in SYSTEMS if name != "torchft" or options.torchft]
    if "torchft" in systems and options.torchft is None:
        parser.error("--system torchft needs --torchft PYTHON")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here are ended
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    try:
        data = options.data and options.data.absolute()
        if data is None:
            from raylab.data.icu.prepare import prepare_icu

            data = folder / "ards"
            prepare_icu("ards", "synthetic", None, data, patients=2000)
        bench = Bench(
            folder, data, systems, options.torchft, options.rounds, options.seconds, options.every, options.seed
        )
        try:
            for case in options.case:
                CASES[case](bench)
        finally:
            print_table(bench.results)
            text = json.dumps(bench.results)
            print(text)
            if options.out:
                options.out.write_text(text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
