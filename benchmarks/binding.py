"""Measure samples/s of training on a node where Slurm binds steps to one core, with a plain step and with raylab's.

    python -m cluster.testbed up --fault one-core-affinity; python benchmarks/binding.py [--rounds 5]

Each round submits two jobs of all CPUs of a node: one whose srun does not ask for CPUs, as raylab's did, and one with
the script of today. A job trains the shipped ards recipe in as many processes as it has CPUs, which is what Ray does
with workers of one CPU. The script prints the CPUs that a step may use, medians of samples/s, and of their ratio.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import jobscript, testbed
from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 5.0  # of a measurement


def train(data: Path, out: Path) -> None:
    """Train in one process for each CPU of the job, and write {"cpus": that the step may use, "samples_per_s"}."""
    import torch
    from step import raylab_step

    from raylab.config.overrides import override
    from raylab.tasks import find_task
    from raylab.tasks.recipes import shipped_recipe

    torch.set_num_threads(1)
    recipe = override(shipped_recipe("ards"), {"loop.checkpoint_steps": None, "loop.epochs": 100_000})
    task = find_task("ards")
    train = task.load(data, "train", recipe.data, None)
    val = task.load(data, "val", recipe.data, train.spec)
    count = int(os.environ["SLURM_JOB_CPUS_PER_NODE"])
    barrier, results = multiprocessing.Barrier(count), multiprocessing.Queue()

    def measure() -> None:
        step = raylab_step(recipe, train, val, task.model(recipe, train.spec))
        step(0)
        barrier.wait()
        began, steps = time.monotonic(), 0
        while time.monotonic() - began < SECONDS:
            steps += 1
            step(steps)
        results.put(steps * recipe.loop.global_batch_size / (time.monotonic() - began))

    processes = [multiprocessing.get_context("fork").Process(target=measure) for _ in range(count)]
    for process in processes:
        process.start()
    samples_per_s = sum(results.get() for _ in processes)
    out.write_text(json.dumps({"cpus": len(os.sched_getaffinity(0)), "samples_per_s": samples_per_s}))


def without_cpus(script: str) -> str:
    """The script of a job whose step does not ask for the job's CPUs."""
    lines = [line for line in script.splitlines() if line not in jobscript.CPU_LINES]
    return "\n".join(lines).replace(' --cpus-per-task="$SRUN_CPUS_PER_TASK"', "") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="prepared ards data that the nodes see (default: 2,000 patients)")
    parser.add_argument("--train", type=Path, nargs=2, help=argparse.SUPPRESS)  # in a step: data and result
    options = parser.parse_args()
    if options.train:
        train(*options.train)
        return
    bed = testbed.bin_directory()
    if bed is None:
        sys.exit("the test cluster is not running: python -m cluster.testbed up --fault one-core-affinity")
    home = Path(tempfile.mkdtemp(prefix="binding-", dir=bed.parent / "shared"))
    data = options.data or home / "ards"
    if options.data is None:
        prepare = ["prepare", "ards", "--source", "synthetic", "--patients", "2000", "--out", str(data)]
        subprocess.run([sys.executable, "-m", "jobs.cli", *prepare], cwd=ROOT, check=True, capture_output=True)
    cpus = len(os.sched_getaffinity(0))
    node = NodeType(cpus=cpus, memory_mb=4000)
    site = Site(name="testbed", nodes={"cpu": node})
    command = [sys.executable, str(Path(__file__).resolve()), "--train", str(data), str(home / "result.json")]
    tag = JobTag("binding", 0, "worker", "cpu")
    today = jobscript.script(site, node, tag, "binding", "00:05:00", home, {"PYTHONPATH": str(ROOT)}, command)
    scripts = {"plain srun": without_cpus(today), "all CPUs of the job": today}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}
    for _ in range(options.rounds):
        for name, text in scripts.items():
            (home / "job.sbatch").write_text(text)
            subprocess.run([bed / "sbatch", "--wait", home / "job.sbatch"], check=True, capture_output=True)
            found[name].append(json.loads((home / "result.json").read_text()))
            (home / "result.json").unlink()
            print(f"{name}: {found[name][-1]['samples_per_s']:,.0f} samples/s", file=sys.stderr, flush=True)
    plain = [one["samples_per_s"] for one in found["plain srun"]]
    for name, results in found.items():
        pace = [one["samples_per_s"] for one in results]
        ratio = statistics.median(b / a for a, b in zip(plain, pace, strict=True))
        used = ", ".join(f"{count:.0f}" for count in sorted({one["cpus"] for one in results}))
        print(f"{name:20} {used} of {cpus} CPUs  {statistics.median(pace):8,.0f} samples/s   {ratio:.2f}")


if __name__ == "__main__":
    main()
