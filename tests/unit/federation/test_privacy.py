"""Noise and the privacy budget: exact samples, what they cost, and that no message is ever sent with other noise."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from raylab.config.overrides import override
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.site_statistics import NAMES, add_up_patients
from raylab.data.moments import pool_moments, settle_moments
from raylab.errors import DataError, NonFiniteError, RunError, UsageError
from raylab.federation import discrete_gaussian, fixed_point
from raylab.federation.agreement import Agreement, propose
from raylab.federation.budget import spent_epsilon
from raylab.federation.exchange import Exchange
from raylab.federation.journal import Journal
from raylab.federation.keys import PrivateKeys
from raylab.federation.privacy import SIGMA, Privacy, count_participation, epsilon_of
from raylab.federation.rounds import Round
from raylab.federation.run import join, train
from raylab.federation.scope import make_scope
from raylab.federation.sums import PooledSums, SiteSums, add_noise
from raylab.tasks.recipes import shipped_recipe
from tests.unit.federation.test_sums import in_parallel
from tests.unit.federation.test_training import Processes, sign_in

SITES = ("north", "south", "west")
STEP = Round("step", 3)
BUDGET = Privacy(epsilon=1e4, delta=1e-5, noise_multiplier=0.5, colluding_sites=1)


@pytest.fixture(scope="module")
def keys() -> dict[str, PrivateKeys]:
    return {name: PrivateKeys.generate(name) for name in SITES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The prepared directory of each site: SYNTHETIC."""
    found = {}
    for seed, name in enumerate(SITES):
        found[name] = tmp_path_factory.mktemp("private") / name
        prepare_icu("ards", "synthetic", None, found[name], patients=40 + 10 * seed, seed=seed)
    return found


def agree(keys: dict[str, PrivateKeys], privacy: Privacy | None = BUDGET, patience: float = 30.0) -> Agreement:
    settings = {"loop.epochs": 1, "schedule.kind": "constant", "optim.logit_adjustment": 0.0}
    recipe = override(shipped_recipe("ards", smoke=True), settings)
    rows = [12, 10, 8]
    shards = [1, 1, 1] if privacy is None else rows
    identities = [each.identity() for each in keys.values()]
    return propose(recipe, identities, rows, shards, None, "avx2", patience, None, privacy)


def site(directory: Path, agreement: Agreement, keys: PrivateKeys, journal: Path) -> SiteSums:
    said: list[str] = []
    return SiteSums(Exchange(directory, agreement, keys), keys, agreement, said.append, Journal(journal))


@pytest.mark.parametrize("sigma", [1, 3])
def test_samples_have_the_probabilities_of_the_discrete_gaussian(sigma):
    """Chi-squared over all values that are expected 20 times or more; the tails are one class."""
    count = 60_000
    found = discrete_gaussian.sample(sigma, count)
    values = np.arange(-12 * sigma, 12 * sigma + 1)
    weights = np.exp(-(values**2) / (2 * sigma**2))
    expected = count * weights / weights.sum()
    common = values[expected >= 20]
    counts = np.array([(found == value).sum() for value in common])
    wanted = expected[expected >= 20]
    counts, wanted = np.append(counts, count - counts.sum()), np.append(wanted, count - wanted.sum())
    chi_squared = float(((counts - wanted) ** 2 / wanted).sum())
    free = len(counts) - 1
    assert free >= 4 and chi_squared < free + 6 * math.sqrt(2 * free)


def test_noise_has_the_moments_of_its_parameter_and_is_never_the_same():
    count = 50_000
    noise = discrete_gaussian.sample(SIGMA, count) / SIGMA
    assert abs(noise.mean()) < 6 / math.sqrt(count)
    assert abs(noise.var() - 1) < 6 * math.sqrt(2 / count)
    assert abs((noise**4).mean() - 3) < 6 * math.sqrt(96 / count)
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 6 / math.sqrt(count)
    assert len(set((noise * SIGMA).astype(int) % 2)) == 2, "the last bit is drawn as well"
    assert not np.array_equal(discrete_gaussian.sample(SIGMA, 100), discrete_gaussian.sample(SIGMA, 100))
    with pytest.raises(ValueError, match="not between"):
        discrete_gaussian.sample(2 * SIGMA, 1)


