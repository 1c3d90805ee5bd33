"""Hyperparameter searches on Ray Tune: trials, schedulers, Optuna.

A search is a directory; each trial is a run directory in it, named by the trial's number:

    trials/007/params.json    written when the trial is suggested, before it starts
               ...            a run (run.py): ledger, checkpoints, model
               end.json       how it ended: planned, early, stopped, failed; and its objective

An interrupted search resumes from these files alone: the sampler learns the results of ended trials, unfinished trials
are suggested again with the same parameters and resume from their own checkpoints, and numbers are never reused. Ray
Tune's own experiment state, which is pickled and overwritten in place, is not needed.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import ray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from ray import tune
from ray.train import Checkpoint
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, PopulationBasedTraining
from ray.tune.search.optuna import OptunaSearch

from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.config.search_space import parse_dimension
from raylab.data.sampler import steps_per_epoch
from raylab.distributed import train
from raylab.distributed.draining import NodePeers
from raylab.distributed.memory_monitor import explain_memory_kill
from raylab.distributed.metering import meter_work
from raylab.documents import read_json
from raylab.errors import DataError, OutOfMemoryError, OwnCodeError, RaylabError, RunError, UsageError, unknown
from raylab.files import write_json
from raylab.memory import explain_memory_error
from raylab.tasks import find_task
from raylab.tasks.plugins import code_of, load_all
from raylab.tasks.recipes import parse_recipe
from raylab.training import checkpoint, run_failure
from raylab.training.loop import AttemptHandedOver
from raylab.training.progress import Metrics
from raylab.training.run import execute, load_samples
from raylab.training.run_failure import explain_own_failure, read_failure, write_failure
from raylab.training.trials import Trials
from raylab.witness import NOTE, read_death
from raylab.work import write_to

OBJECTIVE = "objective"  # reported by trials: the best validation score of any epoch so far; higher is better

SEARCHES: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5),
}

# max_t is one epoch beyond the end, so that the scheduler never stops a trial in its last epoch.
SCHEDULERS: dict[str, Callable[[Recipe, dict[str, BaseDistribution]], Any]] = {
    "fifo": lambda recipe, space: FIFOScheduler(),
    "asha": lambda recipe, space: ASHAScheduler(
        time_attr="epoch",
        max_t=recipe.loop.epochs + 1,
        grace_period=max(1, recipe.loop.epochs // 8),
        reduction_factor=3,
    ),
    "hyperband": lambda recipe, space: HyperBandScheduler(
        time_attr="epoch", max_t=recipe.loop.epochs + 1, reduction_factor=3
    ),
    "pbt": lambda recipe, space: PopulationBasedTraining(
        time_attr="epoch",
        perturbation_interval=max(1, recipe.loop.epochs // 5),
        hyperparam_mutations={
            "trial": {"assigned": {p: _mutation(d) for p, d in space.items() if p.startswith("optim.")}}
        },
    ),
}
OF_ONE_STEP = ("train/loss", "train/grad_norm")  # not logged per epoch: these describe the last batch only
WITH_CHECKPOINTS = {"hyperband", "pbt"}  # these pause trials or copy checkpoints between them


class TrialListener(Protocol):
    """Callbacks through which a search informs its caller, in the driver's process."""

    def started(self, number: int, params: dict[str, Any]) -> None: ...
    def row(self, number: int, metrics: Metrics) -> None: ...
    def ended(self, number: int, how: str) -> None: ...


def check(recipe: Recipe) -> None:
    """Raise UsageError for an unknown scheduler or search, or for a combination that is not possible."""
    search = recipe.search
    if search.scheduler not in SCHEDULERS:
        raise unknown("scheduler", search.scheduler, SCHEDULERS)
    if search.search not in SEARCHES:
        raise unknown("search", search.search, SEARCHES)
    space = distributions(recipe)
    if not space:
        raise UsageError("the search space is empty", do="add --space optim.lr=loguniform(1e-5,1e-3)")
    if search.scheduler == "pbt" and search.search != "random":
        raise UsageError(
            "pbt changes parameters itself, so it requires random search", do="--scheduler pbt --search random"
        )
    if search.scheduler == "pbt" and not any(path.startswith("optim.") for path in space):
        raise UsageError(
            "pbt needs a parameter that may change during training",
            "the search space has no optim.* path",
            "add --space optim.lr=loguniform(1e-5,1e-3)",
        )
    if search.scheduler in WITH_CHECKPOINTS and search.workers_per_trial:
        raise UsageError(
            f"{search.scheduler} moves checkpoints between trials, which distributed trials do not support",
            do="--workers-per-trial 0, or --scheduler asha",
        )
    for point in search.points:
        override(recipe, point)


