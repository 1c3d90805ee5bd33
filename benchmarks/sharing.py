"""Three elastic runs on one Ray of three nodes with two CPUs each: how many workers each has over time.

    python benchmarks/sharing.py

A run comes, another, an urgent one (`--priority 3`), then a node leaves, the urgent run ends, and the node comes back.
After each event it waits until every run has the workers that `allocate` gives it, as the ledgers say, and prints a row
of the table in docs/slurm.md: the seconds since the event, and the workers of each run. At the end it prints the steps
that were repeated.
"""

import shutil
import tempfile
import time
from pathlib import Path

import psutil
from elastic import BIN, PATIENCE, Bench, Cluster, end_tree

from raylab.data.icu.prepare import prepare_icu
from raylab.distributed.allocation import Claim, allocate
from raylab.files import read_lines
from raylab.training.ledger import summarise_ledger

CPUS = 2  # of a node
RUNS = {"first": 1.0, "second": 1.0, "urgent": 3.0}  # their priorities
SETTINGS = ("loop.epochs=100000", "schedule.kind=constant", "loop.shards=6", "loop.checkpoint_steps=100000")


class Sharing:
    """The runs that are under way, and the nodes on which they are."""

    def __init__(self, bench: Bench, ray: Cluster) -> None:
        self.bench, self.ray, self.nodes = bench, ray, 3
        self.trainings: dict[str, psutil.Popen] = {}

    def begin(self, name: str) -> None:
        command = [f"{BIN}/raylab", "train", "ards", "--data", str(self.bench.data), "--smoke", "--name", name]
        command += ["--workers", "1:6", "--priority", str(RUNS[name]), "--set", *SETTINGS]
        with (self.bench.folder / f"{name}.txt").open("wb") as log:
            self.trainings[name] = psutil.Popen(command, env=self.ray.environment, stdout=log, stderr=log)

    def end(self, name: str) -> None:
        end_tree(self.trainings.pop(name), 60)

    def workers(self, name: str) -> int:
        groups = [line["workers"] for line in read_lines(self.ledger(name)) if "workers" in line]
        return groups[-1] if groups and name in self.trainings else 0

    def ledger(self, name: str) -> Path:
        return self.bench.home / "runs" / name / "ledger.jsonl"

    def tell(self, event: str) -> None:
        """Wait for the shares of the runs, and print them."""
        claims = [Claim(1, 6, {"CPU": 1}, {}, RUNS[name]) for name in self.trainings]
        places = allocate(claims, {f"node {number}": {"CPU": CPUS} for number in range(self.nodes)})
        shares = {name: own.total() for name, own in zip(self.trainings, places, strict=True)}
        began = time.monotonic()
        while (now := {name: self.workers(name) for name in self.trainings}) != shares:
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError(f"after '{event}' the runs have {now}, not {shares}; see {self.bench.folder}")
            time.sleep(0.1)
        cells = [str(now.get(name, "")) for name in RUNS]
        print(f"| {event} | {' | '.join(cells)} | {time.monotonic() - began:.0f} s |", flush=True)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sharing-"))
    prepare_icu("ards", "synthetic", None, folder / "ards", patients=200)
    bench = Bench(folder, folder / "ards", [], None, 0, 0, 0, 0)
    ray = Cluster(bench, 0)
    sharing = Sharing(bench, ray)
    try:
        for _ in range(3):
            ray.add_node(CPUS)
        ray.wait_for_nodes(4)
        print(f"| event | {' | '.join(RUNS)} | after |\n|---|---|---|---|---|")
        for name in RUNS:
            sharing.begin(name)
            sharing.tell(f"`{name}` starts with priority {RUNS[name]:g}")
        sharing.nodes -= 1
        ray.nodes.pop().terminate()  # warned ahead, as by Slurm
        sharing.tell("a node leaves")
        sharing.end("urgent")
        sharing.tell("`urgent` ends")
        sharing.nodes += 1
        ray.add_node(CPUS)
        sharing.tell("a node comes")
        for name in list(sharing.trainings):
            sharing.end(name)
        repeated = {name: summarise_ledger(sharing.ledger(name))["steps_repeated"] for name in RUNS}
        print(f"steps repeated: {repeated}")
    finally:
        for name in list(sharing.trainings):
            sharing.end(name)
        ray.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