def gaussian_delta(epsilon: float, rho: float) -> float:
    """The exact delta of the continuous Gaussian mechanism with this rho (Balle and Wang, ICML 2018, Theorem 8)."""
    change = math.sqrt(2 * rho)  # in standard deviations

    def cumulative(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    left, right = cumulative(change / 2 - epsilon / change), cumulative(-change / 2 - epsilon / change)
    return left - math.exp(epsilon) * right


@pytest.mark.parametrize("rho", [0.005, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_epsilon_is_an_upper_bound_and_not_far_from_the_exact_one(rho, delta):
    epsilon = epsilon_of(rho, delta)
    assert gaussian_delta(epsilon, rho) <= delta, "it promises more than the Gaussian mechanism keeps"
    assert gaussian_delta(0.8 * epsilon, rho) > delta, "a fifth less would still be kept"
    assert epsilon < rho + 2 * math.sqrt(rho * math.log(1 / delta)), "the simple bound is better"
    assert epsilon_of(0.0, delta) == 0


def test_a_patient_is_accounted_by_the_steps_that_read_the_patients_rows():
    patients = np.array([0, 0, 1, 2, 2, 2])
    steps = [np.array([0, 2]), np.array([0, 1, 3]), np.array([3, 4, 5])]
    assert count_participation(patients, steps[:1]) == 1
    assert count_participation(patients, steps[:2]) == 1 + 4  # patient 0: one row, then two at once
    assert count_participation(patients, steps) == 1 + 9  # patient 2: one row, then three at once


def test_less_noise_or_more_collusion_costs_more_and_the_needed_noise_is_found():
    few = BUDGET.model_copy(update={"epsilon": 4.0, "noise_multiplier": 2.0})
    spent = few.spent_epsilon(3, 10)
    assert few.model_copy(update={"noise_multiplier": 1.0}).spent_epsilon(3, 10) > spent
    assert few.spent_epsilon(3, 20) > spent
    needed = few.find_multiplier(3, 10)
    assert few.model_copy(update={"noise_multiplier": needed}).spent_epsilon(3, 10) <= 4
    assert few.model_copy(update={"noise_multiplier": needed * 0.98}).spent_epsilon(3, 10) > 4
    alone, all_three = (few.model_copy(update={"colluding_sites": k}).scale(3, 1.0) for k in (2, 0.001))
    assert alone < all_three, "a site that may be alone against the others adds more noise to the same value"


def test_the_noise_of_a_step_is_the_agreed_one_and_rows_are_limited(keys, data):
    """The sum of a step in which every row but one has no gradient."""
    agreement = agree(keys)
    scope = make_scope(join(agreement, data, PooledSums(agreement, {})))
    sums = scope.start_sums(None, 0, [1] * 30, 1)  # type: ignore[arg-type]
    size = 40_000
    for row in range(30):
        gradient = torch.zeros(size)
        gradient[0] = 30.0 if row == 0 else 0.0  # 30 times the bound, of a part of 1 / 30
        sums.add(row, gradient, torch.full((1,), 0.7, dtype=torch.float64))
    total = torch.empty(size)
    rows = sums.complete(total)
    assert scope.clipped == 1 and float(rows.sum()) == pytest.approx(21)
    deviation = 0.5 / 30 * math.sqrt(3 / 2)  # of three sites, of which two count
    assert float(total[1:].std()) == pytest.approx(deviation, rel=6 / math.sqrt(2 * size))
    assert abs(float(total[0]) - 1 / 30) < 7 * deviation


def test_a_gradient_that_is_not_finite_is_refused(keys, data):
    scope = make_scope(join(agree(keys), data, PooledSums(agree(keys), {})))
    sums = scope.start_sums(None, 4, [1] * 30, 1)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="step 4, the gradient of a row: a value is NaN"):
        sums.add(0, torch.tensor([1.0, math.nan]), torch.ones(1))


def test_a_site_sends_a_message_once_and_never_with_other_noise(tmp_path, keys):
    agreement = agree(keys)
    exchange, values = tmp_path / "exchange", np.zeros(50, np.int64)
    exchange.mkdir()
    sites = {name: site(exchange, agreement, keys[name], tmp_path / name) for name in SITES}
    totals = in_parallel({name: lambda name=name: sites[name].add_up(STEP, values, 50) for name in SITES})
    first = totals["north"]
    assert all(np.array_equal(total, first) for total in totals.values()) and np.abs(first).max() > SIGMA / 2
    sent = {path.name: path.read_bytes() for path in (exchange / "messages").iterdir()}

    again = site(exchange, agreement, keys["west"], tmp_path / "west")  # it was killed, and resumes
    assert np.array_equal(again.add_up(STEP, values, 50), first)
    (mine,) = (exchange / "messages").glob("*.west.msg")
    mine.unlink()  # before it was carried anywhere: the same noise is sent again
    again = site(exchange, agreement, keys["west"], tmp_path / "west")
    assert np.array_equal(again.add_up(STEP, values, 50), first)
    payload = mine.read_bytes().split(b"\n", 3)[3]
    assert payload == sent[mine.name].split(b"\n", 3)[3]

    (kept,) = (tmp_path / "west").glob("*.msg")
    assert kept.stat().st_mode & 0o077 == 0 and (tmp_path / "west").stat().st_mode & 0o077 == 0
    kept.unlink()
    with pytest.raises(RunError, match="would spend the privacy budget twice"):
        site(exchange, agreement, keys["west"], tmp_path / "west").add_up(STEP, values, 50)
    with pytest.raises(RunError, match="already sent other values"):  # nothing at all is left of the journal
        site(exchange, agreement, keys["west"], tmp_path / "new").add_up(STEP, values, 50)


def test_the_journal_keeps_what_a_site_may_have_to_send_again(tmp_path):
    journal = Journal(tmp_path)
    for round in (Round("statistics", 0), Round("step", 0), Round("step", 1), Round("validation", 2), Round("step", 2)):
        journal.keep(round, lambda: np.arange(3))
    journal.forget(2)
    assert sorted(path.stem for path in tmp_path.glob("*.msg")) == [
        "00000000-statistics",
        "00000002-step",
        "00000002-validation",
    ]
    assert journal.keep(Round("step", 2), lambda: np.zeros(3)).tolist() == [0, 1, 2]


def test_a_run_with_a_budget_does_not_go_on_without_a_site(tmp_path, keys):
    """The noise of the others would not be enough, and repeating the round would spend it twice."""
    agreement = agree(keys, patience=0.2)
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    sites = {name: site(exchange, agreement, keys[name], tmp_path / name) for name in ("north", "west")}
    values = np.zeros(5, np.int64)
    ends = in_parallel({name: lambda s=s: s.add_up(STEP, values, 5) for name, s in sites.items()})
    assert all("needs the noise of all its sites" in str(end) for end in ends.values())
    assert not list((exchange / "messages").glob("*.exclude"))


class Spy(PooledSums):
    """Notes what is added up, and how many of its values get noise."""

    def __init__(self, agreement: Agreement) -> None:
        super().__init__(agreement, {})
        self.seen: list[tuple[Round, int, int]] = []

    def add_up(self, round: Round, values: Any, noisy: int = 0) -> Any:
        self.seen.append((round, len(values), noisy))
        return super().add_up(round, values, noisy)


def test_all_that_depends_on_values_has_noise(tmp_path, keys, data):
    """Rows are counted, and weights compared, without noise; everything else that is added up has it. The run says what
    it has spent, and no other one begins with the same statistics."""
    agreement = agree(keys)
    spy = Spy(agreement)
    federation = join(agreement, data, spy)
    assert federation.counts.classes == () and federation.inputs_left_out > 0
    result = train(federation, tmp_path, lambda rows: 0)
    plain = {(round.kind, size - noisy) for round, size, noisy in spy.seen if size > noisy}
    assert plain == {("rows", 2), ("validation", 4)}, "the number of rows, and a checksum of the weights"
    assert {round.kind for round, _, noisy in spy.seen if noisy} == {"statistics", "step", "validation"}
    again = join(agreement, data, PooledSums(agreement, {}))
    assert again.train["north"].spec["mean"] != federation.train["north"].spec["mean"]
    spent = result["federation"]["epsilon"]
    assert spent.keys() == data.keys() and all(0 < epsilon < 1e4 for epsilon in spent.values())
    assert spent["north"] == spent_epsilon(federation, "north", result["steps"]) > spent_epsilon(federation, "north", 1)


def test_more_steps_than_the_budget_allows_are_refused_before_anything_but_the_rows_is_sent(keys, data):
    agreement = agree(keys, BUDGET.model_copy(update={"epsilon": 2.0}))
    spy = Spy(agreement)
    with pytest.raises(UsageError, match="2 is agreed") as refused:
        join(agreement, data, spy)
    assert [round.kind for round, _, _ in spy.seen] == ["rows"]
    enough = float(str(refused.value).partition("--noise-multiplier ")[2].split()[0])
    again = agree(keys, BUDGET.model_copy(update={"epsilon": 2.0, "noise_multiplier": enough}))
    spy = Spy(again)
    with pytest.raises(DataError, match="no input of the model stands out from the noise"):  # of so few patients
        join(again, data, spy)
    assert [round.kind for round, _, _ in spy.seen] == ["rows", "statistics"]


@pytest.mark.campaign
def test_sites_that_are_killed_end_with_the_same_weights_and_send_nothing_twice(tmp_path, keys, data):
    """In three processes. A message with other noise than before would be refused, as one that was sent is."""
    agreement = agree(keys)
    sign_in(agreement, keys, tmp_path / "exchange")
    processes = Processes()
    for name in SITES:
        kill_at = {"south": 4, "west": 6}.get(name)
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name, kill_at)
    for name in ("south", "west"):
        assert processes.wait(name) is None, "it was to be killed"
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name)
    results = {name: processes.wait(name) for name in SITES}
    assert len({result["weights_sha256"] for result in results.values()}) == 1
    assert results["west"]["attempts"] == 2 and results["west"]["steps"] >= 3


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shards": [1, 1, 1]}, "every row is a shard"),
        ({"local_steps": 2}, "have no bound"),
        ({"task": "covidnet"}, "not sums over patients"),
        ({"logit": 1.0}, "optim.logit_adjustment needs the number of rows of each class"),
        ({"colluding": 3}, "3 of 3 sites may collude"),
    ],
)
def test_an_agreement_that_a_budget_does_not_fit_is_refused(keys, changes, why):
    recipe = shipped_recipe(changes.get("task", "ards"), smoke=True)
    if "task" not in changes:
        recipe = override(recipe, {"optim.logit_adjustment": changes.get("logit", 0.0)})
    privacy = BUDGET.model_copy(update={"colluding_sites": changes.get("colluding", 1)})
    identities = [each.identity() for each in keys.values()]
    shards, local_steps = changes.get("shards", [4, 4, 4]), changes.get("local_steps")
    with pytest.raises(UsageError, match="cannot have a privacy budget") as refused:
        propose(recipe, identities, [4, 4, 4], shards, None, "avx2", 30.0, local_steps, privacy)
    assert why in str(refused.value)