def distributions(recipe: Recipe) -> dict[str, BaseDistribution]:
    """Return the recipe's search space as Optuna distributions, after validating values of each in the recipe."""
    space: dict[str, BaseDistribution] = {}
    for path, text in recipe.search.space.items():
        name, values = parse_dimension(path, text)
        between = [values[0] + (values[1] - values[0]) / math.pi] if "uniform" in name else []  # no whole number
        for value in [*values, *between]:
            try:
                override(recipe, {path: value})
            except UsageError as error:
                do = "use randint or choice, if the field takes whole numbers" if value in between else error.do
                do = do.replace("--set", "--space")
                raise UsageError(f"--space {path}={text}: {error.what}", error.why, do) from error
        if name == "choice":
            space[path] = CategoricalDistribution(values)
        elif name == "randint":
            space[path] = IntDistribution(*values)
        else:
            space[path] = FloatDistribution(*values, log=name == "loguniform")
    return space


def search(recipe: Recipe, data: Path, directory: Path, listener: TrialListener) -> None:
    """Run or resume the search in `directory` until recipe.search.trials trials have ended.

    Raises RunError if no trial ran to its end.
    """
    check(recipe)
    space = distributions(recipe)
    trials = Trials(directory / "trials", recipe.search.trials)
    left = recipe.search.trials - len(trials.ended)
    if left > 0:
        options = recipe.search
        is_pbt = options.scheduler == "pbt"  # the only scheduler without a searcher: its points are drawn beforehand
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        tuner = Tuner(
            tune.with_resources(
                tune.with_parameters(
                    trial,
                    plugins=code_of(recipe),
                    recipe=recipe.model_dump(mode="json"),
                    data=str(data),
                    at=str(directory),
                ),
                driver() if options.workers_per_trial else recipe.scaling.resources(),
            ),
            param_space=pbt_param_space(trials, space, recipe) if is_pbt else None,
            tune_config=TuneConfig(
                metric=OBJECTIVE,
                mode="max",
                num_samples=1 if is_pbt else left,
                max_concurrent_trials=None if is_pbt else options.concurrent,
                scheduler=SCHEDULERS[options.scheduler](recipe, space),
                search_alg=None if is_pbt else PersistentOptunaSearch(trials, space, recipe),
                reuse_actors=not options.workers_per_trial,
            ),
            run_config=RunConfig(
                name=f"attempt-{sum(1 for _ in (directory / 'ray').glob('*'))}",
                storage_path=str(directory / "ray"),
                # a trial whose node died restarts on another from its own checkpoint
                failure_config=FailureConfig(max_failures=recipe.scaling.max_failures),
                callbacks=[TrialCallback(trials, listener)],
                verbose=0,
            ),
        )  # fmt: skip
        tuner.fit()
    if best(directory) is None:
        for number in trials.ended:
            if isinstance(failure := read_failure(trials.path(number)), OwnCodeError):
                raise failure
        raise RunError(
            f"none of the {recipe.search.trials} trials of {directory.name} ran to its end",
            "; ".join(sorted({end.get("error", end["how"]) for end in trials.ended.values()}))[:500],
            "read the trials' errors, or narrow --space",
        )


def driver() -> dict[str, float]:
    """Return the resources of a distributed trial's driver: on Slurm a slot on the head, which outlives workers."""
    return {"raylab_head": 1} if "raylab_head" in ray.cluster_resources() else {"CPU": 0.1}


def best(directory: Path) -> tuple[int, dict[str, Any]] | None:
    """Return (number, end) of the completed trial with the best validation objective; None if none completed."""
    completed = {n: e for n, e in Trials(directory / "trials", 0).ended.items() if e["how"] in {"planned", "early"}}
    return max(completed.items(), key=lambda item: (item[1][OBJECTIVE], -item[0]), default=None)


