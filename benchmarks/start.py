"""Time from a command to what its user waits for, and the memory of a trial's process.

    python benchmarks/start.py [--data D] [--rounds 3]

In each round, on a terminal of its own: `raylab train ards --workers 0` to its first line and to its first step, and
`raylab tune ards` to its table. For each, seconds of wall time, and of CPU time of the command's own process: on idle
cores the wall time comes down to the CPU time and what the command waits for. Then the memory of the process of the
trial, while it trains: resident, and without the pages that it shares with others through files (torch's libraries).
`floor` is a process that imports torch and nothing else.
"""

import argparse
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil

from raylab.data.icu.prepare import prepare_icu

RAYLAB = Path(sys.executable).parent / "raylab"
TIMEOUT = 300.0
POLL = 0.02
FLOOR = "import torch, time; print('ready', flush=True); time.sleep(600)"
LONG = ("--smoke", "--set", "loop.epochs=100000", "loop.checkpoint_steps=none")


class Command:
    """A command on a terminal, and the time since it began."""

    def __init__(self, *words: str, home: Path) -> None:
        self.master, slave = pty.openpty()
        self.began = time.monotonic()
        environment = {**os.environ, "RAYLAB_HOME": str(home), "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.said = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.master, 1 << 16)
            except OSError:  # the command has ended
                return
            self.said += part

    def seconds_until(self, holds: Callable[[], bool]) -> tuple[float, float]:
        """(wall, CPU) seconds until something holds."""
        while not holds():
            if self.process.poll() is not None or time.monotonic() - self.began > TIMEOUT:
                raise SystemExit(f"the command ended or took too long: {self.said.decode(errors='replace')}")
            time.sleep(POLL)
        spent = psutil.Process(self.process.pid).cpu_times()
        return time.monotonic() - self.began, spent.user + spent.system

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT)
        os.close(self.master)


def find_step(home: Path) -> bool:
    return any('"step"' in file.read_text() for file in home.glob("runs/**/ledger.jsonl"))


def memory(process: psutil.Process) -> tuple[float, float]:
    """(resident, private) MB: with and without pages of files."""
    found = process.memory_full_info()
    return found.rss / 1e6, (found.rss - found.shared) / 1e6


def find_trial(command: Command) -> psutil.Process | None:
    """The process of the trial below a search."""
    for child in psutil.Process(command.process.pid).children(recursive=True):
        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::") and child.memory_info().rss > 300e6:
            return child
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="prepared directory of the task ards (default: synthetic patients)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}

    def note(what: str, values: tuple[float, float]) -> None:
        found.setdefault(what, []).append(values)

    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data = Path(folder) / "ards"
            prepare_icu("ards", "synthetic", None, data, patients=400)
        for number in range(options.rounds):
            home = Path(folder) / f"home-{number}"
            home.mkdir(mode=0o700)
            with Command(sys.executable, "-c", FLOOR, home=home) as floor:
                note("floor: import torch", floor.seconds_until(lambda: b"ready" in floor.said))
                note("MB, floor", memory(psutil.Process(floor.process.pid)))
            words = ("--data", str(data.absolute()), *LONG)
            with Command(str(RAYLAB), "train", "ards", "--workers", "0", *words, home=home) as train:
                note("train: first line", train.seconds_until(lambda: b"ards" in train.said))
                note("train: first step", train.seconds_until(lambda: find_step(home)))  # noqa: B023
            home = Path(folder) / f"search-{number}"
            home.mkdir(mode=0o700)
            with Command(str(RAYLAB), "tune", "ards", "--trials", "1", *words, home=home) as tune:
                note("tune: table", tune.seconds_until(lambda: b"trials ended" in tune.said))
                note("tune: first step", tune.seconds_until(lambda: find_step(home)))  # noqa: B023
                if (trial := find_trial(tune)) is not None:
                    note("MB, trial", memory(trial))
            load = os.getloadavg()[0]
            print(f"round {number + 1}, load {load:.1f}: " + "; ".join(
                f"{what} {values[-1][0]:.1f}, {values[-1][1]:.1f}" for what, values in found.items()))  # fmt: skip
    print(f"\n{'':22} {'wall s / resident MB':>22} {'CPU s / private MB':>22}   medians of {options.rounds}")
    for what, values in found.items():
        print(f"{what:22} {median(v for v, _ in values):22.2f} {median(v for _, v in values):22.2f}")


if __name__ == "__main__":
    main()
