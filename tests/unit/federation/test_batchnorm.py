"""Sites train networks with batch norm to the bits of a run that has all their images. The images are SYNTHETIC.

The sites of most tests are threads of one process that compute one at a time: they stop where they need a sum.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raylab.config.overrides import override
from raylab.data.images.prepare import prepare_images
from raylab.data.images.scenes.meta import SceneMeta
from raylab.data.images.scenes.prepare import prepare_scenes
from raylab.data.images.scenes.scene import SceneRequest, SceneSource
from raylab.data.images.scenes.site_statistics import pool_statistics, sum_statistics
from raylab.data.images.scenes.sources import synthetic
from raylab.data.prepared import read_meta
from raylab.errors import NonFiniteError, UsageError
from raylab.federation import fixed_point
from raylab.federation.agreement import Agreement, propose
from raylab.federation.keys import PrivateKeys
from raylab.federation.masks import Masks
from raylab.federation.rounds import Round
from raylab.federation.run import join, train
from raylab.federation.scope import LARGEST_VALUE, make_scope
from raylab.federation.sums import PooledSums
from raylab.tasks.recipes import shipped_recipe
from raylab.training.batchnorm import ShardStatistics
from raylab.training.ledger import Average, read_ledger
from tests.unit.federation.test_training import Collected, Lockstep, Processes, sign_in

SITES = ("north", "south", "west")
ROWS, SHARDS = (24, 12, 12), (1, 2, 1)
TASKS = {
    "landcover": {"model.width": 4, "model.dropout": 0.2},
    "landcover-multilabel": {"model.width": 4, "loop.epochs": 1},
    "covidnet": {"loop.epochs": 2},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The prepared scenes of each site, which differ in number and brightness."""

    def brighten(source: SceneSource, seed: int) -> SceneSource:
        pixels = [source.read(at) * (1 + seed) for at in range(len(source.scenes))]
        return replace(source, read=pixels.__getitem__)

    return prepare_sites(tmp_path_factory.mktemp("scenes"), "landcover", brighten)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared scenes of each site, every third of which has a second label."""

    def label(source: SceneSource, seed: int) -> SceneSource:
        scenes = [
            replace(scene, labels=tuple(sorted({*scene.labels, (scene.labels[0] + 1) % 4}))) if at % 3 == 0 else scene
            for at, scene in enumerate(source.scenes)
        ]
        return replace(source, scenes=scenes, several_labels=True)

    return prepare_sites(tmp_path_factory.mktemp("labelled"), "landcover-multilabel", label)


def prepare_sites(folder: Path, task: str, change: Callable[[SceneSource, int], SceneSource]) -> dict[str, Path]:
    for seed, name in enumerate(SITES):
        source = synthetic.read(SceneRequest(None, seed, 80 + 16 * seed, 19))
        prepare_scenes(task, folder / name, change(source, seed), seed=0)
    return {name: folder / name for name in SITES}


def agree(keys: dict[str, PrivateKeys], task: str = "landcover", local_steps: Any = None) -> Agreement:
    changes = {"loop.epochs": 2, "loop.ema_decay": 0.9, "loop.checkpoint_steps": 3, **TASKS[task]}
    recipe = override(shipped_recipe(task, smoke=True), changes)
    identities = [each.identity() for each in keys.values()]
    return propose(recipe, identities, ROWS, SHARDS, None, "avx2", 600.0, local_steps)


class Turns:
    """Lets one of the sites compute at a time; `give` ends its turn until all sites have given something."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.given: dict[Round, dict[str, Any]] = {}

    def give(self, round: Round, site: str, value: Any) -> dict[str, Any]:
        given = self.given.setdefault(round, {})
        given[site] = value
        self.turn.notify_all()
        assert self.turn.wait_for(lambda: len(given) == len(SITES), 100), f"{round}: {given.keys()}"
        return given


class SiteTurns:
    """The sums of one site; with its `keys`, those of masked values."""

    def __init__(self, turns: Turns, site: str, agreement: Agreement, keys: PrivateKeys | None) -> None:
        self.turns, self.site = turns, site
        self.masks = None if keys is None else Masks(keys, agreement.sites, agreement.sha256)

    def add_up(self, round: Round, values: Any, noisy: int = 0) -> Any:
        own = values if self.masks is None else self.masks.hide(values, round, SITES)
        total = np.zeros_like(values)
        for each in self.turns.give(round, self.site, own).values():
            total = fixed_point.add(total, each)
        return total

    def compare(self, round: Round, facts: Any, do: str) -> None:
        assert all(theirs == facts for theirs in self.turns.give(round, self.site, facts).values())

    def sites(self, round: Round) -> tuple[str, ...]:
        return SITES