class PersistentOptunaSearch(OptunaSearch):
    """An Optuna search that writes each suggestion to the search directory before returning it."""

    def __init__(self, trials: Trials, space: dict[str, BaseDistribution], recipe: Recipe) -> None:
        waiting = [trials.params[n] for n in trials.begun] + fixed_points(trials, space, recipe)
        super().__init__(
            space,
            metric=OBJECTIVE,
            mode="max",
            sampler=make_sampler(trials, recipe),
            points_to_evaluate=waiting or None,
        )
        self.trials, self.recipe = trials, recipe
        self.begun = list(trials.begun)
        for number, end in trials.ended.items():
            failed = end.get(OBJECTIVE) is None
            self.add_evaluated_point(trials.params[number], end.get(OBJECTIVE), error=failed)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        self._ot_study.sampler = make_sampler(self.trials, self.recipe)  # one for each trial
        params = super().suggest(trial_id)
        if params is None:
            return None
        number = self.begun.pop(0) if self.begun else self.trials.new(params)
        return {"trial": {"number": number, "assigned": params}}


def make_sampler(trials: Trials, recipe: Recipe) -> optuna.samplers.BaseSampler:
    """The sampler of the next trial. Its seed follows from the trial's number, so that a search that was interrupted
    draws what it would have drawn otherwise: with `random` the same points, with `tpe` those that follow from the
    results so far."""
    seed = int(np.random.SeedSequence([recipe.seed, trials.next_number]).generate_state(1)[0])
    return SEARCHES[recipe.search.search](seed)


def fixed_points(trials: Trials, space: dict[str, BaseDistribution], recipe: Recipe) -> list[dict[str, Any]]:
    """The recipe's points, with which a search begins, that it has not begun yet."""
    points = [dict(point) for point in recipe.search.points if point.keys() == space.keys()]
    return points[trials.next_number :]


def pbt_param_space(trials: Trials, space: dict[str, BaseDistribution], recipe: Recipe) -> dict[str, Any]:
    """Return the grid for PBT, which has no searcher: unfinished trials first, then new random ones."""
    study = optuna.create_study()
    points = fixed_points(trials, space, recipe)
    while len(trials.params) < trials.planned:
        study.sampler = make_sampler(trials, recipe)
        trials.new(points.pop(0) if points else study.ask(fixed_distributions=space).params)
    left = [{"number": n, "assigned": p} for n, p in trials.params.items() if n not in trials.ended]
    return {"trial": tune.grid_search(left)}


class TrialCallback(tune.Callback):
    """Records how trials end and forwards everything to the caller's listener; runs in the driver."""

    def __init__(self, trials: Trials, listener: TrialListener) -> None:
        self.trials, self.listener = trials, listener
        self.last: dict[int, dict[str, Any]] = {}
        self.numbers: dict[
            str, int
        ] = {}  # by trial id, because PBT gives a trial its donor's settings, including the number

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for its own resume, which is not used

    def number(self, trial: Any) -> int:
        return self.numbers.setdefault(trial.trial_id, trial.config["trial"]["number"])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self.number(trial)
        # Tune counts failures alone, and would start a trial with a NaN loss again and again
        trial.should_recover = partial(should_start_again, trial, self.trials.path(number))
        self.listener.started(number, {**self.trials.params[number], **trial.config["trial"]["assigned"]})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = self.number(trial)
        self.last[number] = result
        scores = {n: value for n, value in result.items() if n.startswith(("train/", "val/", "best/"))}
        row = {name: value for name, value in scores.items() if name not in OF_ONE_STEP}
        self.listener.row(number, {**row, "step": result["step"], "epoch": result["epoch"] - 1})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self.number(trial)
        last = self.last.get(number, {})
        how = last.get("stopped") or "stopped"
        self.trials.end(
            number,
            {
                "how": how,
                OBJECTIVE: last.get(OBJECTIVE),
                "epoch": last.get("epoch"),
                "params": trial.config["trial"]["assigned"],
            },
        )
        self.listener.ended(number, how)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self.number(trial)
        self.trials.end(
            number, {"how": "failed", OBJECTIVE: None, "error": explain_failure(self.trials.path(number), trial)}
        )
        self.listener.ended(number, "failed")


def explain_failure(directory: Path, trial: Any) -> str:
    """Why a trial failed: as it said itself, as the witness of its process saw it, or as Ray tells."""
    try:
        if (failure := read_failure(directory)) is not None:
            return failure.what
    except DataError as error:
        return error.what
    died_of = trial.get_pickled_error()
    if died_of is not None and (why := explain_memory_kill(died_of) or train.explain_cause(died_of)):
        return why
    death = read_death(directory / NOTE, directory.name, train.WITNESS_SECONDS)
    if isinstance(death, OutOfMemoryError):
        return f"{death.what}: {death.why}"
    return "its process died" if death is None else death.what


