"""What each verb writes when it opens, ends and registers runs, killed at every write and continued.

    python -m tests.kill_cases [VERB ...]      # prints the table of kill points

Each verb is counted once (tests/kills.py), then killed at its writes, then continued as its user would, half of the
times after a `sync`. This is a program of its own, because the threads of polars do not survive a fork: a process that
has used it cannot be forked.
"""

import atexit
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import cli, sync, tune
from jobs.common import figures, home, run_tracking, scores, training
from raylab.config.overrides import override
from raylab.config.recipe import flatten
from raylab.files import write_json
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.run import execute, load_samples
from tests.kills import Writes, run_in_child
from tests.verbs import Verbs
from tests.wait import wait_for
from tracking import runs
from tracking.forwarder import Forwarder

# What verbs import when they need it: here once, and not in each of the forked processes
for name in ("mlflow.pyfunc", "scipy.stats", "sklearn.metrics", "tracking.server", "jobs.fit", "jobs.simulate",
             "jobs.common.predictors", "jobs.common.provenance", "raylab.data.icu.sources.synthetic",
             "raylab.distributed.map", "raylab.physiology.views"):  # fmt: skip
    importlib.import_module(name)

KILLED = -9
SITES = ("north", "south")
ROWS = [{"step": step, "epoch": step // 2, "train/loss": 1 / step, "val/auroc": 0.5 + step / 10} for step in (1, 2, 3)]
RESULT = {
    "steps": 3, "epochs": 2, "best": {"step": 3, "epoch": 1, "loss": 0.3, "auroc": 0.8}, "val": {"loss": 0.3},
    "weights_sha256": "0" * 64, "attempts": 1, "steps_repeated": 0, "stopped": "planned",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A verb. `work` is done, and killed; `again` continues it, by default as it began. `check` looks at the end."""

    work: Callable[[], None]
    check: Callable[[], None]
    prepare: Callable[[], None] = lambda: None
    again: Callable[[], None] | None = None


class Place:
    """A home, put back before each kill, and what the verbs need."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.home, self.out, self.data = root, root / "home", root / "home" / "out", data
        self.recipe, self.meta = shipped_recipe("ards", smoke=True), find_task("ards").read_meta(data)
        self.empty = root / "empty"
        runs.database(self.home)  # MLflow's tables; this process does not open them again
        self.home.rename(self.empty)
        self.log = root / "log"

    @property
    def first(self) -> Path:
        return self.home / "runs" / "first"

    @property
    def trial(self) -> Path:
        return self.first / "trials" / "000"

    def put_back(self, template: Path) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(template, self.home)

    def describe(self, kind: Any) -> run_tracking.NewRun:
        uri = run_tracking.checked_address()
        return run_tracking.describe_run(self.first, self.recipe, self.meta, self.data, kind, uri)


def look_up(kind: str) -> Any:
    """The only MLflow run of a kind, as far as anybody can see: no other was made and deleted."""
    from mlflow.entities import ViewType

    client = runs.client(runs.address(home.home()))
    experiments = [e.experiment_id for e in client.search_experiments(ViewType.ALL)]
    found = client.search_runs(experiments, f"tags.`raylab.kind` = '{kind}'", ViewType.ALL)
    assert len(found) == 1, f"{len(found)} runs of kind {kind}"
    return found[0]


def check_run(kind: str, directory: Path, params: dict[str, str], artifacts: set[str], rows: dict[str, list]) -> Any:
    """It is there once, with all that it began with and all points once, and so is its record."""
    run = look_up(kind)
    client = runs.client(runs.address(home.home()))
    record = home.note(directory)
    assert record.run_id == run.info.run_id and record.status == run.info.status
    assert run.data.params == params, {n: (v, params.get(n)) for n, v in run.data.params.items() if v != params.get(n)}
    assert artifacts <= {file.path for file in client.list_artifacts(run.info.run_id)}
    for name, steps in rows.items():
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == steps, name
    assert set(run.data.tags) >= {"raylab.code_revision", "raylab.task", runs.KEY}
    return run


def check_sync() -> str:
    """`sync` after the kill: nothing is left over, nothing waits, nothing runs; how the runs ended."""
    said = sync.once(quiet=True)
    assert said["exit_code"] == 0, said
    assert not (home.home() / "runs" / home.OPENING).exists()
    from mlflow.entities import ViewType

    client = runs.client(runs.address(home.home()))
    experiments = [e.experiment_id for e in client.search_experiments(ViewType.ALL)]
    ends = [run.info.status for run in client.search_runs(experiments, "", ViewType.ALL)]
    assert "RUNNING" not in ends and len(ends) == len([*home.records(), *home.records("*/trials/*")])
    return ", ".join(sorted(ends)) or "no run"


# the verbs


def opening(place: Place) -> Case:
    """What `train`, `transfer` and `tune` do before and after they train."""

    def body() -> None:
        run_tracking.ToOutbox(place.first)(ROWS)

    def work() -> None:
        with run_tracking.open_run(home.new_run("first", "ards"), place.describe("train")):
            body()

    def again() -> None:
        if not (place.first / "run.json").exists():
            work()
            return
        with run_tracking.reopen_run(home.find("first")):
            body()

    def check() -> None:
        params = {name: str(value) for name, value in flatten(place.recipe).items()}
        rows = {"train/loss": [1, 2, 3], "val/auroc": [1, 2, 3]}
        run = check_run("train", place.first, params, {"recipe.json", "attrition.json"}, rows)
        assert len(run.inputs.dataset_inputs) == 1
        assert json.loads((place.first / "recipe.json").read_text())["task"] == "ards"

    return Case(work, check, again=again)


def start_search(place: Place) -> None:
    with run_tracking.open_run(place.first, place.describe("tune")):
        write_params(place)


def write_params(place: Place) -> None:
    place.trial.mkdir(parents=True)
    write_json(place.trial / "params.json", {"optim.lr": 0.01})


def trial(place: Place) -> Case:
    """What a search does for a trial in its own process, from its start to its end."""

    def work() -> None:
        with run_tracking.reopen_run(place.first) as forwarder:
            watch = tune.ToMlflow(place.first, place.recipe, forwarder, quiet=True)
            if not (place.trial / "end.json").exists():
                watch.started(0, {"optim.lr": 0.01})
                for row in ROWS:
                    watch.row(0, row)
                write_json(place.trial / "result.json", RESULT)
                write_json(place.trial / "end.json", {"how": "planned", "objective": 0.8, "params": {"optim.lr": 0.01}})
                watch.ended(0, "planned")

    def check() -> None:
        recipe = override(place.recipe, {"optim.lr": 0.01})
        params = {name: str(value) for name, value in flatten(recipe).items() if not name.startswith("search.")}
        rows = {"val/auroc": [1, 2, 3], "best/val/auroc": [3]}
        run = check_run("trial", place.trial, params, {"recipe.json"}, rows)
        assert run.data.tags["mlflow.parentRunId"] == look_up("tune").info.run_id
        assert run.data.tags["raylab.stopped"] == "planned"

    return Case(work, check, prepare=lambda: start_search(place))


def run_verb(*words: object) -> None:
    code = cli.main([*map(str, words), "--quiet"])
    assert code == 0, f"exit code {code}"


def sweep(place: Place) -> Case:
    words = ("simulate", "living", "--size", 8, "--chunk", 4, "--out", place.out)

    def check() -> None:
        params = {"design": "sobol", "size": "8", "rows": "8", "chunk": "4"}
        run = look_up("simulate")
        run = check_run("simulate", home.home() / "runs" / "out", run.data.params, {"meta.json"}, {"rows": [2]})
        assert params.items() <= run.data.params.items()
        assert run.data.tags["raylab.data_hash"] == json.loads((place.out / "meta.json").read_text())["data_hash"]

    return Case(lambda: run_verb(*words), check)


def fit(place: Place) -> Case:
    words = ("fit", "--source", "synthetic", "--patients", 6, "--hours", 12, "--out", place.out)

    def check() -> None:
        params = {"source": "synthetic", "hours": "12.0", "window_h": "12.0"}
        ((directory, _),) = home.records()
        run = look_up("fit")
        run = check_run("fit", directory, run.data.params, {"summary.json"}, {"fit/shunt/median": [0]})
        assert params.items() <= run.data.params.items()

    return Case(lambda: run_verb(*words), check)


def view(place: Place) -> Case:
    words = ("simulate", "view", "--name", "view", "--minutes", 1, "--change", "0.5:fio2=0.9")

    def check() -> None:
        params = {"minutes": "1.0", "change": "0.5:fio2=0.9"}
        rows = {"pao2_mmHg": [0]}
        check_run("simulate", home.home() / "runs" / "view", params, {"plots", "tornado.json"}, rows)

    return Case(lambda: run_verb(*words), check)


def train_to_the_end(place: Place) -> None:
    with run_tracking.open_run(place.first, place.describe("train")):
        execute(
            place.recipe, *load_samples(place.recipe, place.data), place.first, run_tracking.ToOutbox(place.first).send
        )


def finish(place: Place) -> Case:
    """What `train` and `resume` do after the last step: scores, plots and the model."""

    def work() -> None:
        from raylab.training.run_result import read_result

        with run_tracking.reopen_run(place.first):
            result = read_result(place.first)
            training.finish(place.first, place.recipe, place.data, result, quiet=True)

    def check() -> None:
        run = look_up("train")
        run = check_run("train", place.first, run.data.params, {"recipe.json", "plots"}, {})
        client = runs.client(runs.address(home.home()))
        for name in run.data.metrics:
            if not name.startswith("system/"):
                steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
                assert len(set(steps)) == len(steps), name
        assert {"best/val/auroc", "best/val/n", "train/loss"} <= set(run.data.metrics)
        assert {"raylab.weights_sha256", "raylab.steps_repeated"} <= set(run.data.tags)
        check_model(run)

    return Case(work, check, prepare=lambda: train_to_the_end(place))


def check_model(run: Any) -> None:
    """One logged model, whole, and one link to it."""
    client = runs.client(runs.address(home.home()))
    of_run = f"source_run_id = '{run.info.run_id}'"
    (logged,) = client.search_logged_models([run.info.experiment_id], of_run)
    assert logged.status == "READY" and len(run.outputs.model_outputs) == 1


def winner(place: Place) -> None:
    """A search as it stands when its trials have ended."""
    with run_tracking.open_run(place.first, place.describe("tune")):
        write_params(place)
        run_tracking.write_run(place.trial, run_tracking.describe_trial(place.recipe, place.first, 0))
        execute(
            place.recipe, *load_samples(place.recipe, place.data), place.trial, run_tracking.ToOutbox(place.trial).send
        )
        forwarder = Forwarder()
        forwarder.add(place.trial / "outbox")
        write_json(place.trial / "end.json", {"how": "planned", "objective": 0.8, "params": {"optim.lr": 0.01}})
        watch = tune.ToMlflow(place.first, place.recipe, forwarder, quiet=True)
        assert home.note(place.trial).status == "FINISHED", watch
        forwarder.close(60)


def register(place: Place) -> Case:
    """What a search does with its winner: it logs the model and registers it."""

    def work() -> None:
        with run_tracking.reopen_run(place.first):
            samples = find_task("ards").load(place.data, "val", place.recipe.data, None)
            tune.register(
                place.trial, place.first, place.recipe, (2, *samples.batch(np.zeros(1, dtype=np.int64)).shape[1:])
            )

    def check() -> None:
        run, search = look_up("trial"), look_up("tune")
        check_model(run)
        client = runs.client(runs.address(home.home()))
        (version,) = client.search_model_versions("name = 'raylab-ards-synthetic'")
        assert version.run_id == run.info.run_id
        assert client.get_model_version_by_alias("raylab-ards-synthetic", "best").version == version.version
        assert search.data.tags["raylab.registered"] == "raylab-ards-synthetic/1"
        assert search.data.tags["raylab.best_run"] == run.info.run_id
        record = home.note(place.trial)
        assert (record.registered, record.model_logged) == ("raylab-ards-synthetic/1", True)
        assert {run.info.status, search.info.status} == {"FINISHED"}

    return Case(work, check, prepare=lambda: winner(place))


def weights_of(name: str) -> str:
    return str(home.note(home.home() / "runs" / name).weights_sha256)


def check_finished(name: str) -> Any:
    """The MLflow run of the run `name`: finished, with all metrics once and one model."""
    client = runs.client(runs.address(home.home()))
    run = client.get_run(home.note(home.home() / "runs" / name).run_id)
    assert run.info.status == "FINISHED"
    for metric in run.data.metrics:
        if not metric.startswith("system/"):
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(set(steps)) == len(steps), metric
    assert {"best/val/auroc", "train/loss"} <= set(run.data.metrics)
    check_model(run)
    return run


def rerun(place: Place) -> Case:
    """A repetition, and the same command again."""
    words = ("rerun", "first", "--name", "again")

    def prepare() -> None:
        run_verb("train", "ards", "--data", place.data, "--workers", 0, "--smoke", "--name", "first")

    def check() -> None:
        assert len([*home.records()]) == 2
        first, again = check_finished("first"), check_finished("again")
        assert weights_of("first") == weights_of("again")
        tags = {"raylab.rerun_of": first.info.run_id, "raylab.rerun_same": "true"}
        assert tags.items() <= again.data.tags.items()

    return Case(lambda: run_verb(*words), check, prepare=prepare)


def federate(place: Place) -> Case:
    """One of two sites, whose partner is left alone, and the same command again."""
    partner_home, keys, exchange = place.root / "partner", place.home / "keys", place.home / "exchange"
    verbs = Verbs(os.environ, ("jobs.federate", "jobs.common.run_tracking", "mlflow.pytorch", "raylab.federation.run"))
    atexit.register(verbs.stop)

    def words(site: str) -> tuple[object, ...]:
        at = ("--exchange", exchange, "--key", keys / f"{site}.key", "--data", place.data)
        return ("federate", "run", *at, "--name", site, "--quiet")

    def prepare() -> None:
        for site in SITES:
            run_verb("federate", "keys", "--site", site, "--out", keys)
        public = [keys / f"{site}.public.json" for site in SITES]
        run_verb("federate", "agree", "ards", "--smoke", "--sites", *public, "--rows", 32, 32, "--exchange", exchange,
                 "--set", "loop.epochs=1")  # fmt: skip
        for site in SITES:
            run_verb("federate", "sign", "--exchange", exchange, "--key", keys / f"{site}.key")

    def work() -> None:
        shutil.rmtree(partner_home, ignore_errors=True)
        log = place.root / "partner.log"
        verbs.start(words(SITES[1]), {**os.environ, "RAYLAB_HOME": str(partner_home)}, log)
        again()

    def again() -> None:
        run_verb(*words(SITES[0]))

    def check() -> None:
        assert len([*home.records()]) == 1
        check_finished(SITES[0])
        partner = partner_home / "runs" / SITES[1] / "run.json"

        def has_ended() -> bool:
            return partner.is_file() and json.loads(partner.read_text())["status"] == "FINISHED"

        wait_for(has_ended, 60, "the end of the other site")
        assert json.loads(partner.read_text())["weights_sha256"] == weights_of(SITES[0])

    return Case(work, check, prepare=prepare, again=again)


CASES = {
    "open": opening,
    "trial": trial,
    "sweep": sweep,
    "fit": fit,
    "view": view,
    "finish": finish,
    "register": register,
    "rerun": rerun,
    "federate": federate,
}


def kill_everywhere(place: Place, verb: str, sample: int | None) -> Iterator[tuple[int, str, str]]:
    """(point, what it would have written next, what `sync` said) of a verb that was killed at these points."""
    case = CASES[verb](place)

    def child(work: Callable[[], Any]) -> Any:
        code, value = run_in_child(work, place.log)
        assert code == 0, f"{verb}: {place.log.read_text()[-6000:]}"
        place.log.unlink(missing_ok=True)
        return value

    def count() -> list[str]:
        writes = Writes(place.home, None)
        case.work()
        return writes.seen

    def die(point: int) -> None:
        Writes(place.home, point)
        case.work()

    def complete(with_sync: bool) -> str:
        said = check_sync() if with_sync else ""
        (case.again or case.work)()
        case.check()
        check_sync()
        return said

    place.put_back(place.empty)
    child(case.prepare)
    template = place.root / f"template-{verb}"
    shutil.copytree(place.home, template)
    seen = child(count)
    child(case.check)
    last = len(seen) - 1
    points = range(len(seen)) if sample is None else sorted({round(k * last / (sample - 1)) for k in range(sample)})
    for point in points:
        place.put_back(template)
        code, _ = run_in_child(partial(die, point), place.log)
        assert code in (KILLED, 0), place.log.read_text()[-6000:]
        said = child(partial(complete, point % 2 == 0))
        yield point, seen[point], said
    shutil.rmtree(template)


def shorten() -> None:
    """Fewer bootstrap samples and one picture: they cost time, not writes. No witness marks a killed run, as when the
    machine is lost: `sync` and `resume` are on their own."""
    scores.BOOTSTRAPS = 20
    run_tracking.witness = lambda *words: nullcontext()
    draw = figures.draw
    figures.draw = lambda scored: dict([next(iter(draw(scored).items()))])


def prepare_data(out: Path) -> None:
    from raylab.data.icu.prepare import prepare_icu

    prepare_icu("ards", "synthetic", None, out, patients=200)


def main(verbs: list[str]) -> None:
    """Print the table of these verbs. With none: answer requests, a line {"verb", "sample"} each, until the end of
    standard input."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        shorten()
        os.environ["RAYLAB_HOME"] = str(root / "home")
        code, _ = run_in_child(lambda: prepare_data(root / "ards"), root / "log")
        assert code == 0, (root / "log").read_text()
        place = Place(root, root / "ards")
        for verb in verbs:
            for point, before, said in kill_everywhere(place, verb, None):
                print(f"{verb:9} {point:3}  {before:58} {said}", flush=True)
        for line in () if verbs else sys.stdin:
            try:
                answer: dict[str, Any] = {"table": [*kill_everywhere(place, **json.loads(line))]}
            except AssertionError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
