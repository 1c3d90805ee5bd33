"""What the verbs that train share: a run from its checks to its scores. Importing it loads torch."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jobs.common import console, costs, home, model_card, run_tracking, scores
from jobs.common.console import say, set_status
from jobs.common.progress import Display, describe_best
from jobs.common.workers import StartedWorkers
from raylab.config.recipe import Recipe
from raylab.data.sampler import steps_per_epoch
from raylab.errors import UsageError
from raylab.models.baselines import Fitted
from raylab.tasks import find_task
from raylab.tasks.plugins import check_network
from raylab.training import imbalance
from raylab.training.batchnorm import check_smallest_shard
from raylab.training.run import execute, is_transferred, load_samples
from raylab.training.run_result import read_result
from raylab.work import WorkMeter, write_to
from tracking.outbox import Outbox
from tracking.system import NodeSampler


class Work(NamedTuple):
    """How much a run trains."""

    samples: int
    steps: int


def inspect(recipe: Recipe, data: Path, parent: Path | None = None, checks_batches: bool = True) -> Work:
    """Load train and val and build the model once, to raise errors in recipe and data before anything starts.

    `parent`: the run from whose weights this one starts. `checks_batches`: whether the run takes the batches of this
    recipe, epoch by epoch.
    """
    job = find_task(recipe.task)
    train = job.load(data, "train", recipe.data, None)
    imbalance.check(recipe, train)
    job.load(data, "val", recipe.data, train.spec)
    check_network(job, recipe, train)
    model = job.model(recipe, train.spec)
    is_fitted = isinstance(model, Fitted)
    if checks_batches and not is_fitted:
        check_smallest_shard(recipe, model, train, is_transferred(recipe, parent))
    steps = recipe.loop.epochs * steps_per_epoch(len(train), recipe.loop.global_batch_size)
    return Work(len(train), 1 if is_fitted else steps)


def check_gpu(recipe: Recipe, is_here: bool) -> None:
    """Raise UsageError if a new run `is_here`, on this machine, and wants a GPU that the machine does not have."""
    if recipe.scaling.gpu and is_here and not torch.cuda.is_available():
        raise UsageError(
            "scaling.gpu=true, and torch finds no GPU on this machine",
            "a run on Ray would wait for one forever",
            "leave scaling.gpu out, or start it where there is one: raylab cluster submit -- python -m jobs.train ...",
        )


def continue_run(
    directory: Path, recipe: Recipe, data: Path, parent: Path | None, quiet: bool, workers: StartedWorkers, work: Work
) -> dict[str, Any]:
    """Train a run that is tracked to its end, from its newest valid checkpoint if there is one."""
    job = find_task(recipe.task)
    if not quiet:
        synthetic = ", SYNTHETIC data" if home.note(directory).synthetic else ""
        size = f"{work.samples} samples, {work.steps} steps"
        say(f"run {directory.name}: {recipe.task}, {size}, workers {run_tracking.describe_workers(recipe)}{synthetic}")
    rows = run_tracking.ToOutbox(directory)
    if (directory / "result.json").is_file():
        say(f"run {directory.name} has already finished training")
        result = read_result(directory)
    elif recipe.scaling.workers[1] == 0:
        scaling = recipe.scaling
        meter = WorkMeter("worker-0", scaling.cpus_per_worker, 1.0, scaling.gpu, write_to(directory))
        with Display(directory, recipe.loop.epochs, work.steps, job.objective, quiet), meter:
            result = execute(
                recipe, *load_samples(recipe, data), directory, rows.send, parent, on_training=meter.note_training
            )
    else:
        set_status("starting Ray and the workers")
        supervisor = workers(directory / "ray.log")
        with Display(directory, recipe.loop.epochs, work.steps, job.objective, quiet, lambda: missing(recipe)):
            result = supervisor.train(recipe, data, directory, rows, parent, NodeSampler(), rows.add_node_sample, say)
    if console.screen is not None:
        best = result["best"]
        say(f"kept: {describe_best(best['epoch'], best.get(job.objective), best['loss'], job.objective)}")
    return finish(directory, recipe, data, result, quiet)


def finish(directory: Path, recipe: Recipe, data: Path, result: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Score the model of the best epoch on val with intervals, log scores, plots and model, and print the scores."""
    facts = {"steps": result["steps"], "best_step": result["best"]["step"], "weights_sha256": result["weights_sha256"]}
    home.annotate(directory, **facts)
    set_status("scoring the kept epoch on val")
    scored = scores.score_run(directory, data, "val")
    scores.calibrate(directory, scored)
    scores.record(directory, scored)
    samples = scored.samples
    set_status("logging the model to MLflow")
    run_tracking.log_model(directory, (2, *samples.batch(np.zeros(1, dtype=np.int64)).shape[1:]))
    if find_task(recipe.task).kind == "images":
        model_card.write(directory, scored.parameters)
    costs.tell_end(directory)
    run_record = home.note(directory)
    reported = ("weights_sha256", "ledger_sha256", "attempts", "steps_repeated", "stopped")
    tags = {f"raylab.{name}": str(result[name]) for name in reported if name in result}
    tags["raylab.cpus"] = "; ".join(result.get("cpus", ()))  # an earlier version may have trained it
    Outbox(directory / "outbox").append({"kind": "tags", "values": tags})
    out = {
        "run_id": run_record.run_id,
        "name": directory.name,
        "directory": str(directory),
        "task": recipe.task,
        "data": str(data),
        "synthetic": run_record.synthetic,
        "parent": run_record.parent,
        "seed": recipe.seed,
        "val_loss": result["best"]["loss"],
        **{k: v for k, v in result.items() if k != "val"},
        "split": "val",
        **scored.to_json(),
    }
    if not quiet:
        scores.tell(scored)
        say(f"finished {directory.name}: {result['steps']} steps, {result['attempts']} start(s), "
            f"{result['steps_repeated']} steps repeated, weights {result['weights_sha256'][:16]}")  # fmt: skip
        split = list(scored.meta.counts)[-1]  # val if the data has no test list
        say(f"next: raylab evaluate {recipe.task} --run {directory.name} --data {data} --split {split}")
        say("      raylab compare        raylab ui")
    return out


def missing(recipe: Recipe) -> str:
    """A message about the resources that a run is waiting for; empty if the cluster has them."""
    import ray

    want = recipe.scaling.workers[0] * recipe.scaling.cpus_per_worker
    have, free = ray.cluster_resources(), ray.available_resources()
    text = f"waiting for {recipe.scaling.workers[0]} worker(s): {want:g} CPUs"
    if recipe.scaling.gpu:
        text += f" and {recipe.scaling.workers[0]} GPUs; the cluster has {have.get('GPU', 0):g} GPUs,"
    if have.get("CPU", 0) >= want and free.get("CPU", 0) >= want and not recipe.scaling.gpu:
        return ""
    return f"{text}; the cluster has {have.get('CPU', 0):g} CPUs, {free.get('CPU', 0):g} free"
