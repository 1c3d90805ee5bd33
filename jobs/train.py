"""raylab train: train a recipe on a prepared directory as a tracked run, on any number of workers."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cli
from jobs.common import home, model_card, run_tracking, scores
from jobs.common.environment import verb_environment
from jobs.common.progress import Display, say
from jobs.common.results import Run, RunReference, find_run
from jobs.common.session import ray_session
from raylab.config.assignments import parse_assignments
from raylab.config.overrides import override, with_enough_shards
from raylab.config.recipe import Recipe
from raylab.data.sampler import steps_per_epoch
from raylab.errors import UsageError
from raylab.models.baselines import Fitted
from raylab.tasks import TASKS, find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training import imbalance
from raylab.training.run import execute, read_model
from raylab.training.run_record import Kind
from raylab.training.run_result import read_result
from tracking.outbox import Outbox
from tracking.system import NodeSampler

EXAMPLE = "raylab train ards --data prepared/ards --smoke --workers 0"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="prepared directory on storage that all nodes share"
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--workers", metavar="N|MIN:MAX", help="number of workers (default: the recipe's); 0 trains in this process"
    )
    parser.add_argument("--name", help="name of the run (default: made from task and time)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print the work of each worker; start nothing"
    )
    parser.add_argument("--from", dest="parent", metavar="RUN", help="start from the weights of this run")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="use the task's small recipe for quick tests")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="recipe fields, e.g. optim.lr=3e-4"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.dry_run:
        recipe = build_recipe(args.task, parse_assignments(args.set), args.workers, args.smoke)
        return dry_run(recipe, args.data.absolute(), args.quiet)
    return train(
        args.task,
        args.data,
        workers=args.workers,
        name=args.name,
        parent=args.parent,
        settings=parse_assignments(args.set),
        smoke=args.smoke,
        quiet=args.quiet,
    ).details


Workers = int | tuple[int, int] | str
"""0: in this process, without Ray; N; (MIN, MAX) or "MIN:MAX": as many of these as the cluster has room for."""


@verb_environment()
def train(
    recipe: Recipe | str,
    data: Path | str,
    *,
    workers: Workers | None = None,
    name: str | None = None,
    parent: RunReference | None = None,
    settings: Mapping[str, Any] | None = None,
    smoke: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a new run, log it to MLflow, and score its best epoch on the validation split.

    `recipe`: a recipe, or the name of a task for its shipped recipe (with `smoke`, its small one). `data`: a prepared
    directory of the task. `settings`: recipe fields by path, {"optim.lr": 3e-4}. `workers` defaults to the recipe's,
    `name` to one made from task and time. `parent`: the run whose weights this one starts from.

    Raises UsageError, DataError or TrackingError for invalid input, before the run exists, and RunError if the run
    fails; `resume` then continues it.
    """
    recipe = build_recipe(recipe, settings or {}, workers, smoke)
    start_from = None if parent is None else find_run(parent)
    return Run.of(start(recipe, Path(data).absolute(), name, start_from, quiet))


def build_recipe(
    recipe: Recipe | str, settings: Mapping[str, Any], workers: Workers | None = None, smoke: bool = False
) -> Recipe:
    """The given recipe, or the shipped one of a task, with `settings` and `workers` applied."""
    if smoke and isinstance(recipe, Recipe):
        raise UsageError("`smoke` selects a task's small recipe, but a recipe was given", do="pass only one of them")
    chosen = recipe if isinstance(recipe, Recipe) else shipped_recipe(recipe, smoke)
    return override(chosen, {**settings, **({} if workers is None else {"scaling.workers": workers})})


def start(
    recipe: Recipe, data: Path, name: str | None, parent: Path | None, quiet: bool, kind: Kind = "train"
) -> dict[str, Any]:
    """Train a new run. All input is checked before the run exists."""
    meta = find_task(recipe.task).read_meta(data)
    uri = run_tracking.checked_address()
    recipe = enough_shards(run_tracking.with_weights(recipe, uri), quiet)
    inspect(recipe, data)
    if parent is not None:
        read_model(parent)
    directory = home.new_run(name, recipe.task)
    with home.lock_run(directory):
        ancestor = None if parent is None else home.note(parent)
        run_tracking.create_run(directory, recipe, meta, data, kind, uri, ancestor)
        if parent is not None:
            home.annotate(directory, parent_directory=str(parent))  # it may be in another user's home
        return continue_run(directory, recipe, data, parent, quiet)


