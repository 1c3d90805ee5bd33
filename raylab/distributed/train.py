"""One run on Ray Train: the elastic trainer around what every worker executes (worker.py).

Ray Train only starts workers, notices when they die, and restarts the group. Checkpoints are raylab's own
(checkpoint.py, in the run directory on shared storage); a restarted group resumes from the newest valid one. A group
that hands over, because a node is leaving or nodes have joined, ends like a finished one; `train` reads from the ledger
that it has not finished and starts the next attempt.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.callback import UserCallback

import raylab.errors
from raylab.config.recipe import Recipe
from raylab.data.sampler import steps_per_epoch
from raylab.distributed.backend import StoreConfig, create_rendezvous
from raylab.distributed.elastic import NOTE, ElasticPolicy, ElasticTrainer, has_handed_over
from raylab.errors import IncompleteError, RunError
from raylab.tasks import find_task

if TYPE_CHECKING:  # it imports torch, which the run's controller does not need
    from raylab.training.progress import Metrics

OnRows = Callable[[list["Metrics"]], None]
SampleNode = Callable[[], dict[str, float]]
"""Returns the current load of a node, or {} if no sample is due; sent to the workers, so it must be picklable."""


class Forward(UserCallback):
    """Forwards metrics from the run's only controller: the single place through which metrics leave a run."""

    def __init__(self, on_rows: OnRows, on_node_sample: Callable[[dict[str, float]], None]) -> None:
        self.on_rows, self.on_node_sample = on_rows, on_node_sample

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.on_rows(metrics[0]["rows"])
        for sample in (rank["node"] for rank in metrics):
            if sample:
                self.on_node_sample(sample)


def train(
    recipe: Recipe,
    data: Path,
    directory: Path,
    callback: UserCallback,
    parent: Path | None = None,
    sample_node: SampleNode = dict,
) -> dict[str, Any]:
    """Run `recipe` on the connected Ray cluster with recipe.scaling.workers; return the result of `execute`.

    `callback` runs in Ray Train's controller and receives each bundle of metrics (see `Forward`), together with what
    `sample_node` returns on each node. Raises the run's own error, RunError if workers died more often than
    recipe.scaling.max_failures, and IncompleteError if Ray Train reports success without a result.
    """
    (directory / "failure.json").unlink(missing_ok=True)
    samples = len(find_task(recipe.task).load(data, "train", recipe.data, None))
    planned = recipe.loop.epochs * steps_per_epoch(samples, recipe.loop.global_batch_size)
    rendezvous = create_rendezvous()
    while True:
        (directory / NOTE).unlink(missing_ok=True)
        try:
            trainer(recipe, data, directory, callback, parent, planned, rendezvous, sample_node).fit()
        except ray.train.TrainingFailedError as error:
            raise RunError(
                f"the workers of run {directory.name} failed {recipe.scaling.max_failures + 1} times",
                str(error).strip().splitlines()[-1],
                f"see Ray's logs, then: raylab resume {directory.name}",
            ) from error
        if not has_handed_over(directory):
            return outcome(directory)


def trainer(
    recipe: Recipe,
    data: Path,
    directory: Path,
    callback: UserCallback,
    parent: Path | None,
    planned: int,
    rendezvous: Any,
    sample_node: SampleNode = dict,
) -> ElasticTrainer:
    """Return the trainer of one attempt, whose workers form their process group through `rendezvous`."""
    from raylab.distributed.worker import worker

    low, high = recipe.scaling.workers
    # Each attempt gets a new name, because a run resumes from its own checkpoints and not from Ray Train's records
    attempt = sum(1 for _ in (directory / "ray").glob("*"))
    scaling = ScalingConfig(
        num_workers=(low, high),
        use_gpu=recipe.scaling.gpu,
        resources_per_worker={"CPU": recipe.scaling.cpus_per_worker} | ({"GPU": 1} if recipe.scaling.gpu else {}),
        elastic_resize_monitor_interval_s=recipe.scaling.resize_seconds,
    )
    return ElasticTrainer(
        worker,
        policy=ElasticPolicy(scaling, directory, planned),
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "data": str(data),
            "directory": str(directory),
            "resize_note": str(directory / NOTE),
            "parent": None if parent is None else str(parent),
            "sample_node": sample_node,
        },
        backend_config=StoreConfig("cpu:gloo,cuda:nccl" if recipe.scaling.gpu else "gloo", rendezvous),
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(max_failures=recipe.scaling.max_failures),
            callbacks=[callback],
        ),
    )


def raise_failure(directory: Path) -> None:
    """Raise the error in the run's failure.json, if there is one."""
    failure = directory / "failure.json"
    if failure.is_file():
        note = json.loads(failure.read_text())
        raise getattr(raylab.errors, note["kind"])(*note["args"])


def outcome(directory: Path) -> dict[str, Any]:
    """Return the result that the workers wrote, or raise their failure."""
    raise_failure(directory)
    result = directory / "result.json"
    if not result.is_file():
        raise IncompleteError(
            f"run {directory.name} ended without reaching its last step", do=f"raylab resume {directory.name}"
        )
    content: dict[str, Any] = json.loads(result.read_text())
    if content["stopped"] == "planned" and content["steps"] != content["planned_steps"]:
        raise IncompleteError(f"run {directory.name} ended at step {content['steps']} of {content['planned_steps']}")
    return content