def should_start_again(trial: Any, directory: Path) -> bool:
    """Whether a trial that failed is worth another start: not if it said itself why it failed."""
    return not (directory / run_failure.FILE).is_file() and bool(type(trial).should_recover(trial))


def trial(settings: dict[str, Any], plugins: list[tuple[str, str]], recipe: dict[str, Any], data: str, at: str) -> None:
    """Execute one trial: a run that reports one row per epoch to Tune."""
    load_all(plugins)
    # Remember the trial's first number: after PBT exploits another trial, the settings contain the donor's number
    number_file = Path(at) / "ids" / tune.get_context().get_trial_id()
    if not number_file.exists():
        number_file.parent.mkdir(exist_ok=True)
        write_json(number_file, settings["trial"]["number"])
    number = read_json(number_file, int, "raylab resume, which writes the file again")
    directory = Path(at) / "trials" / f"{number:03d}"
    train.raise_failure(directory)  # of an attempt that was killed before the search had noted it
    base = parse_recipe(recipe)
    options = base.search
    assigned = settings["trial"]["assigned"]
    chosen = override(base, {**assigned, "scaling.workers": options.workers_per_trial})
    objective = f"val/{find_task(chosen.task).objective}"
    best_so_far = float("-inf")
    unsaved_rows: list[Metrics] = []

    def report(row: Metrics, path: Path | None = None) -> None:
        nonlocal best_so_far
        best_so_far = max(best_so_far, row.get(objective, -row["val/loss"]))
        metrics = {**row, "epoch": row["epoch"] + 1, OBJECTIVE: best_so_far}
        tune.report(metrics, checkpoint=None if path is None else Checkpoint.from_directory(str(path)))

    def send(rows: list[Metrics]) -> int:
        for row in rows:
            if "val/loss" in row:
                if options.scheduler in WITH_CHECKPOINTS:
                    unsaved_rows.append(row)
                else:
                    report(row)
        return int(rows[-1]["step"]) if rows else 0

    def report_epochs(rows: list[Metrics]) -> None:
        for row in rows:
            if "val/loss" in row:
                report(row)

    def saved(path: Path) -> None:
        while unsaved_rows:
            report(unsaved_rows.pop(0), path)

    donor_checkpoint = tune.get_checkpoint()
    if donor_checkpoint is not None:
        with donor_checkpoint.as_directory() as donor:
            checkpoint.adopt(directory / "checkpoints", Path(donor))
    if options.scheduler in WITH_CHECKPOINTS:
        rows = len(find_task(chosen.task).load(Path(data), "train", chosen.data, None))
        chosen = override(chosen, {"loop.checkpoint_steps": steps_per_epoch(rows, chosen.loop.global_batch_size)})
    try:
        if options.workers_per_trial:
            result = train.Supervisor(chosen).train(chosen, Path(data), directory, report_epochs)
        else:
            callback = saved if options.scheduler in WITH_CHECKPOINTS else None
            meter = meter_work("trial", chosen.scaling, write_to(directory))
            with meter, NodePeers() as peers:
                result = execute(
                    chosen, *load_samples(chosen, Path(data)), directory, send, saved=callback, flush_seconds=0,
                    peers=peers, on_training=meter.note_training,
                )  # fmt: skip
    except AttemptHandedOver as handed_over:
        # Tune starts the trial again elsewhere, and counts no failure
        raise ray.exceptions.RayActorError(error_msg="its node is about to leave", preempted=True) from handed_over
    except RaylabError as error:
        write_failure(directory, error)
        raise
    except Exception as error:
        if failure := explain_memory_error(error, Path(at).name) or explain_own_failure(error):
            write_failure(directory, failure)
            raise failure from error
        raise
    best_score = result["best"].get(objective.removeprefix("val/"), -result["best"]["loss"])
    final = {f"val/{name}": score for name, score in result["val"].items()}
    ended = {"step": result["steps"], "epoch": result["epochs"], OBJECTIVE: best_score, "stopped": result["stopped"]}
    tune.report({**final, **ended})


def _mutation(distribution: BaseDistribution) -> Any:
    """Return the same range as a Tune distribution, for PBT."""
    if isinstance(distribution, FloatDistribution):
        draw = tune.loguniform if distribution.log else tune.uniform
        return draw(distribution.low, distribution.high)
    if isinstance(distribution, IntDistribution):
        return tune.randint(distribution.low, distribution.high + 1)
    return tune.choice(list(distribution.choices))