def test_statistics_count_each_patient_once(data):
    """Against a loop over the patients of plain numbers."""
    found = add_up_patients(data["west"])
    rows = pl.read_parquet(data["west"] / "samples.parquet").filter(pl.col("split") == "train")
    hours = pl.read_parquet(data["west"] / "hours.parquet")
    patients = sorted(rows["subject_id"].unique())
    assert found.shape == (len(patients), 3 * len(NAMES)) and found.min() >= 0 and found.max() <= 1
    from raylab.data.icu.concepts import CONCEPTS

    concept, place = CONCEPTS["hr"], NAMES.index("hr")
    for number, patient in enumerate(patients):
        stays = rows.filter(pl.col("subject_id") == patient)["stay_id"].unique().to_list()
        values = hours.filter(pl.col("stay_id").is_in(stays))["hr"].drop_nulls().to_numpy().astype(float)
        scaled = (values - concept.low) / (concept.high - concept.low)
        expected = [1, scaled.mean(), (scaled**2).mean()] if len(values) else [0, 0, 0]
        assert found[number].reshape(3, -1)[:, place] == pytest.approx(expected)


def test_statistics_with_noise_are_possible_ones():
    exact = np.array([1000.0, 40.0, 1000.0, 300.0, 4.0, 900.0, 100.0, 0.5, 700.0])
    n, mean, std = pool_moments(settle_moments(exact, 20.0))
    assert n.tolist() == [1000, 0, 1000] and mean[0] == pytest.approx(0.3)
    assert std[0] == pytest.approx(0.1) and std[2] == pytest.approx(0.02), "a negative variance becomes the least"
    assert mean[1] == std[1] == 0, "what few patients have is left out"


def test_noise_is_added_to_the_first_values_alone():
    values = np.array([5, -7, 2**62, 11], np.int64)
    noisy = add_noise(values, 2)
    assert np.array_equal(noisy[2:], values[2:]) and not np.array_equal(noisy[:2], values[:2])
    assert np.abs(fixed_point.add(noisy, -values)[:2]).max() < 20 * SIGMA
