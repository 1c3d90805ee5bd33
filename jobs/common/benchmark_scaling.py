"""How the training of a task scales with its workers: the same steps on 1, 2, 4, ... of them, and in this process.

    OUT/points/NAME.json       what was measured; a rerun continues from it
        table.md, table.json   all results
        report.html, *.png     the same with figures

Strong scaling keeps the batch, weak scaling the batch of each worker. What is measured is no run: nothing is tracked.
"""

import argparse
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.common.console import say
from jobs.common.session import ray_session
from jobs.train import add_recipe_options, build_recipe, parse_settings
from raylab.config.overrides import override, with_enough_shards, without_weights
from raylab.config.recipe import Recipe
from raylab.documents import Document, read_document
from raylab.errors import UsageError
from raylab.files import write_json
from raylab.tasks import TASKS, find_task
from raylab.tasks.recipes import parse_recipe

if TYPE_CHECKING:  # it loads torch
    from jobs.common.scaling_points import Point, Scaling

STEPS = 20
SLICE, SLICES = 4, 4  # one process is measured at a batch, a quarter of it, a quarter of that, ...: so many sizes
LEAST_SAMPLES = 2  # batch norm cannot take one


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="prepared directory on storage that all nodes share"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of workers, on a local Ray or on "
        "the cluster that RAY_ADDRESS names; 0, this process without Ray, is always measured (default: 1 2)"
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimiser steps that are measured at each point (default: {STEPS})"
    )
    add_recipe_options(parser)


class Plan(Document):
    """What all points of a benchmark directory have in common."""

    recipe: dict[str, Any]
    data_hash: str
    synthetic: bool
    samples: int
    """of the training split"""
    parameters: int
    """elements of the gradient"""
    steps: int


class Place(NamedTuple):
    """A point that is to be measured."""

    scaling: "Scaling"
    workers: int
    batch: int
    shards: int

    @property
    def name(self) -> str:
        return f"{self.scaling}-{self.workers or self.batch}"


def main(args: argparse.Namespace) -> dict[str, Any]:
    from jobs.common import scaling_report

    out, data = args.out.absolute(), args.data.absolute()
    plan, workers = make_plan(args, data)
    keep_plan(out / "plan.json", plan)
    recipe = parse_recipe(plan.recipe)
    places = list_places(recipe, workers, plan.samples)
    most = workers[-1] * recipe.scaling.cpus_per_worker
    missing = [place for place in places if not path_of(out, place).is_file()]
    for place in missing:
        if place.workers == 0:
            measure_place(place, plan, recipe, data, out, args.quiet)
    on_ray = [place for place in missing if place.workers > 0]
    with ray_session(most, out / "ray.log") if on_ray else nullcontext():
        for place in on_ray:
            measure_place(place, plan, recipe, data, out, args.quiet)
    points = [read_point(path_of(out, place)) for place in places]
    result = scaling_report.summarise(recipe, plan.parameters, plan.synthetic, points)
    scaling_report.write(result, out)
    if not args.quiet:
        say("\n" + scaling_report.markdown(result))
        say(f"report: {out / 'report.html'}")
    return {"out": str(out), **result}


