"""raylab train: train a recipe on a prepared directory as a tracked run, on any number of workers."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home, run_tracking
from jobs.common.console import open_screen, say
from jobs.common.environment import verb_environment
from jobs.common.place import HERE, Place
from jobs.common.results import Run, RunReference, find_run
from jobs.common.session import cluster_address
from jobs.common.workers import start_workers
from raylab.config.assignments import parse_assignments
from raylab.config.overrides import override, with_enough_shards
from raylab.config.recipe import NetworkModel, Recipe
from raylab.errors import UsageError
from raylab.tasks import TASKS, find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.run_record import Kind

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
    add_priority(parser)
    parser.add_argument("--name", help="name of the run (default: made from task and time)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the work of each worker and the cost; start nothing",
    )
    parser.add_argument("--from", dest="parent", metavar="RUN", help="start from the weights of this run")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="use the task's small recipe for quick tests")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="recipe fields, e.g. optim.lr=3e-4"
    )
    text = "seed of weights, batches, dropout and augmentation (default: the recipe's)"
    parser.add_argument("--seed", type=int, metavar="N", help=text)


def parse_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe fields that `--set` and `--seed` give; UsageError if they give two seeds."""
    settings = parse_assignments(args.set)
    if args.seed is None:
        return settings
    if settings.get("seed", args.seed) != args.seed:
        raise UsageError(
            f"--seed {args.seed} contradicts --set seed={settings['seed']}",
            "both set the recipe's field 'seed'",
            "give one of them",
        )
    return {**settings, "seed": args.seed}


