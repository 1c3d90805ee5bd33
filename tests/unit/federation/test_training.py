"""Three sites that share nothing but a directory train to the bits of a run that has all their rows.

Each site is a process; the data is small and SYNTHETIC, and the sites' patients differ.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from raylab.config.overrides import override
from raylab.data.icu.meta import IcuMeta
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.site_statistics import NAMES, pool_statistics, sum_statistics
from raylab.data.prepared import read_meta, sha256
from raylab.federation import sums as sums_of_sites
from raylab.federation.agreement import Agreement, propose, read_agreement, sign, write_agreement
from raylab.federation.arithmetic import describe_arithmetic
from raylab.federation.exchange import Exchange, Inbox
from raylab.federation.federation import PooledSamples
from raylab.federation.journal import Journal
from raylab.federation.keys import PrivateKeys
from raylab.federation.rounds import Round
from raylab.federation.run import SitePeers, join, train
from raylab.federation.scope import make_scope
from raylab.federation.sums import PooledSums, SiteSums, find_exclusions
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training import checkpoint
from raylab.training.ledger import Average, read_ledger
from raylab.training.loop import Report, Training
from tests.wait import wait_for

SITES = ("north", "south", "west")
PATIENTS = {"north": 120, "south": 60, "west": 80}
RECIPE = override(
    shipped_recipe("ards", smoke=True),
    {
        "model.dropout": 0.3,
        "loop.epochs": 2,
        "loop.ema_decay": 0.9,
        "loop.checkpoint_steps": 2,
        "optim.logit_adjustment": 0.5,
        "schedule.kind": "plateau",
        "schedule.patience": 0,
    },
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The prepared directory of each site."""
    found = {}
    for seed, (name, patients) in enumerate(PATIENTS.items()):
        found[name] = tmp_path_factory.mktemp("sites") / name
        prepare_icu("ards", "synthetic", None, found[name], patients=patients, seed=seed)
        mark(found[name], f"CANARY-{name}-7f3a")
    return found


def mark(directory: Path, canary: str) -> None:
    """Put `canary` into every identifier and into the notes of a prepared directory."""
    meta = json.loads((directory / "meta.json").read_text())
    for file in ("samples.parquet", "hours.parquet"):
        table = pl.read_parquet(directory / file)
        ids = [name for name in ("stay_id", "subject_id") if name in table.columns]
        table.with_columns((pl.lit(canary) + pl.col(name)).alias(name) for name in ids).write_parquet(directory / file)
        meta["files"][file] = sha256(directory / file)
    (directory / "meta.json").write_text(json.dumps(meta | {"notes": [*meta["notes"], canary]}))


@pytest.fixture(scope="module")
def pooled(data, tmp_path_factory) -> dict[str, Any]:
    """The result of the run that has all rows; its agreement has other keys and no masks."""
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    agreement = agree(keys)
    return train(join(agreement, data, PooledSums(agreement, {})), tmp_path_factory.mktemp("pooled"), lambda rows: 0)


def agree(
    keys: dict[str, PrivateKeys], patience: float = 600.0, bound: float | None = None, local_steps: Any = None
) -> Agreement:
    identities = [each.identity() for each in keys.values()]
    return propose(RECIPE, identities, [32, 13, 19], [1, 2, 2], bound, "avx2", patience, local_steps)


def set_up(exchange: Path, **options: Any) -> dict[str, PrivateKeys]:
    """A signed agreement in a new exchange directory; returns the keys of all sites."""
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    sign_in(agree(keys, **options), keys, exchange)
    return keys


def sign_in(agreement: Agreement, keys: dict[str, PrivateKeys], exchange: Path) -> None:
    """Write the agreement into a new exchange directory, signed by all sites."""
    write_agreement(agreement, exchange)
    for each in keys.values():
        sign(read_agreement(exchange), each, exchange)


class Clock:
    """The time of a site, which is an hour ahead from the first sleep on that ends after `file` was written."""

    def __init__(self, file: Path) -> None:
        self.file, self.ahead = file, 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.ahead = 3600.0 if self.file.exists() else 0.0


