"""One run on Ray Train: the function that every worker executes, and the elastic trainer around it.

Checkpoints are our own (checkpoint.py, in the run's directory on shared storage): Ray Train only starts workers,
notices when they die, and restarts the group; a restarted group reads the newest valid checkpoint.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback

import raylab.errors
from raylab import config
from raylab.config import Recipe
from raylab.errors import IncompleteError, RaylabError, RunError
from raylab.files import write_json
from raylab.loop import Metrics
from raylab.run import execute

OnRows = Callable[[list[Metrics]], None]


def worker(arguments: dict[str, Any]) -> None:
    """What each rank runs. A failure that all ranks share ends the run at once, without a restart."""
    directory = Path(arguments["directory"])
    parent = arguments["parent"]
    try:
        execute(
            config.load(arguments["recipe"]),
            Path(arguments["data"]),
            directory,
            send,
            None if parent is None else Path(parent),
        )
    except RaylabError as error:
        if ray.train.get_context().get_world_rank() == 0:
            write_json(directory / "failure.json", {"kind": type(error).__name__, "args": error.args})


def send(rows: list[Metrics]) -> float | None:
    """Hand rows to the controller; say in how many seconds a node of this group will be taken away, if one will.

    Both calls are collectives of Ray Train, so every rank calls this at the same steps.
    """
    ray.train.report({"rows": rows})
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    deadline = info.deadline_ms
    return 120.0 if not deadline else max(0.0, deadline / 1000 - time.time())


class Forward(UserCallback):
    """Runs in the controller, of which a run has one: the single place through which metrics leave a run."""

    def __init__(self, on_rows: OnRows) -> None:
        self.on_rows = on_rows

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.on_rows(metrics[0]["rows"])


def train(
    recipe: Recipe, data: Path, directory: Path, callback: UserCallback, parent: Path | None = None
) -> dict[str, Any]:
    """Run `recipe` on the connected Ray cluster with recipe.scaling.workers; the result of `execute`.

    `callback` lives in Ray Train's controller and gets each bundle of metrics (see `Forward`). Raises the run's own
    error, RunError when workers died more often than recipe.scaling.max_failures, and IncompleteError when Ray Train
    reports success without a result.
    """
    (directory / "failure.json").unlink(missing_ok=True)
    low, high = recipe.scaling.workers
    # Attempts of a resumed run each get a name of their own: Ray Train's records are not what we resume from
    attempt = sum(1 for _ in (directory / "ray").glob("*"))
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "data": str(data),
            "directory": str(directory),
            "parent": None if parent is None else str(parent),
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if recipe.scaling.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=recipe.scaling.gpu,
            resources_per_worker={"CPU": recipe.scaling.cpus_per_worker} | ({"GPU": 1} if recipe.scaling.gpu else {}),
            elastic_resize_monitor_interval_s=recipe.scaling.resize_seconds,
        ),
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(max_failures=recipe.scaling.max_failures),
            callbacks=[callback],
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RunError(
            f"the workers of run {directory.name} failed {recipe.scaling.max_failures + 1} times",
            str(error).strip().splitlines()[-1],
            f"see Ray's logs, then: raylab train --resume {directory.name}",
        ) from error
    return outcome(directory)


def outcome(directory: Path) -> dict[str, Any]:
    """The result that the workers left, or their failure raised here."""
    failure, result = directory / "failure.json", directory / "result.json"
    if failure.is_file():
        note = json.loads(failure.read_text())
        raise getattr(raylab.errors, note["kind"])(*note["args"])
    if not result.is_file():
        raise IncompleteError(
            f"run {directory.name} ended without reaching its last step", do=f"raylab train --resume {directory.name}"
        )
    found: dict[str, Any] = json.loads(result.read_text())
    if found["stopped"] == "planned" and found["steps"] != found["planned_steps"]:
        raise IncompleteError(f"run {directory.name} ended at step {found['steps']} of {found['planned_steps']}")
    return found