def enough_shards(recipe: Recipe, quiet: bool) -> Recipe:
    """The recipe with at least one shard per worker; prints a message if that raises the number of shards."""
    enough = with_enough_shards(recipe)
    if enough != recipe and not quiet:
        most = enough.loop.shards
        say(
            f"loop.shards is raised from {recipe.loop.shards} to {most} for up to {most} workers; it affects the result"
        )
    return enough


def dry_run(recipe: Recipe, data: Path, quiet: bool) -> dict[str, Any]:
    """Check a recipe and its data as `start` does, and print how its maximum number of workers divides a batch."""
    find_task(recipe.task).read_meta(data)
    recipe = enough_shards(recipe, quiet)
    inspect(recipe, data)
    samples = len(find_task(recipe.task).load(data, "train", recipe.data, None))
    batch, shards, most = recipe.loop.global_batch_size, recipe.loop.shards, max(1, recipe.scaling.workers[1])
    least, largest = min(batch, samples) // shards, -(-min(batch, samples) // shards)
    plan = {
        "workers": most,
        "shards": shards,
        "most_shards_of_a_worker": -(-shards // most),
        "samples_of_a_shard": [least, largest],
        "steps": recipe.loop.epochs * steps_per_epoch(samples, batch),
        "last_batch": (samples - 1) % batch + 1,
        "cpus": most * recipe.scaling.cpus_per_worker,
        "gpus": most if recipe.scaling.gpu else 0,
    }
    if not quiet:
        each = f"{least} to {largest}" if least < largest else str(least)
        say(f"nothing was started: {plan['steps']} steps of {min(batch, samples)} samples in {shards} shards of {each}")
        say(f"{most} worker(s) with at most {plan['most_shards_of_a_worker']} shard(s) each, {plan['cpus']:g} CPUs and "
            f"{plan['gpus']} GPUs in total; the last batch has {plan['last_batch']} samples")  # fmt: skip
    return plan


def inspect(recipe: Recipe, data: Path) -> None:
    """Load train and val and build the model once, to raise errors in recipe and data before anything starts."""
    job = find_task(recipe.task)
    train = job.load(data, "train", recipe.data, None)
    imbalance.check(recipe, train)
    job.load(data, "val", recipe.data, train.spec)
    job.model(recipe, train.spec)


def continue_run(directory: Path, recipe: Recipe, data: Path, parent: Path | None, quiet: bool) -> dict[str, Any]:
    """Train a run to its end, from its newest valid checkpoint if there is one."""
    job = find_task(recipe.task)
    samples = job.load(data, "train", recipe.data, None)
    steps = steps_per_epoch(len(samples), recipe.loop.global_batch_size)
    planned = 1 if isinstance(job.model(recipe, samples.spec), Fitted) else recipe.loop.epochs * steps
    low, high = recipe.scaling.workers
    if not quiet:
        workers = f"{low}:{high}" if low != high else str(low)
        synthetic = ", SYNTHETIC data" if home.note(directory).synthetic else ""
        size = f"{len(samples)} samples, {planned} steps"
        say(f"run {directory.name}: {recipe.task}, {size}, workers {workers}{synthetic}")
    rows = run_tracking.ToOutbox(directory)
    with run_tracking.track_run(directory):
        if (directory / "result.json").is_file():
            say(f"run {directory.name} has already finished training")
            result = read_result(directory)
        elif high == 0:
            with Display(directory, recipe.loop.epochs, planned, job.objective, quiet):
                result = execute(recipe, data, directory, rows.send, parent)
        else:
            with (
                ray_session(high * recipe.scaling.cpus_per_worker, directory / "ray.log"),
                Display(directory, recipe.loop.epochs, planned, job.objective, quiet, lambda: missing(recipe)),
            ):
                from raylab.distributed import train

                result = train.train(recipe, data, directory, rows, parent, NodeSampler(), rows.add_node_sample)
        return finish(directory, recipe, data, result, quiet)


def finish(directory: Path, recipe: Recipe, data: Path, result: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Score the model of the best epoch on val with intervals, log scores, plots and model, and print the scores."""
    facts = {"steps": result["steps"], "best_step": result["best"]["step"], "weights_sha256": result["weights_sha256"]}
    home.annotate(directory, **facts)
    scored = scores.score_run(directory, data, "val")
    scores.calibrate(directory, scored)
    scores.record(directory, scored)
    samples = scored.samples
    run_tracking.log_model(directory, (2, *samples.batch(np.zeros(1, dtype=np.int64)).shape[1:]))
    if find_task(recipe.task).kind == "images":
        model_card.write(directory, scored.parameters)
    run_record = home.note(directory)
    reported = ("weights_sha256", "attempts", "steps_repeated", "stopped")
    tags = {f"raylab.{name}": str(result[name]) for name in reported}
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


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
