"""What a run or search will cost: 20 steps are measured here, and the rest is arithmetic. Importing it loads torch."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from cluster import bills
from cluster.bills import CORE_HOURS
from cluster.sites import NodeType, Site
from cluster.slurm import Slurm
from jobs.common import costs
from jobs.common.console import say
from jobs.common.duration import duration
from jobs.common.place import Place
from jobs.common.training import Work
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.errors import SlurmError, UsageError
from raylab.models.baselines import Fitted
from raylab.tasks import find_task
from raylab.training.predict import validate
from raylab.training.process_group import ProcessGroup
from raylab.training.progress import Metrics
from raylab.training.run import execute, load_samples
from raylab.training.shard_gradients import CHECKS

STEPS = 20


class Measurement(NamedTuple):
    """Seconds of one process on this machine."""

    start: float
    """before the first step, for data and network, and what the first steps take beyond `step`"""
    step: float
    validation: float
    """after each epoch"""


class Forecast(NamedTuple):
    """What a run or search will cost at most."""

    seconds: float
    """from the first worker's start to the last one's end, without waiting in a queue"""
    core_hours: float
    """of the CPUs that the workers hold"""
    amount: Fraction | None = None
    """of whole nodes and the head at a site, in `unit`; none without a site"""
    unit: str = CORE_HOURS
    nodes: int = 0
    left: Fraction | None = None
    """of the budget; none where there is no limit"""


class _EnoughMeasured(Exception):
    """Raised in the loop after the last step that is measured."""


def forecast(recipe: Recipe, data: Path, work: Work, place: Place, is_search: bool = False) -> Forecast:
    """The forecast of a run of `recipe`, or of its search, at a place.

    Raises UsageError if the budget of the site, or of the account in Slurm, does not suffice.
    """
    measured = measure(recipe, data, work)
    per_trial = recipe.search.workers_per_trial
    workers = max(1, per_trial if is_search else recipe.scaling.workers[1])
    each = run_seconds(measured, recipe, work, workers)
    runs, together = (recipe.search.trials, recipe.search.concurrent) if is_search else (1, 1)
    together = min(runs, together)
    seconds = math.ceil(runs / together) * each
    core_hours = runs * workers * recipe.scaling.cpus_per_worker * each / 3600
    plain = Forecast(seconds, core_hours)
    found = place.find()
    return plain if found is None else price(plain, recipe, together * workers, *found, Slurm())


def run_seconds(measured: Measurement, recipe: Recipe, work: Work, workers: int) -> float:
    """How long a run takes on so many workers: a step lasts as long as that of the worker with the most shards."""
    largest_part = math.ceil(recipe.loop.shards / workers) / recipe.loop.shards
    epochs = 1 if work.steps == 1 else recipe.loop.epochs
    return measured.start + work.steps * measured.step * largest_part + epochs * measured.validation / workers


def measure(recipe: Recipe, data: Path, work: Work, clock: Callable[[], float] = time.monotonic) -> Measurement:
    """Train STEPS steps in this process, without a trace; of a model without steps, its one fit."""
    recipe = override(recipe, {"scaling.workers": 0})
    per_epoch = work.steps // recipe.loop.epochs
    slow = count_slow(per_epoch)
    rows: list[tuple[float, Metrics]] = []

    def send(new: list[Metrics]) -> int:
        rows.extend((clock(), row) for row in new)
        if len(rows) > slow + STEPS:
            raise _EnoughMeasured
        return int(new[-1]["step"]) if new else 0

    began = clock()
    with tempfile.TemporaryDirectory(prefix="raylab-estimate-") as scratch, suppress(_EnoughMeasured):
        execute(recipe, *load_samples(recipe, data), Path(scratch), send, flush_seconds=0)
    if work.steps == 1:
        return Measurement(0.0, clock() - began, 0.0)
    first = slow if len(rows) > slow + 1 else 0  # a shorter run has slow steps only
    until_first, counted = rows[first][0] - began, rows[first:]
    # a step that ends an epoch reports its scores too, so that its time is not that of a step
    gaps = [later - earlier for (earlier, _), (later, row) in pairwise(counted) if "val/loss" not in row]
    ends = [at for at, row in counted if "val/loss" in row]
    if not gaps:  # every step ends an epoch
        step = (counted[-1][0] - counted[0][0]) / max(1, len(counted) - 1)
        return Measurement(max(0.0, until_first - (first + 1) * step), step, 0.0)
    step = sum(gaps) / len(gaps)
    if len(ends) > 1:
        validation = (ends[-1] - ends[0]) / (len(ends) - 1) - per_epoch * step
    else:
        validation = measure_validation(recipe, data, clock)
    validation = max(0.0, validation)
    epochs = sum("val/loss" in row for _, row in rows[: first + 1])
    return Measurement(max(0.0, until_first - (first + 1) * step - epochs * validation), step, validation)


def count_slow(per_epoch: int) -> int:
    """The first steps, in which passes are computed both ways (shard_gradients). The last batch of an epoch may have
    a shape of its own, so that it does not count."""
    return CHECKS * per_epoch // max(1, per_epoch - 1)


def measure_validation(recipe: Recipe, data: Path, clock: Callable[[], float]) -> float:
    """The seconds that one pass over the validation split takes."""
    task = find_task(recipe.task)
    spec = task.load(data, "train", recipe.data, None).spec
    val = task.load(data, "val", recipe.data, spec)
    device = "cuda" if recipe.scaling.gpu else "cpu"
    model = task.model(recipe, spec)
    assert not isinstance(model, Fitted)  # it has no epochs
    began = clock()
    validate(task, model.to(device), val, ProcessGroup(), recipe, device)
    return clock() - began


# --- at a site ---


def price(plain: Forecast, recipe: Recipe, workers: int, site: Site, node: NodeType, slurm: Slurm) -> Forecast:
    """The forecast with what a site bills: the nodes of `workers` at a time, each as a whole, and the head.

    Raises UsageError if that is more than what is left.
    """
    nodes = math.ceil(workers / workers_per_node(recipe, node))
    hours = Fraction(plain.seconds) / 3600
    of_node, unit = hourly(node, site, slurm)
    amount, cpu_hours = hours * nodes * of_node, hours * nodes * node.cpus
    if not site.whole_nodes:  # else the head shares the first worker's
        amount += hours * hourly(site.head, site, slurm)[0]
        cpu_hours += hours * site.head.cpus
    left = None
    for available, wanted, name, source in budgets(site, slurm, amount, cpu_hours, unit):
        if wanted > available:
            raise UsageError(
                f"this will cost {float(wanted):.4g} {name}, and {float(available):.4g} are left",
                f"{nodes} node(s) and the head for {duration(plain.seconds)}; the limit is that of {source}",
                "fewer epochs, trials or workers; raylab cost prints what has been spent",
            )
        if name == unit:
            left = available
    return plain._replace(amount=amount, unit=unit, nodes=nodes, left=left)


def workers_per_node(recipe: Recipe, node: NodeType) -> int:
    """How many workers fit on a node. Raises UsageError if none does."""
    fitting = [node.cpus / recipe.scaling.cpus_per_worker, *([node.gpus] if recipe.scaling.gpu else [])]
    count = int(min(fitting))
    if count < 1:
        raise UsageError(
            f"a worker with {recipe.scaling.cpus_per_worker:g} CPUs and {int(recipe.scaling.gpu)} GPUs does not fit on "
            f"a node with {node.cpus} CPUs and {node.gpus} GPUs",
            do="another --node-type, or fewer scaling.cpus_per_worker",
        )
    return count


def hourly(node: NodeType, site: Site, slurm: Slurm) -> tuple[Fraction, str]:
    """What an hour of a node costs at a site, and the unit (bills.rate). Without Slurm here, its CPUs count."""
    partition = node.partition or site.partition
    try:
        weights = {} if partition in site.billing.rate else bills.read_weights(slurm, partition)
    except SlurmError:
        weights = {}
    return bills.rate(bills.expected_tres(node, weights), partition or "", 1, site.billing)


def budgets(
    site: Site, slurm: Slurm, amount: Fraction, cpu_hours: Fraction, unit: str
) -> Sequence[tuple[Fraction, Fraction, str, str]]:
    """(left, wanted, unit, whose) of each limit: that of the site file for this home, and Slurm's for the account."""
    limits = []
    if site.billing.budget is not None:
        spent = costs.collect_costs(slurm)
        used = sum((bill.amount for bill in spent.bills if bill.unit == site.billing.unit), Fraction(0))
        limits.append((Fraction(site.billing.budget) - used, amount, site.billing.unit, f"site '{site.name}'"))
    left = bills.remaining_hours(slurm, site.account)
    in_slurm = {"cpu": (cpu_hours, CORE_HOURS)}
    if site.billing.unit == CORE_HOURS and not site.billing.rate:
        in_slurm["billing"] = (amount, unit)
    for name, (wanted, of_limit) in in_slurm.items():
        if name in left:
            limits.append((left[name], wanted, of_limit, f"the account in Slurm (GrpTRESMins, {name})"))
    return limits


# --- for people ---


def tell(found: Forecast) -> None:
    """Print a forecast."""
    say(f"forecast from {STEPS} steps on this machine: at most {duration(found.seconds)}, "
        f"{found.core_hours:.4g} core-hours of workers")  # fmt: skip
    if found.amount is not None:
        left = "no limit is known" if found.left is None else f"{float(found.left):.4g} are left"
        say(f"billed: {float(found.amount):.4g} {found.unit} for {found.nodes} node(s) and the head; {left}")


def to_json(found: Forecast) -> dict[str, Any]:
    return {
        "seconds": found.seconds,
        "core_hours": found.core_hours,
        "amount": None if found.amount is None else float(found.amount),
        "unit": found.unit,
        "nodes": found.nodes,
        "left": None if found.left is None else float(found.left),
    }
