"""raylab tune: search hyperparameters, logged as a parent run in MLflow with a child run per trial."""

import argparse
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cli, train
from jobs.common import console, costs, description, home, model_card, run_tracking, scores, training
from jobs.common.console import open_screen, say, set_status
from jobs.common.environment import verb_environment
from jobs.common.interrupts import hold_interrupts
from jobs.common.place import HERE, Place
from jobs.common.results import Run
from jobs.common.run_end import Ending, describe_end, free_reserve, record_end
from jobs.common.session import cluster_address, ray_environment, ray_session
from jobs.common.trial_table import TrialTable, order, row
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.config.search_space import parse_dimension
from raylab.errors import RaylabError, UsageError
from raylab.files import atomic_write, write_json
from raylab.tasks import TASKS, find_task
from raylab.tasks.recipes import with_search_space
from raylab.training.progress import Metrics
from raylab.training.run_record import Registration
from raylab.training.run_result import read_end, read_result
from raylab.training.trials import Trials
from tracking import runs, views
from tracking.forwarder import Forwarder, ensure_run
from tracking.outbox import Outbox, append_new_metrics

log = logging.getLogger(__name__)

EXAMPLE = 'raylab tune ards --data prepared/ards --trials 20 --space "optim.lr=loguniform(1e-4,1e-2)"'
OPTIONS = ("trials", "scheduler", "search", "workers_per_trial", "concurrent")  # fields of a recipe's `search`


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="prepared directory on storage that all nodes share"
    )
    parser.add_argument("--trials", type=int, help="number of trials (default: the recipe's)")
    parser.add_argument("--scheduler", help="fifo, asha, hyperband or pbt (default: the recipe's)")
    parser.add_argument("--search", help="random or tpe (default: the recipe's)")
    parser.add_argument(
        "--space", nargs="+", action="extend", metavar="PATH=DIST", help="search space (default: the recipe's)"
    )
    parser.add_argument(
        "--workers-per-trial", type=int, help="0 trains each trial in one process (default: the recipe's)"
    )
    parser.add_argument("--concurrent", type=int, help="trials that run in parallel (default: the recipe's)")
    train.add_recipe_options(parser)
    parser.add_argument("--name", help="name of the search (default: made from task and time)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the cost; start nothing")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.dry_run:
        return dry_run(recipe_of(args), args.data.absolute(), args.quiet)
    return tune(
        args.task,
        args.data,
        trials=args.trials,
        scheduler=args.scheduler,
        search=args.search,
        space=None if args.space is None else parse_space(args.space),
        workers_per_trial=args.workers_per_trial,
        concurrent=args.concurrent,
        name=args.name,
        settings=train.parse_settings(args),
        smoke=args.smoke,
        quiet=args.quiet,
    ).details


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments of this verb describe."""
    options = {name: getattr(args, name) for name in OPTIONS}
    space = None if args.space is None else parse_space(args.space)
    return build_recipe(args.task, options, space, train.parse_settings(args), args.smoke)


def recipe_of_call(arguments: Mapping[str, Any]) -> Recipe:
    """The recipe that these arguments of `tune` describe."""
    options = {name: arguments.get(name) for name in OPTIONS}
    settings, smoke = arguments.get("settings") or {}, arguments.get("smoke", False)
    return build_recipe(arguments["recipe"], options, arguments.get("space"), settings, smoke)


def dry_run(recipe: Recipe, data: Path, quiet: bool, place: Place = HERE) -> dict[str, Any]:
    """Check a recipe and its data as `start` does, and print what the search will cost at a place. Raises UsageError if
    the budget does not suffice."""
    from jobs.common import forecast

    find_task(recipe.task).read_meta(data)
    recipe = train.enough_shards(recipe, quiet)
    work = training.inspect(recipe, data)
    check(recipe)
    found = forecast.forecast(recipe, data, work, place, is_search=True)
    if not quiet:
        trials, together = recipe.search.trials, min(recipe.search.concurrent, recipe.search.trials)
        say(f"nothing was started: {trials} trials, {together} at a time")
        forecast.tell(found)
    return {"trials": recipe.search.trials, "forecast": forecast.to_json(found)}


def check(recipe: Recipe) -> None:
    """Raise UsageError for a wrong scheduler, search or space."""
    ray_environment()
    from raylab.distributed import tune

    tune.check(recipe)


def parse_space(texts: Sequence[str]) -> dict[str, str]:
    """Parse PATH=DISTRIBUTION arguments into {path: distribution}."""
    space = {}
    for text in texts:
        path, equals, distribution = text.partition("=")
        if not equals:
            raise UsageError(f"'{text}' is not PATH=DISTRIBUTION", do="--space optim.lr=loguniform(1e-5,1e-3)")
        space[path] = distribution
    return space


@verb_environment()
def tune(
    recipe: Recipe | str,
    data: Path | str,
    *,
    trials: int | None = None,
    scheduler: str | None = None,
    search: str | None = None,
    space: Mapping[str, str] | None = None,
    workers_per_trial: int | None = None,
    concurrent: int | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    smoke: bool = False,
    quiet: bool = False,
) -> Run:
    """Search hyperparameters on Ray, as a run with a child run per trial; the run has the model of the best trial.

    `space`: for example {"optim.lr": "loguniform(1e-5,1e-3)"}. `scheduler`: fifo, asha, hyperband or pbt. `search`:
    random or tpe. `concurrent`: trials that run in parallel. All default to the recipe's values. The other arguments
    and the errors are those of `train`.
    """
    options = {
        "trials": trials,
        "scheduler": scheduler,
        "search": search,
        "workers_per_trial": workers_per_trial,
        "concurrent": concurrent,
    }
    recipe = build_recipe(recipe, options, space, settings or {}, smoke)
    with open_screen(quiet, f"{recipe.task}: checking the recipe and the data"):
        return Run.of(start(recipe, Path(data).absolute(), name, quiet))


def build_recipe(
    recipe: Recipe | str,
    options: Mapping[str, Any],
    space: Mapping[str, str] | None,
    settings: Mapping[str, Any],
    smoke: bool,
) -> Recipe:
    """The given recipe, or the shipped one of a task, with the `options` of a search that are not None."""
    given = {f"search.{option}": value for option, value in options.items() if value is not None}
    chosen = train.build_recipe(recipe, {**settings, **given}, smoke=smoke)
    if space is None:
        return with_search_space(chosen)
    for path, distribution in space.items():
        parse_dimension(path, distribution)
    return override(chosen, {"search.space": dict(space), "search.points": ()})


def start(recipe: Recipe, data: Path, name: str | None, quiet: bool) -> dict[str, Any]:
    meta = find_task(recipe.task).read_meta(data)
    uri = run_tracking.checked_address()
    recipe = train.enough_shards(run_tracking.with_weights(recipe, uri), quiet)
    is_fixed = not any(path.startswith(("loop.", "model.")) for path in recipe.search.space)
    training.inspect(recipe, data, checks_batches=is_fixed)
    training.check_gpu(recipe, is_here=cluster_address() is None)
    check(recipe)  # before the run exists
    directory = home.new_run(name, f"{recipe.task}-search")
    new = run_tracking.describe_run(directory, recipe, meta, data, "tune", uri)
    with run_tracking.open_run(directory, new) as forwarder:
        return continue_search(directory, recipe, data, forwarder, quiet)


class ToMlflow:
    """Opens a nested run for each trial and appends to its outbox."""

    def __init__(self, directory: Path, recipe: Recipe, forwarder: Forwarder, quiet: bool) -> None:
        self.directory, self.recipe, self.forwarder = directory, recipe, forwarder
        self.rows: dict[int, run_tracking.ToOutbox] = {}
        self.objective = f"val/{find_task(recipe.task).objective}"
        self.table = TrialTable(recipe.search.trials, self.objective, quiet, list(recipe.search.space))
        if console.screen is not None:
            trials = Trials(directory / "trials", 0)
            for number in trials.begun:
                self.table.update(number, how="waiting", params=trials.params[number])
            for number, end in trials.ended.items():
                self.table.update(number, **end)
        self._catch_up()

    def _catch_up(self) -> None:
        """Log the ends of trials that finished before an interruption but were not logged."""
        for number, end in Trials(self.directory / "trials", 0).ended.items():
            directory = self.trial(number)
            if not (directory / "run.json").is_file():
                continue
            self.forwarder.add(directory / "outbox")
            if home.note(directory).status not in {"FINISHED", "FAILED"}:
                self.ended(number, end["how"])

    def trial(self, number: int) -> Path:
        return self.directory / "trials" / f"{number:03d}"

    def started(self, number: int, params: dict[str, Any]) -> None:
        directory = self.trial(number)
        self.forwarder.add(directory / "outbox")
        self.rows.setdefault(number, run_tracking.ToOutbox(directory))
        self.table.update(number, how="running", params=params)
        if (directory / "run.json").is_file():
            run_tracking.mark_running(directory)
            return
        recipe = override(self.recipe, {p: v for p, v in params.items()})
        run_tracking.write_run(directory, run_tracking.describe_trial(recipe, self.directory, number))

    def row(self, number: int, metrics: Metrics) -> None:
        self.rows[number]([metrics])
        if self.objective in metrics:
            self.table.update(number, objective=metrics[self.objective], epoch=metrics["epoch"] + 1)

    def ended(self, number: int, how: str) -> None:
        outbox = Outbox(self.trial(number) / "outbox")
        stopped = {"stopped": f"stopped by {self.recipe.search.scheduler}", "failed": "failed"}.get(how, how)
        outbox.append({"kind": "tags", "values": {"raylab.stopped": stopped}})
        result = self.trial(number) / "result.json"
        if result.is_file():  # with pbt, a trial's best epoch may come from another trial, so its own rows lack it
            best = read_result(self.trial(number))["best"]
            scored = {f"best/val/{name}": best[name] for name in best.keys() - {"epoch", "step"}}
            append_new_metrics(outbox, best["step"], scored)
            if (name := find_task(self.recipe.task).objective) in best:  # missing if val has only one class
                outbox.append({"kind": "tags", "values": {views.VAL_SCORE: f"{best[name]:.3f} {name}"}})
        end = read_end(self.trial(number))
        record_end(self.trial(number), Ending("FAILED" if how == "failed" else "FINISHED", end.get("error", "")))
        self.table.update(number, **end)

    @contextmanager
    def mark_killed(self) -> Iterator[None]:
        """Wrap a search: if it is interrupted or fails, mark its unfinished trials KILLED."""
        try:
            yield
        except BaseException as error:
            why = describe_end(error).error
            with hold_interrupts():
                free_reserve(self.directory)  # the disk may be full
                for number in self.rows:
                    directory = self.trial(number)
                    if (directory / "run.json").is_file() and not (directory / "end.json").is_file():
                        record_end(directory, Ending("KILLED", f"the search has ended: {why}"))
            raise


def continue_search(directory: Path, recipe: Recipe, data: Path, forwarder: Forwarder, quiet: bool) -> dict[str, Any]:
    """Run a search that is tracked to its end, from its existing trials if there are any."""
    options = recipe.search
    objective = f"val/{find_task(recipe.task).objective}"
    if not quiet:
        how = f"{options.scheduler} + {options.search}, at most {recipe.loop.epochs} epochs"
        say(f"search {directory.name}: {options.trials} trials of {recipe.task}, {how}, objective {objective}")
    for damage in Trials(directory / "trials", 0).damaged:
        say(damage)
    publish_charts(directory, recipe)
    own = recipe.scaling.cpus_per_worker
    cpus = options.concurrent * max(1.0, options.workers_per_trial * own + 0.5 if options.workers_per_trial else own)
    set_status("starting Ray")
    watch = ToMlflow(directory, recipe, forwarder, quiet)
    # The table comes first: Ray takes seconds to start
    with watch.table.show(), ray_session(cpus, directory / "ray.log"):
        from raylab.distributed import tune

        set_status("starting the first trials")
        with watch.mark_killed():
            tune.search(recipe, data, directory, watch)
        winner_entry = tune.best(directory)
        ends = Trials(directory / "trials", 0).ended
    number, end = winner_entry  # type: ignore[misc]  # search() raises if there is none
    winner = watch.trial(number)
    keep(directory, winner)
    set_status("scoring the best trial on val")
    scored = scores.score_run(directory, data, "val")
    scores.calibrate(directory, scored)
    scores.record(directory, scored)
    if find_task(recipe.task).kind == "images":
        model_card.write(directory, scored.parameters)
    samples = scored.samples
    shape = (2, *samples.batch(np.zeros(1, dtype=np.int64)).shape[1:])
    set_status("logging the model to MLflow")
    registered = register(winner, directory, recipe, shape)
    costs.tell_end(directory)
    result = read_result(directory)
    out = {
        "run_id": home.note(directory).run_id,
        "name": directory.name,
        "directory": str(directory),
        "task": recipe.task,
        "data": str(data),
        "synthetic": home.note(directory).synthetic,
        "seed": recipe.seed,
        "trials": len(ends),
        "ended": dict(Counter(e["how"] for e in ends.values())),
        "best_trial": number,
        "best_run_id": home.note(winner).run_id,
        "best_params": end["params"],
        "best_objective": end["objective"],
        "objective": objective,
        "registered": registered,
        "val_loss": result["best"]["loss"],
        "steps": result["steps"],
        "weights_sha256": result["weights_sha256"],
        "split": "val",
        **scored.to_json(),
    }  # fmt: skip
    if not quiet:
        say(f"best of {len(ends)} trials: {number}" if console.screen else f"best of {len(ends)} trials:")
        for n, e in () if console.screen else sorted(ends.items(), key=order)[:5]:  # a screen has the table
            say(row(n, e, objective))
        scores.tell(scored)
        say(
            f"next: raylab evaluate {recipe.task} --run {directory.name} --data {data} --split test   (the winner only)"
        )
        say("      raylab compare        raylab ui")
    return out


def publish_charts(directory: Path, recipe: Recipe) -> None:
    """Store the charts of the search's trials with MLflow's page of the experiment; without a server there are none."""
    run_record = home.note(directory)
    space = recipe.search.space
    # Numbers first, because a contour plot needs numbers
    params = sorted(space, key=lambda path: parse_dimension(path, space[path])[0] == "choice")
    try:
        client = runs.client(run_record.uri)
        run_id = ensure_run(directory / "outbox")
        charts = views.publish_search(client, run_id, params, f"best/val/{find_task(recipe.task).objective}")
    except RaylabError as error:
        log.warning("MLflow gets no charts of this search (resume it for them): %s", error.what)
        return
    home.annotate(directory, charts=charts)
    Outbox(directory / "outbox").append({"kind": "tags", "values": {description.TAG: description.describe(directory)}})


def keep(directory: Path, winner: Path) -> None:
    """Copy the model of the best trial to the search, so that `--run SEARCH` uses it."""
    target = directory / "model"
    target.mkdir(exist_ok=True)
    for name in ("model.safetensors", "model.json"):
        with atomic_write(target / name) as beside:
            shutil.copyfile(winner / "model" / name, beside)
    result = read_result(winner)
    write_json(directory / "result.json", result)
    facts = {"steps": result["steps"], "best_step": result["best"]["step"], "weights_sha256": result["weights_sha256"]}
    home.annotate(directory, **facts)


def register(winner: Path, directory: Path, recipe: Recipe, shape: tuple[int, ...]) -> str | None:
    """Log the best trial's model to its MLflow run and register it as raylab-TASK; returns "NAME/VERSION", or None if
    the server is unavailable."""
    best = read_result(winner)["best"]
    name = f"raylab-{recipe.task}{'-synthetic' if home.note(winner).synthetic else ''}"
    score = best.get(find_task(recipe.task).objective)  # missing if val has only one class
    home.annotate(winner, register_as=Registration(name=name, score=score, loss=best["loss"]))
    run_tracking.log_model(winner, shape)
    return home.note(winner).registered


if __name__ == "__main__":
    sys.exit(cli.main(["tune", *sys.argv[1:]]))
