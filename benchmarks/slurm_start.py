"""Measure the seconds from submission of a training to its first step on three nodes, of a raylab cluster and of
`ray symmetric-run`.

    make slurm-up; python benchmarks/slurm_start.py [--rounds 2]

Both run on the test cluster of this machine, alternating in each round, with the same recipe on three workers on three
nodes. For a raylab cluster: `up` until ready (once per cluster), then submission to first step without workers (nodes
are requested), then again with the workers still running. For symmetric-run: sbatch to first step; it starts Ray every
time.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import testbed
from raylab.training.ledger import read_ledger, steps

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ["--smoke", "--workers", "3", "--set", "loop.epochs=20"]


def first_step(home: Path, run: str, since: float) -> float:
    """Wait until the ledger has a step; returns the seconds since `since`."""
    while time.time() - since < 300:
        if steps(read_ledger(home / "runs" / run / "ledger.jsonl")):
            return time.time() - since
        time.sleep(0.2)
    raise TimeoutError(f"no step of {run} within 300 s")


def wait_for_end(home: Path, run: str) -> None:
    path = home / "runs" / run / "run.json"
    while json.loads(path.read_text())["status"] == "RUNNING":
        time.sleep(0.5)


def symmetric(bed: Path, home: Path, data: Path, run: str) -> float:
    """Run `ray symmetric-run` as a Slurm job on three nodes; returns the seconds from sbatch to the first step."""
    train = shlex.join([sys.executable, "-m", "jobs.cli", "train", "ards", "--data", str(data), "--name", run, *RECIPE])
    options = "--min-nodes 3 --num-cpus=1 --num-gpus=0 --object-store-memory=80000000 --temp-dir=$private/r"
    ray = f"{sys.executable} -m ray.scripts.scripts symmetric-run --address $HEAD:6379 {options}"
    script = home / "symmetric.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=3 --ntasks-per-node=1 --cpus-per-task=1 --mem=5000M\n"
        f"#SBATCH --output={home}/symmetric-%j.out\n"
        f"export RAYLAB_HOME={home} PYTHONPATH={ROOT} RAY_worker_niceness=0\n"
        "export HEAD=$(getent hosts $(hostname) | cut -d' ' -f1)\nexport RAY_ADDRESS=$HEAD:6379\n"
        f"export PATH={Path(sys.executable).parent}:$PATH\n"
        f"srun sh -c {shlex.quote(f'private=$(mktemp -d) && {ray} -- {train}')}\n"
    )
    since = time.time()
    job = subprocess.run([bed / "sbatch", "--parsable", script], check=True, capture_output=True, text=True).stdout
    took = first_step(home, run, since)
    wait_for_end(home, run)
    subprocess.run([bed / "scancel", job.strip()], check=True)
    time.sleep(10)  # until its nodes are free and idle
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    bed = testbed.bin_directory()
    if bed is None:
        sys.exit("the test cluster is not running: make slurm-up")
    home = Path(tempfile.mkdtemp(prefix="start-", dir=bed.parent / "shared"))
    environment = {**os.environ, "RAYLAB_HOME": str(home), "PATH": f"{bed}:{os.environ['PATH']}"}

    def raylab(*words: object) -> None:
        command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

    data = home / "ards"
    raylab("prepare", "ards", "--source", "synthetic", "--patients", 200, "--out", data)
    train = [sys.executable, "-m", "jobs.cli", "train", "ards", "--data", data, *RECIPE]
    took: dict[str, list[float]] = {"up": [], "no workers yet": [], "workers there": [], "symmetric-run": []}
    for turn in range(rounds):
        since = time.time()
        raylab("cluster", "up", "--site", "testbed", "--max", 3, "--wait")
        took["up"].append(time.time() - since)
        for name in ("no workers yet", "workers there"):
            run = f"{name.replace(' ', '-')}-{turn}"
            since = time.time()
            raylab("cluster", "submit", "--detach", "--", *train, "--name", run)
            took[name].append(first_step(home, run, since))
            wait_for_end(home, run)
        raylab("cluster", "down")
        took["symmetric-run"].append(symmetric(bed, home, data, f"symmetric-{turn}"))
    base = statistics.median(took["symmetric-run"])
    for name, seconds in took.items():
        each = " ".join(f"{value:6.1f}" for value in seconds)
        print(f"{name:16} {each} s   {statistics.median(seconds) / base:.2f} of symmetric-run")


if __name__ == "__main__":
    main()