def run_site(exchange: Path, keys: PrivateKeys, data: Path, directory: Path, kill_at: int | None = None) -> Any:
    """Train as one site; with `kill_at`, this process ends itself by SIGKILL after that many rounds. Its patience is
    over once the file `over` is beside the exchange directory."""
    agreement = read_agreement(exchange)
    sums_of_sites.time = Clock(exchange.with_name("over"))  # type: ignore[assignment]
    directory.mkdir(exist_ok=True)

    def saved_step() -> int:
        here = checkpoint.list_checkpoints(directory / "checkpoints")
        return int(here[-1].name.removeprefix("step-")) if len(here) > 1 else 0

    journal = None if agreement.privacy is None else Journal(directory / "sent")
    sums = SiteSums(Exchange(exchange, agreement, keys, saved_step), keys, agreement, print, journal)
    publish = sums.exchange.publish

    def publish_or_die(*arguments: Any) -> None:
        publish(*arguments)
        if sums.exchange.sequence == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sums.exchange.publish = publish_or_die  # type: ignore[method-assign]
    result = train(join(agreement, {keys.site: data}, sums), directory, lambda rows: 0)
    return result | {"rounds": sums.rounds}


def _answer(pipe: Any, cores: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(cores)
    try:
        pipe.send(work(*arguments))
    except Exception as error:
        pipe.send(error)


class Processes:
    """Sites as processes, forked from a server that has imported torch."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["raylab.federation.run", "pytest", "hypothesis", "raylab.data.icu.prepare"]
        )
        self.running: dict[str, tuple[Any, Any]] = {}

    def start(self, name: str, *arguments: Any) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        cores = 1 + len(self.running) % 2  # sites have different machines
        process = self.context.Process(target=_answer, args=(theirs, cores, run_site, arguments))
        process.start()
        theirs.close()
        self.running[name] = process, ours

    def wait(self, name: str) -> Any:
        """The result of a site, or None if it was killed."""
        process, pipe = self.running.pop(name)
        assert pipe.poll(240), f"{name} does not answer"
        try:
            result = pipe.recv()
        except EOFError:
            result = None
        process.join(20)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def processes():
    made = Processes()
    yield made
    for process, _ in made.running.values():
        process.kill()


def test_three_sites_reach_the_weights_of_the_pooled_run(tmp_path, data, pooled, processes):
    """Two of them are killed on the way, at the beginning and in the middle, and start again. No message has a marked
    identifier, note or file name, or values of a row."""
    keys = set_up(tmp_path / "exchange")
    kills = {"north": None, "south": 3, "west": 9}
    for name in SITES:
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name, kills[name])
    for name in ("south", "west"):
        assert processes.wait(name) is None, "it was to be killed"
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name)
    results = {name: processes.wait(name) for name in SITES}
    assert {result["weights_sha256"] for result in results.values()} == {pooled["weights_sha256"]}
    assert all(result["val"] == pooled["val"] and result["best"] == pooled["best"] for result in results.values())
    assert results["north"]["federation"]["sites"] == list(SITES) and results["west"]["attempts"] == 2
    assert pooled["steps"] > 4, "too short to show anything"

    files = [path for path in (tmp_path / "exchange").rglob("*") if path.is_file()]
    sent = b"".join(path.read_bytes() + path.name.encode() for path in files)
    assert len(files) > 20 and b"CANARY" not in sent
    for name in SITES:
        values = pl.read_parquet(data[name] / "hours.parquet").select(pl.col(pl.Float32)).to_numpy()
        rows = [row for row in values[:: len(values) // 50] if np.isfinite(row).sum() > 2]
        assert rows and not [row for row in rows if row[np.isfinite(row)].tobytes() in sent]


class Collected(Exception):
    """Raised with the values that a site adds to a sum."""


class Lockstep:
    """Sums over sites that take turns in one process: a site first gives its values, and later gets the total."""

    def __init__(self) -> None:
        self.total: Any = None

    def add_up(self, round: Round, values: Any, noisy: int = 0) -> Any:
        if self.total is None:
            raise Collected(values)
        return self.total

    def sites(self, round: Round) -> tuple[str, ...]:
        return SITES


def train_in_turns(agreement: Agreement, data: dict[str, Path]) -> tuple[dict[str, Any], list[Any]]:
    """The results of sites that average their weights, without messages, masks and processes; and for each average the
    networks before it and after it."""
    whole, sums = join(agreement, data, PooledSums(agreement, {})), Lockstep()
    task, sites, averages = whole.task, {}, []
    for name in SITES:
        own = replace(whole, train={name: whole.train[name]}, val={name: whole.val[name]}, sums=sums)
        samples, val = PooledSamples(own.train), PooledSamples(own.val)
        model = task.model(whole.recipe, samples.spec)
        sites[name] = Training(
            whole.recipe, task, model, samples, val, Report(), "cpu", False, peers=SitePeers(), scope=make_scope(own)
        )
        sites[name].regroup()
    while not all(site.final for site in sites.values()):
        given, sums.total = {}, None
        for name, site in sites.items():
            try:
                while (action := site.next_action()) is not None:
                    action()
            except Collected as collected:
                given[name] = collected.args[0]
        if not given:
            break
        sums.total = sum(given.values())
        is_average = next(iter(sites.values())).is_average_due()
        before = [[weight.detach().clone() for weight in site.weights] for site in sites.values()]
        for site in sites.values():
            action = site.next_action()
            assert action is not None
            action()
        if is_average:
            averages.append((before, [[weight.detach().clone() for weight in s.weights] for s in sites.values()]))
    for site in sites.values():
        site.inputs.close()
    return {name: site.final for name, site in sites.items()}, averages


def test_sites_average_their_weights_by_the_rows_that_they_have_used(data):
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    results, averages = train_in_turns(agree(keys, local_steps=2), data)
    steps, per_epoch = results["north"]["steps"], results["north"]["steps"] // RECIPE.loop.epochs
    due = [step for step in range(1, steps + 1) if step % 2 == 0 or step % per_epoch == 0]
    assert len(averages) == len(due) and len(due) < steps, "local steps must make a difference"
    for before, after in averages:
        assert all(torch.equal(own, first) for site in after for own, first in zip(site, after[0], strict=True))
        for place, weight in enumerate(after[0]):
            parts = [n / 64 * site[place].double() for n, site in zip((32, 13, 19), before, strict=True)]
            assert torch.allclose(weight.double(), sum(parts), atol=1e-9, rtol=1e-6)  # type: ignore[arg-type]
        assert not torch.equal(before[0][0], before[1][0])


def test_averaged_weights_are_the_same_after_kills(tmp_path, data, processes):
    """One site is killed between two averages, one while it waits for one; the ledgers have the same averages."""
    keys = set_up(tmp_path / "exchange", local_steps=2)
    expected, _ = train_in_turns(read_agreement(tmp_path / "exchange"), data)
    kills = {"north": None, "south": 6, "west": 7}
    for name in SITES:
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name, kills[name])
    for name in ("south", "west"):
        assert processes.wait(name) is None, "it was to be killed"
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name)
    results = {name: processes.wait(name) for name in SITES}
    assert {result["weights_sha256"] for result in results.values()} == {expected["west"]["weights_sha256"]}
    assert all(result["val"] == expected["west"]["val"] for result in results.values())
    lines = {name: read_ledger(tmp_path / name / "ledger.jsonl") for name in SITES}
    averages = {
        name: {(e.average, e.sites, e.weights_sha256) for e in entries if isinstance(e, Average)}
        for name, entries in lines.items()
    }
    assert averages["north"] == averages["south"] == averages["west"]
    assert len(averages["north"]) == len({step for step, _, _ in averages["north"]}) > 2
    assert len(list((tmp_path / "exchange" / "messages").glob("*-average.*"))) >= 3


def is_stuck(exchange: Path) -> bool:
    """Whether north and west have sent their parts of the same round, in which nothing of south is."""
    files = list(Inbox(exchange, read_agreement(exchange)).list_files())
    newest = {name: max(round.order for _, round, _, sender, _ in files if sender == name) for name in SITES}
    return newest["south"] < newest["north"] == newest["west"]


def test_the_others_go_on_without_a_lost_site(tmp_path, data, processes):
    """And the pooled run that leaves the same rows out from the same step on has the same weights."""
    keys = set_up(tmp_path / "exchange")
    for name in SITES:
        kill_at = 9 if name == "south" else None
        processes.start(name, tmp_path / "exchange", keys[name], data[name], tmp_path / name, kill_at)
    assert processes.wait("south") is None
    wait_for(lambda: is_stuck(tmp_path / "exchange"), 240, "the round that the lost site is not in")
    (tmp_path / "over").touch()
    results = {name: processes.wait(name) for name in ("north", "west")}
    assert results["north"]["weights_sha256"] == results["west"]["weights_sha256"]
    assert results["north"]["federation"]["sites"] == ["north", "west"]
    agreement = read_agreement(tmp_path / "exchange")
    excluded = find_exclusions(Exchange(tmp_path / "exchange", agreement, keys["north"]))
    assert list(excluded) == ["south"]
    for name in ("again", "whole"):
        (tmp_path / name).mkdir()
    again = train(join(agreement, data, PooledSums(agreement, excluded)), tmp_path / "again", lambda rows: 0)
    assert again["weights_sha256"] == results["north"]["weights_sha256"]
    whole = train(join(agreement, data, PooledSums(agreement, {})), tmp_path / "whole", lambda rows: 0)
    assert whole["weights_sha256"] != results["north"]["weights_sha256"]


def test_statistics_from_sums_are_those_of_all_rows(data):
    metas = {name: read_meta(data[name], "ards", IcuMeta) for name in SITES}
    spec = pool_statistics(
        metas["west"], sum((sum_statistics(meta) for meta in metas.values()), np.zeros(3 * len(NAMES)))
    )
    tables = []
    for name in SITES:
        stays = pl.read_parquet(data[name] / "samples.parquet").filter(pl.col("split") == "train")["stay_id"]
        table = pl.read_parquet(data[name] / "hours.parquet")
        tables.append(table.filter(pl.col("stay_id").is_in(stays.to_list()) & (pl.col("hour") < spec["hours"])))
    for feature in ("hr", "map", "spo2"):
        values = pl.concat(
            [table[feature].cast(pl.Float64) for table in tables if feature in table.columns]
        ).drop_nulls()
        place = spec["features"].index(feature)
        assert spec["mean"][place] == pytest.approx(values.mean(), rel=1e-9)
        assert spec["std"][place] == pytest.approx(values.std(ddof=0), rel=1e-7)


def test_a_step_is_the_gradient_of_the_mean_loss_over_the_rows_of_all_sites(data):
    """Compared with one backward pass of plain torch over the same rows."""
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    agreement = agree(keys, bound=1e4)
    federation = join(agreement, data, PooledSums(agreement, {}))
    scope, samples, task = make_scope(federation), PooledSamples(federation.train), find_task("ards")
    _, shards = scope.shards_of(0)
    assert [len(rows) for rows in shards] == [32, 7, 6, 10, 9]
    model = task.model(federation.recipe, samples.spec).eval()
    weights = list(model.parameters())
    rows = np.concatenate(shards)
    owners = np.searchsorted(list(samples.starts.values()), rows, side="right") - 1
    assert (np.diff(owners) >= 0).all() and np.bincount(owners).tolist() == [32, 13, 19]

    def losses(chosen: np.ndarray) -> torch.Tensor:
        logits = model(samples.batch(chosen)) + scope.offset
        return task.outcome.loss(logits, torch.from_numpy(samples.y[chosen]), None)

    sums = scope.start_sums(None, 0, [len(each) for each in shards], 1)  # type: ignore[arg-type]
    for number, chosen in enumerate(shards):
        loss = losses(chosen).sum()
        gradient = torch.autograd.grad(loss / len(rows), weights)
        sums.add(number, torch.cat([g.flatten() for g in gradient]), loss.detach().double().reshape(1))
    total = torch.empty(sum(w.numel() for w in weights))
    loss_sum = sums.complete(total)[:, 0].sum()
    mean = losses(rows).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(mean, weights)])
    assert torch.allclose(total, expected, atol=1e-7) and expected.abs().max() > 1e-3
    assert float(loss_sum) / len(rows) == pytest.approx(float(mean.detach()), rel=1e-6)
    assert scope.clipped == 0


def test_a_gradient_beyond_the_bound_is_scaled_down_and_counted(data):
    keys = {name: PrivateKeys.generate(name) for name in SITES}
    agreement = agree(keys, bound=1e-3)
    scope = make_scope(join(agreement, data, PooledSums(agreement, {})))
    sums = scope.start_sums(None, 0, [32, 7, 6, 10, 9], 1)  # type: ignore[arg-type]
    total = torch.empty(4)
    sums.add(0, torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.ones(1))
    sums.complete(total)
    assert scope.clipped == 1
    assert torch.allclose(total, torch.tensor([0.6, 0.8, 0, 0]) * 1e-3 * 32 / 64)


def test_pooled_samples_are_read_as_each_site_reads_them(data):
    task = find_task("ards")
    parts = {name: task.load(data[name], "train", RECIPE.data, None) for name in SITES[:1]}
    parts["south"] = task.load(data["south"], "train", RECIPE.data, parts["north"].spec)
    samples = PooledSamples(parts)
    index = np.array([len(samples) - 1, 0, samples.starts["south"]])
    x = samples.batch(index)
    assert torch.equal(x[0], parts["south"].batch(np.array([len(parts["south"]) - 1]))[0])
    assert torch.equal(x[1:2], parts["north"].batch(np.array([0]))) and torch.equal(
        x[2:], parts["south"].batch(np.array([0]))
    )
    assert len(set(samples.group.tolist())) == sum(len(set(part.group.tolist())) for part in parts.values())


def test_the_arithmetic_is_described():
    facts = describe_arithmetic()
    assert facts["vector instructions"] and facts["version of torch"] and "?" not in facts["kind of CPU"]
    assert Round("step", 0).order < Round("validation", 1).order < Round("step", 1).order
