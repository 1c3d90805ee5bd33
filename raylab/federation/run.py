"""Training by several sites, as one of them, or pooled: what `raylab federate run` and `pool` execute.

Both go through the same steps. A site has its own rows, and adds its sums to those of the others through the exchange
directory; the pooled run has the rows of all sites, and what it has added up itself is the sum.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from raylab.errors import DataError, UsageError
from raylab.federation import fixed_point
from raylab.federation.agreement import Agreement
from raylab.federation.arithmetic import describe_arithmetic, describe_code, probe
from raylab.federation.budget import check_budget, pool_noisy_statistics, spent_epsilon
from raylab.federation.federation import Counts, Federation, PooledSamples
from raylab.federation.rounds import Round
from raylab.federation.scope import make_scope
from raylab.federation.sums import Sums
from raylab.tasks import find_task
from raylab.tasks.base import SiteStatistics, Task
from raylab.training.imbalance import check_settings
from raylab.training.loop import weights_sha256
from raylab.training.peers import Peers
from raylab.training.process_group import ProcessGroup
from raylab.training.run import Send, execute

SAME_ARITHMETIC = (
    "exact sums need the same bits at every site: use the same kind of CPU and the same software, or make an agreement "
    "with --local-steps, which needs neither"
)
SAME_CODE = "install the same version of raylab at every site"
SAME_DATA = "prepare the data of all sites with the same options and version of raylab"


class SitePeers(Peers):
    """This process alone in its run: a regrouping means that a site was excluded, and the others go on."""

    def form_group(self, position: int) -> tuple[ProcessGroup, int | None]:
        return ProcessGroup(), None

    def must_regroup(self) -> bool:
        return False

    def is_leaving(self) -> bool:
        return False


def join(agreement: Agreement, members: Mapping[str, Path], sums: Sums) -> Federation:
    """Form the statistics of all sites, load the prepared directories of `members`, and check that all sites compute
    the same, or, where they average weights, run the same code from the same weights. A collective over the sites.

    Raises DataError for data that does not fit, UsageError for a recipe that cannot be trained so or would spend more
    than the agreed privacy budget, and RunError where sites differ.
    """
    recipe = agreement.parse_recipe()
    task = find_task(recipe.task)
    statistics = _statistics_of(task)
    metas = {name: task.read_meta(directory) for name, directory in members.items()}
    is_exact = agreement.local_steps is None
    if is_exact:
        sums.compare(Round("join", 0), describe_arithmetic(), SAME_ARITHMETIC)
    else:
        sums.compare(Round("join", 0), describe_code(), SAME_CODE)

    counts: Counts | None = None
    left_out = 0
    if agreement.privacy is not None:
        counts = check_budget(agreement, agreement.privacy, recipe, task, members, sums)
        pooled, left_out = pool_noisy_statistics(agreement, agreement.privacy, statistics, members, sums)
    else:
        own = [statistics.add_up(metas[name], directory) for name, directory in members.items()]
        parts = [fixed_point.encode(each, statistics.bound, "statistics") for each in own]
        total = sums.add_up(Round("statistics", 0), fixed_point.add_all(parts))
        pooled = fixed_point.decode(total, statistics.bound)
    spec = statistics.pool(next(iter(metas.values())), pooled)

    train = {name: task.load(directory, "train", recipe.data, spec) for name, directory in members.items()}
    val = {name: task.load(directory, "val", recipe.data, spec) for name, directory in members.items()}
    if counts is None:
        numbers = [Counts.of(task, train[name], val[name]).to_integers() for name in members]
        counts = Counts.from_integers(sums.add_up(Round("counts", 0), fixed_point.add_all(numbers)))
        if absent := [name for name, n in zip(spec["classes"], counts.classes, strict=True) if n == 0]:
            raise DataError(
                f"no row of class {', '.join(absent)} in the training data of any site",
                "a model cannot learn a class without examples",
                "prepare data that contains all classes",
            )
    torch.set_num_threads(recipe.loop.threads)  # the loop's, whatever the cores of this site: they change the rounding
    some = next(iter(train.values()))
    check_settings(recipe, some)
    model = task.model(recipe, some.spec)
    facts = {f"input {key}": _short(value) for key, value in some.spec.items()}
    facts |= {"initial weights": weights_sha256(model)}
    if is_exact:
        facts |= {"bits of a forward and backward pass": probe(task, model, some, 0)}
    sums.compare(Round("start", 0), facts, f"{SAME_DATA}; if only bits differ: {SAME_ARITHMETIC}")
    return Federation(agreement, recipe, task, train, val, counts, sums, left_out)


def train(
    federation: Federation, directory: Path, send: Send, on_training: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train to the end in the run directory `directory`, from its newest valid checkpoint if there is one.

    Returns fit()'s result with the facts of the ledger, and "federation": how many gradients of shards here exceeded
    the agreed bound since this process began, which sites took part to the end, and the epsilon that the patients of
    each site here have spent, if there is a privacy budget.
    """
    samples, val = PooledSamples(federation.train), PooledSamples(federation.val)
    scope, peers = make_scope(federation), SitePeers()
    result = execute(
        federation.recipe, samples, val, directory, send, peers=peers, on_training=on_training, scope=scope
    )
    sites = federation.sums.sites(Round("validation", result["steps"]))
    facts = {"clipped_shards": scope.clipped, "sites": list(sites)}
    if federation.agreement.privacy is not None:
        facts["epsilon"] = {name: spent_epsilon(federation, name, result["steps"]) for name in federation.train}
    return result | {"federation": facts}


def _statistics_of(task: Task) -> SiteStatistics:
    if task.site_statistics is None:
        raise UsageError(f"the statistics of task '{task.name}' are not formed from sums", do="choose another task")
    return task.site_statistics


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