def make_plan(args: argparse.Namespace, data: Path) -> tuple[Plan, list[int]]:
    """What is going to be measured, and on which numbers of workers. Raises UsageError if the recipe, the data or the
    numbers do not allow it."""
    from jobs.common import training
    from jobs.common.scaling_points import count_parameters

    workers = sorted(set(args.workers) - {0})
    if not workers or workers[0] < 0 or args.steps < 2:
        raise UsageError(
            "there is nothing to compare",
            f"--workers is {' '.join(map(str, args.workers))}, --steps is {args.steps}",
            "give a number of workers from 1 up, and 2 steps or more",
        )
    meta = find_task(args.task).read_meta(data)
    recipe = without_weights(build_recipe(args.task, parse_settings(args), workers[-1], args.smoke))
    undisturbed = {"checkpoint_steps": None, "checkpoint_seconds": None, "early_stopping_patience": None}
    settings = {"scaling.workers": 0} | {f"loop.{name}": value for name, value in undisturbed.items()}
    recipe = override(with_enough_shards(recipe), settings)
    work = training.inspect(recipe, data, checks_batches=False)
    if work.steps == 1 and recipe.loop.epochs > 1:
        raise UsageError(
            f"the model {recipe.model.name} is fitted at once",
            "it has no steps to divide among workers",
            "choose a network: --set model.name=NAME",
        )
    batch = recipe.loop.global_batch_size
    if work.samples <= batch * workers[-1]:
        raise UsageError(
            f"weak scaling to {workers[-1]} worker(s) needs more than {batch * workers[-1]} training samples, and the "
            f"data has {work.samples}",
            f"each worker computes a batch of {batch}, and the last batch of an epoch is not measured",
            "more data, fewer workers, or --set loop.global_batch_size=N",
        )
    plan = Plan(
        recipe=recipe.model_dump(mode="json"),
        data_hash=meta.data_hash,
        synthetic=meta.synthetic,
        samples=work.samples,
        parameters=count_parameters(recipe, data),
        steps=args.steps,
    )
    return plan, workers


def keep_plan(path: Path, plan: Plan) -> None:
    """Write the plan, or raise UsageError if the directory has points of another one."""
    if path.is_file() and read_document(path, Plan, "choose another --out") != plan:
        raise UsageError(
            f"{path.parent} contains measurements of another recipe, other data or another number of steps",
            "more workers than the recipe has shards also change it",
            "choose another --out",
        )
    write_json(path, plan.to_json())


def list_places(recipe: Recipe, workers: list[int], samples: int) -> list[Place]:
    """The points: this process with the batch and smaller ones, then both kinds of scaling."""
    batch, shards = recipe.loop.global_batch_size, recipe.loop.shards
    sizes = [batch, *(size for k in range(1, SLICES) if (size := batch // SLICE**k) >= LEAST_SAMPLES)]
    alone = [Place("process", 0, size, max(1, round(shards * size / batch))) for size in sizes]
    # batch norm cannot take a shard of one sample, which the last batch of an epoch may leave
    alone = [place for place in alone if place.batch == batch or not 0 < samples % place.batch < 2 * place.shards]
    strong = [Place("strong", n, batch, shards) for n in workers]
    weak = [Place("weak", n, batch * n, shards * n) for n in workers if n > 1]  # with one worker they are the same
    return [*alone, *strong, *weak]


def path_of(out: Path, place: Place) -> Path:
    return out / "points" / f"{place.name}.json"


def read_point(path: Path) -> "Point":
    from jobs.common.scaling_points import Point

    return read_document(path, Point, "remove it; then the same command measures it again")


def measure_place(place: Place, plan: Plan, recipe: Recipe, data: Path, out: Path, quiet: bool) -> None:
    """Measure a point and write it to its file."""
    from jobs.common.scaling_points import measure

    settings = {
        "loop.global_batch_size": place.batch,
        "loop.shards": place.shards,
        "scaling.workers": place.workers,
    }
    directory = out / "runs" / place.name
    shutil.rmtree(directory, ignore_errors=True)  # of a measurement that was interrupted
    directory.mkdir(mode=0o700, parents=True)
    point = measure(
        override(recipe, settings), data, directory, plan.samples, plan.parameters, plan.steps, place.scaling
    )
    path_of(out, place).parent.mkdir(mode=0o700, exist_ok=True)
    write_json(path_of(out, place), point.to_json())
    shutil.rmtree(directory, ignore_errors=True)  # a killed worker may take a moment
    if not quiet:
        where = "in this process" if place.workers == 0 else f"on {place.workers} worker(s), {place.scaling} scaling"
        say(f"batch {place.batch} {where}: {point.rate:.4g} samples/s")
