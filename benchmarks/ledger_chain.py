"""What the hash chain of the ledger costs: the CPU time in it, as a share of that of training.

    python benchmarks/ledger_chain.py TASK DATA [PATH=VALUE ...]

It trains the recipe of a task, with the recipe fields given, in this process, without MLflow. Hashes of states
are computed in the thread that writes checkpoints, beside the steps; here their time counts in full.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylab.config.assignments import parse_assignments
from raylab.config.overrides import override
from raylab.tasks.recipes import shipped_recipe
from raylab.training import checkpoint, ledger
from raylab.training.run import execute, load_samples

spent = {"render_line": [0, 0.0], "hash_state": [0, 0.0]}


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which adds its calls and seconds to `spent`."""

    def call(*arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*arguments)
        finally:
            spent[function.__name__][0] += 1
            spent[function.__name__][1] += time.thread_time() - began

    return call


def main(task: str, data: Path, settings: list[str]) -> None:
    recipe = override(shipped_recipe(task), parse_assignments(settings))
    ledger.render_line = timed(ledger.render_line)
    checkpoint.hash_state = timed(checkpoint.hash_state)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        result = execute(recipe, *load_samples(recipe, data), Path(scratch), lambda rows: 0)
        seconds = time.process_time() - began
        kept = checkpoint.list_checkpoints(Path(scratch) / "checkpoints")
        size = sum(path.stat().st_size for path in kept[0].iterdir())
        lines = (Path(scratch) / ledger.FILE).stat().st_size
    print(f"{task}: {result['steps']} steps in {seconds:.1f} s of CPU time")
    print(f"  a checkpoint {size / 1e6:.2f} MB, the ledger {lines:,} bytes")
    for name, (calls, total) in spent.items():
        print(f"  {name}: {calls} calls, {1e6 * total / max(calls, 1):,.0f} us each, {100 * total / seconds:.3f}%")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
