"""raylab train: a recipe and a data directory -> a tracked run, on any number of workers."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cli
from jobs.common import home, model_card, run_tracking, scores
from jobs.common.progress import Display, say
from jobs.common.session import ray_session
from raylab.config.assignments import parse_assignments
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data.prepared import read_meta
from raylab.data.sampler import steps_per_epoch
from raylab.models.baselines import Fitted
from raylab.tasks import TASKS, find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training import imbalance
from raylab.training.run import execute, read_model
from tracking.outbox import Outbox

EXAMPLE = "raylab train ards --data prepared/ards --smoke --workers 0"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="prepared directory, on storage that all nodes share"
    )
    add_recipe_options(parser)
    parser.add_argument("--workers", metavar="N|MIN:MAX", help="0 trains in this process, without Ray")
    parser.add_argument("--name", help="of the run; made from task and time otherwise")
    parser.add_argument("--from", dest="parent", metavar="RUN", help="start from the weights of this run")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="the task's small recipe")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="e.g. --set optim.lr=3e-4"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(args)
    parent = None if args.parent is None else home.find(args.parent)
    return start(recipe, args.data.absolute(), args.name, parent, args.quiet)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The task's recipe with --set and --workers put in."""
    settings = parse_assignments(args.set)
    if args.workers is not None:
        settings["scaling.workers"] = args.workers
    return override(shipped_recipe(args.task, args.smoke), settings)


def start(
    recipe: Recipe, data: Path, name: str | None, parent: Path | None, quiet: bool, kind: str = "train"
) -> dict[str, Any]:
    """Train a new run. Everything that can be refused is refused before the run exists."""
    meta = read_meta(data, recipe.task)
    uri = run_tracking.checked_address()
    recipe = run_tracking.with_weights(recipe, uri)
    inspect(recipe, data)
    if parent is not None:
        read_model(parent)
    directory = home.new_run(name, recipe.task)
    with home.held(directory):
        ancestor = None if parent is None else home.note(parent)
        run_tracking.opening(directory, recipe, meta, data, kind, uri, ancestor)
        if parent is not None:
            home.annotate(directory, parent_directory=str(parent))  # of a colleague's home, perhaps
        return go_on(directory, recipe, data, parent, quiet)


def inspect(recipe: Recipe, data: Path) -> None:
    """Load train and val and build the model once: a wrong name or kind of data is said before anything starts."""
    job = find_task(recipe.task)
    train = job.load(data, "train", recipe.data, None)
    imbalance.check(recipe, train)
    job.load(data, "val", recipe.data, train.spec)
    job.model(recipe, train.spec)


def go_on(directory: Path, recipe: Recipe, data: Path, parent: Path | None, quiet: bool) -> dict[str, Any]:
    """Train a run from its newest valid checkpoint, or from the start, to its end."""
    job = find_task(recipe.task)
    samples = job.load(data, "train", recipe.data, None)
    steps = steps_per_epoch(len(samples), recipe.loop.global_batch_size)
    planned = 1 if isinstance(job.model(recipe, samples.spec), Fitted) else recipe.loop.epochs * steps
    low, high = recipe.scaling.workers
    if not quiet:
        workers = f"{low}:{high}" if low != high else str(low)
        synthetic = ", SYNTHETIC data" if home.note(directory)["synthetic"] else ""
        size = f"{len(samples)} samples, {planned} steps"
        say(f"run {directory.name}: {recipe.task}, {size}, workers {workers}{synthetic}")
    rows = run_tracking.ToOutbox(directory)
    with run_tracking.tracked(directory):
        if (directory / "result.json").is_file():
            say(f"run {directory.name} has reached its last step already")
            result = json.loads((directory / "result.json").read_text())
        elif high == 0:
            with Display(directory, recipe.loop.epochs, planned, job.objective, quiet):
                result = execute(recipe, data, directory, rows.send, parent)
        else:
            with (
                ray_session(high * recipe.scaling.cpus_per_worker, directory / "ray.log"),
                Display(directory, recipe.loop.epochs, planned, job.objective, quiet, lambda: missing(recipe)),
            ):
                from raylab.distributed import train

                result = train.train(recipe, data, directory, train.Forward(rows), parent)
        return finish(directory, recipe, data, result, quiet)


def finish(directory: Path, recipe: Recipe, data: Path, result: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Score the kept model on val with intervals, put scores, plots and model into the run, and print them."""
    facts = {"steps": result["steps"], "best_step": result["best"]["step"], "weights_sha256": result["weights_sha256"]}
    home.annotate(directory, **facts)
    scored = scores.of_run(directory, data, "val")
    scores.calibrate(directory, scored)
    scores.record(directory, scored)
    samples = scored["samples"]
    run_tracking.log_model(directory, (2, *samples.batch(np.zeros(1, dtype=np.int64)).shape[1:]))
    if find_task(recipe.task).kind == "images":
        model_card.write(directory, scored["parameters"])
    described = home.note(directory)
    told = ("weights_sha256", "attempts", "steps_repeated", "stopped")
    tags = {f"raylab.{name}": str(result[name]) for name in told}
    Outbox(directory / "outbox").append({"kind": "tags", "values": tags})
    out = {
        "run_id": described["run_id"],
        "name": directory.name,
        "directory": str(directory),
        "task": recipe.task,
        "data": str(data),
        "synthetic": described["synthetic"],
        "parent": described["parent"],
        "seed": recipe.seed,
        "val_loss": result["best"]["loss"],
        **{k: v for k, v in result.items() if k != "val"},
        "split": "val",
        **scored["result"],
    }
    if not quiet:
        scores.tell(out)
        say(f"finished {directory.name}: {result['steps']} steps, {result['attempts']} start(s), "
            f"{result['steps_repeated']} steps repeated, weights {result['weights_sha256'][:16]}")  # fmt: skip
        split = list(scored["meta"]["counts"])[-1]  # val where the data has no list to test on
        say(f"next: raylab evaluate {recipe.task} --run {directory.name} --data {data} --split {split}")
        say("      raylab compare        raylab ui")
    return out


def missing(recipe: Recipe) -> str:
    """What a run that does not begin is waiting for, in words; empty when the cluster has it."""
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
