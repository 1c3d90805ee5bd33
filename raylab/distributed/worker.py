"""The function that each worker of a run executes. Only worker processes import this module, and torch with it."""

from pathlib import Path
from typing import Any

import ray.train

from raylab.distributed.train import SampleNode
from raylab.errors import RaylabError
from raylab.files import write_json
from raylab.tasks.recipes import parse_recipe
from raylab.training.process_group import ProcessGroup
from raylab.training.progress import Metrics
from raylab.training.run import AttemptHandedOver, execute


def worker(arguments: dict[str, Any]) -> None:
    """Execute the run on this rank. A RaylabError, which all ranks raise together, ends the run without a restart."""
    directory = Path(arguments["directory"])
    parent = arguments["parent"]
    try:
        execute(
            parse_recipe(arguments["recipe"]),
            Path(arguments["data"]),
            directory,
            lambda rows: send(rows, Path(arguments["resize_note"]), arguments["sample_node"]),
            None if parent is None else Path(parent),
        )
    except AttemptHandedOver:
        return
    except RaylabError as error:
        if ray.train.get_context().get_world_rank() == 0:
            write_json(directory / "failure.json", {"kind": type(error).__name__, "args": error.args})


def send(rows: list[Metrics], resize_note: Path, sample_node: SampleNode) -> str | None:
    """Report rows and the node's load to the controller; return why this group must hand over, or None.

    Contains collectives of Ray Train and of the process group: every rank calls it at the same steps.
    """
    is_first_on_node = ray.train.get_context().get_local_rank() == 0
    ray.train.report({"rows": rows, "node": sample_node() if is_first_on_node else {}})
    if ray.train.get_preemption_info() is not None:
        return "a node leaves"
    group = ProcessGroup()
    return "another number of workers" if group.any(group.rank == 0 and resize_note.exists()) else None