def train_in_threads(
    agreement: Agreement, data: dict[str, Path], out: Path, keys: dict[str, PrivateKeys] | None = None
) -> dict[str, Any]:
    """The results of all sites; with `keys`, no site sees another one's values."""
    turns, results = Turns(), {}

    def run(name: str) -> None:
        (out / name).mkdir(parents=True)
        with turns.turn:
            sums = SiteTurns(turns, name, agreement, None if keys is None else keys[name])
            results[name] = train(join(agreement, {name: data[name]}, sums), out / name, lambda rows: 0)

    threads = [threading.Thread(target=run, args=(name,)) for name in SITES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(SITES), "a site has failed"
    return results


@pytest.mark.parametrize("is_masked", [pytest.param(False, marks=pytest.mark.slow, id="open"), True])
def test_sites_reach_the_weights_of_the_pooled_run(is_masked, scenes, tmp_path):
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    agreement = agree(keys)
    (tmp_path / "pooled").mkdir()
    pooled = train(join(agreement, scenes, PooledSums(agreement, {})), tmp_path / "pooled", lambda rows: 0)
    results = train_in_threads(agreement, scenes, tmp_path, keys if is_masked else None)
    assert {result["weights_sha256"] for result in results.values()} == {pooled["weights_sha256"]}
    assert all(result["best"] == pooled["best"] for result in results.values()) and pooled["steps"] > 5
    weights = load_file(tmp_path / "west" / "model" / "model.safetensors")
    averages = [tensor for name, tensor in weights.items() if name.endswith("running_mean")]
    assert averages and all(bool(tensor.abs().max() > 1e-3) for tensor in averages)


def test_sites_train_several_labels_to_the_weights_of_the_pooled_run(labelled, tmp_path):
    """The statistics weigh a scene once, whatever its labels; each class counts the scenes that have it."""
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    agreement = agree(keys, "landcover-multilabel")
    federation = join(agreement, labelled, PooledSums(agreement, {}))
    rows = {name: samples.y for name, samples in federation.train.items()}
    assert federation.counts.train == sum(len(y) for y in rows.values()) < sum(federation.counts.classes)
    assert list(federation.counts.classes) == sum(y.sum(0) for y in rows.values()).tolist()
    metas = [read_meta(directory, "landcover-multilabel", SceneMeta) for directory in labelled.values()]
    mean = np.average([meta.statistics.mean for meta in metas], axis=0, weights=[len(y) for y in rows.values()])
    assert federation.train["west"].spec["mean"] == pytest.approx(mean, rel=1e-9)
    (tmp_path / "pooled").mkdir()
    pooled = train(federation, tmp_path / "pooled", lambda rows: 0)
    results = train_in_threads(agreement, labelled, tmp_path, keys)
    assert {result["weights_sha256"] for result in results.values()} == {pooled["weights_sha256"]}


def test_several_labels_have_no_prior_to_adjust_to(labelled):
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    recipe = override(shipped_recipe("landcover-multilabel", smoke=True), {"optim.logit_adjustment": 1.0})
    identities = [each.identity() for each in keys.values()]
    agreement = propose(recipe, identities, ROWS, SHARDS, None, "avx2", 600.0)
    with pytest.raises(UsageError, match="has several labels"):
        join(agreement, labelled, PooledSums(agreement, {}))


def test_sites_that_average_have_the_same_network(scenes, tmp_path):
    """Although they have seen different numbers of shards, which batch norm counts."""
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    results = train_in_threads(agree(keys, local_steps=2), scenes, tmp_path, keys)
    assert len({result["weights_sha256"] for result in results.values()}) == 1
    averages = [entry for entry in read_ledger(tmp_path / "north" / "ledger.jsonl") if isinstance(entry, Average)]
    assert len(averages) > 2


def test_an_average_weighs_running_statistics_with_the_rows_of_the_sites(scenes):
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    agreement = agree(keys, local_steps=2)
    whole, sums = join(agreement, scenes, PooledSums(agreement, {})), Lockstep()
    scopes = {name: make_scope(replace(whole, train={name: whole.train[name]}, sums=sums)) for name in SITES}
    values = {name: torch.tensor([[2000.0 * place, -1.5]]) for place, name in enumerate(SITES)}
    counts = {name: torch.tensor(10 * (1 + place)) for place, name in enumerate(SITES)}
    given = []
    for name, scope in scopes.items():
        with pytest.raises(Collected) as collected:
            scope.average(2, [values[name], counts[name]])
        given.append(collected.value.args[0])
    sums.total = sum(given)
    for name, scope in scopes.items():
        assert scope.average(2, [values[name], counts[name]]) == SITES
        assert values[name].tolist() == [[2000 * 0.25 + 4000 * 0.25, -1.5]]
        assert counts[name] == round(10 * 0.5 + 20 * 0.25 + 30 * 0.25)


def test_a_step_takes_up_the_mean_of_the_shards_as_often_as_there_are_shards(scenes):
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    federation = join(agree(keys), scenes, PooledSums(agree(keys), {}))
    scope = make_scope(federation)
    layer = torch.nn.BatchNorm1d(1)
    statistics = ShardStatistics(layer)
    shards, means, variances = [24, 6, 6, 12], [1.0, -2.0, 3.0, 8.0], [0.5, 4.0, 1.0, 2.0]
    sums = scope.start_sums(None, 0, shards, 1 + statistics.width)  # type: ignore[arg-type]
    for place in (2, 0, 3, 1):
        row = torch.tensor([1.0, means[place], variances[place]], dtype=torch.float64)
        sums.add(place, torch.ones(2), row)
    rows = sums.complete(torch.empty(2))
    assert rows.shape == (4, 3) and rows[:, 0].sum() == 4
    statistics.fold(rows[:, 1:])
    share = 1 - 0.9**4
    assert layer.running_mean.item() == pytest.approx(share * np.average(means, weights=shards), rel=1e-6)
    assert layer.running_var.item() == pytest.approx(0.9**4 + share * np.average(variances, weights=shards), rel=1e-6)
    assert layer.num_batches_tracked == 4


def test_a_statistic_beyond_the_bound_is_refused(scenes):
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    scope = make_scope(join(agree(keys), scenes, PooledSums(agree(keys), {})))
    sums = scope.start_sums(None, 7, [24, 6, 6, 12], 3)  # type: ignore[arg-type]
    row = torch.tensor([1.0, 0.0, 2 * LARGEST_VALUE], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="step 7, the batch-norm statistics of a shard: a value of"):
        sums.add(0, torch.ones(2), row)


def test_statistics_from_sums_are_those_of_all_scenes(scenes):
    metas = [read_meta(directory, "landcover", SceneMeta) for directory in scenes.values()]
    sums = (sum_statistics(*of) for of in zip(metas, scenes.values(), strict=True))
    spec = pool_statistics(metas[0], sum(sums, np.zeros(12)))
    weights = [sum(meta.counts["train"].values()) for meta in metas]
    mean = np.average([meta.statistics.mean for meta in metas], axis=0, weights=weights)
    square = [np.square(meta.statistics.mean) + np.square(meta.statistics.std) for meta in metas]
    assert spec["mean"] == pytest.approx(mean, rel=1e-9)
    expected = np.sqrt(np.average(square, axis=0, weights=weights) - mean**2)
    assert spec["std"] == pytest.approx(expected, rel=1e-7) and max(metas[0].statistics.std) < min(spec["std"])


@pytest.mark.campaign
def test_three_processes_train_covidnet_to_the_weights_of_the_pooled_run(tmp_path):
    """With messages and masks; one site is killed on the way and starts again."""
    data, keys = {}, {name: PrivateKeys.generate(name) for name in SITES}
    for seed, name in enumerate(SITES):
        data[name] = tmp_path / "data" / name
        domain = "B" if name == "west" else "A"
        prepare_images("covidnet", data[name], *[None] * 4, source="synthetic", size=64, patients=60, seed=seed,
                       domain=domain)  # fmt: skip
    agreement = agree(keys, "covidnet")
    (tmp_path / "pooled").mkdir()
    pooled = train(join(agreement, data, PooledSums(agreement, {})), tmp_path / "pooled", lambda rows: 0)
    sign_in(agreement, keys, tmp_path / "exchange")
    processes = Processes()
    for name in SITES:
        kill_at = 7 if name == "south" else None
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name, kill_at)
    assert processes.wait("south") is None, "it was to be killed"
    processes.start("south", tmp_path / "exchange", keys["south"], data["south"], tmp_path / "south")
    results = {name: processes.wait(name) for name in SITES}
    assert {result["weights_sha256"] for result in results.values()} == {pooled["weights_sha256"]}