def add_priority(parser: argparse.ArgumentParser) -> None:
    text = "weight of this run where several share a cluster: workers beyond the minimums go to runs in proportion to "
    parser.add_argument("--priority", type=float, metavar="P", help=f"{text}(MAX - MIN) x P (default: the recipe's)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.dry_run:
        return dry_run(recipe_of(args), args.data.absolute(), args.quiet)
    return train(
        args.task,
        args.data,
        workers=args.workers,
        priority=args.priority,
        name=args.name,
        parent=args.parent,
        settings=parse_settings(args),
        smoke=args.smoke,
        quiet=args.quiet,
    ).details


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments of this verb describe."""
    return build_recipe(args.task, parse_settings(args), args.workers, args.smoke, args.priority)


def recipe_of_call(arguments: Mapping[str, Any]) -> Recipe:
    """The recipe that these arguments of `train` describe."""
    options = {name: arguments[name] for name in ("workers", "smoke", "priority") if name in arguments}
    return build_recipe(arguments["recipe"], arguments.get("settings") or {}, **options)


Workers = int | tuple[int, int] | str
"""0: in this process, without Ray; N; (MIN, MAX) or "MIN:MAX": as many of these as the cluster has room for."""


@verb_environment()
def train(
    recipe: Recipe | str,
    data: Path | str,
    *,
    workers: Workers | None = None,
    priority: float | None = None,
    name: str | None = None,
    parent: RunReference | None = None,
    settings: Mapping[str, Any] | None = None,
    smoke: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a new run, log it to MLflow, and score its best epoch on the validation split.

    `recipe`: a recipe, or the name of a task for its shipped recipe (with `smoke`, its small one). `data`: a prepared
    directory of the task. `settings`: recipe fields by path, {"optim.lr": 3e-4}. `workers` and `priority`, its weight
    where several runs share a cluster, default to the recipe's, `name` to one made from task and time. `parent`: the
    run whose weights this one starts from.

    Raises UsageError, DataError or TrackingError for invalid input, before the run exists, and RunError if the run
    fails; `resume` then continues it.
    """
    recipe = build_recipe(recipe, settings or {}, workers, smoke, priority)
    start_from = None if parent is None else find_run(parent)
    with open_screen(quiet, f"{recipe.task}: checking the recipe and the data"):
        if not (quiet or smoke or "model.members" in (settings or {})) and (hint := describe_ensemble(recipe)):
            say(hint)
        return Run.of(start(recipe, Path(data).absolute(), name, start_from, quiet))


def describe_ensemble(recipe: Recipe) -> str:
    """How to train the ensemble of the task's benchmark, and what it costs; empty if the recipe has as many networks,
    or its model is none."""
    members = find_task(recipe.task).benchmark_members
    if not isinstance(recipe.model, NetworkModel) or recipe.model.members >= members:
        return ""
    cost = f"takes up to {members} times as long" if recipe.model.members == 1 else "takes longer"
    return f"the ensemble of {members} networks, as in the benchmark, {cost}: --set model.members={members}"


def build_recipe(
    recipe: Recipe | str,
    settings: Mapping[str, Any],
    workers: Workers | None = None,
    smoke: bool = False,
    priority: float | None = None,
) -> Recipe:
    """The given recipe, or the shipped one of a task, with `settings`, `workers` and `priority` applied."""
    if smoke and isinstance(recipe, Recipe):
        raise UsageError("`smoke` selects a task's small recipe, but a recipe was given", do="pass only one of them")
    chosen = recipe if isinstance(recipe, Recipe) else shipped_recipe(recipe, smoke)
    scaling = {"scaling.workers": workers, "scaling.priority": priority}
    return override(chosen, {**settings, **{path: value for path, value in scaling.items() if value is not None}})


def start(
    recipe: Recipe, data: Path, name: str | None, parent: Path | None, quiet: bool, kind: Kind = "train"
) -> dict[str, Any]:
    """Train a new run. All input is checked before the run exists."""
    meta = find_task(recipe.task).read_meta(data)
    with start_workers(recipe) as workers:
        from jobs.common import training  # loads torch, beside the start of Ray
        from raylab.training.run import read_model

        uri = run_tracking.checked_address()
        recipe = enough_shards(run_tracking.with_weights(recipe, uri), quiet)
        work = training.inspect(recipe, data, parent)
        training.check_gpu(recipe, is_here=recipe.scaling.workers[1] == 0 or cluster_address() is None)
        if parent is not None:
            read_model(parent)
        directory = home.new_run(name, recipe.task)
        with run_tracking.open_run(
            directory, run_tracking.describe_run(directory, recipe, meta, data, kind, uri, parent)
        ):
            return training.continue_run(directory, recipe, data, parent, quiet, workers, work)


def enough_shards(recipe: Recipe, quiet: bool) -> Recipe:
    """The recipe with at least one shard per worker; prints a message if that raises the number of shards."""
    enough = with_enough_shards(recipe)
    if enough != recipe and not quiet:
        most = enough.loop.shards
        say(
            f"loop.shards is raised from {recipe.loop.shards} to {most} for up to {most} workers; it affects the result"
        )
    return enough


def dry_run(recipe: Recipe, data: Path, quiet: bool, place: Place = HERE) -> dict[str, Any]:
    """Check a recipe and its data as `start` does, and print how its maximum number of workers divides a batch, and
    what it will cost at a place. Raises UsageError if the budget does not suffice."""
    from jobs.common import forecast, training
    from raylab.data.sampler import last_batch

    find_task(recipe.task).read_meta(data)
    recipe = enough_shards(recipe, quiet)
    work = training.inspect(recipe, data)
    batch, shards = min(recipe.loop.global_batch_size, work.samples), recipe.loop.shards
    most = max(1, recipe.scaling.workers[1])
    least, largest = batch // shards, -(-batch // shards)
    plan = {
        "workers": most,
        "shards": shards,
        "most_shards_of_a_worker": -(-shards // most),
        "samples_of_a_shard": [least, largest],
        "steps": work.steps,
        "last_batch": last_batch(work.samples, batch),
        "cpus": most * recipe.scaling.cpus_per_worker,
        "gpus": most if recipe.scaling.gpu else 0,
    }
    if not quiet:
        each = f"{least} to {largest}" if least < largest else str(least)
        say(f"nothing was started: {plan['steps']} steps of {batch} samples in {shards} shards of {each}")
        say(f"{most} worker(s) with at most {plan['most_shards_of_a_worker']} shard(s) each, {plan['cpus']:g} CPUs and "
            f"{plan['gpus']} GPUs in total; the last batch has {plan['last_batch']} samples")  # fmt: skip
    found = forecast.forecast(recipe, data, work, place)
    if not quiet:
        forecast.tell(found)
    return {**plan, "forecast": forecast.to_json(found)}


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
