"""The benchmark of a task on intensive-care data: networks and baselines on the same patient-grouped folds, at several
landmarks.

    OUT/landmark-12/data          the prepared data
                   /fold-0        the same with fold 0 as the test split, and statistics of its own train split
                   /trials/...    the nested search: every candidate with its refined loss on the fold's val split
                   /final/...     test probabilities of the best candidate, trained as an ensemble
    OUT/table.json, table.md      scores over all patients, each predicted by a model that was not trained on them

Every fit is a chunk of `run_chunks`: fits run in parallel on a cluster, and an interrupted benchmark resumes.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from jobs.common import home, run_tracking, scores
from jobs.common.console import say
from jobs.common.session import ray_session
from raylab.config.assignments import parse_assignments
from raylab.config.overrides import has_field, override, unknown_field
from raylab.config.recipe import IcuData, NetworkModel, Recipe
from raylab.data import prepared
from raylab.data.icu.resplit import Split, resplit
from raylab.documents import Document, read_json, to_plain
from raylab.errors import UsageError
from raylab.evaluation.leakage import VIEWS
from raylab.evaluation.metrics import binary_scores, paired_difference
from raylab.files import write_json, write_text
from raylab.score import Score
from raylab.tasks import find_task
from raylab.tasks.preparation import Resources
from raylab.tasks.recipes import parse_recipe, shipped_recipe, with_search_space
from tracking.outbox import Outbox


class FittedTrial(Document):
    """A file in trials/, written by raylab/distributed/benchmark_fits.py."""

    recipe: dict[str, Any]
    refined_loss: float


COHORTS = ("all", "ventilated_pf")
BASELINE = "boosting"
MODELS = ("last_sf", "last_pf", "logistic", "boosting", "gru", "lstm", "grud")
NETWORKS = ("gru", "lstm", "grud")
BOOTSTRAPS = 1000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", help="data source, as for prepare (default: synthetic)")
    parser.add_argument("--patients", type=int, default=400, help="number of synthetic patients (default: 400)")
    parser.add_argument("--label", help="label definition, as for prepare (default: the task's first)")
    parser.add_argument("--landmarks", type=int, nargs="+", default=[12], metavar="H",
                       help="hours after admission at which predictions are made (default: 12)")  # fmt: skip
    parser.add_argument("--horizon", type=float, default=24, help="prediction horizon in hours (default: 24)")
    parser.add_argument("--folds", type=int, default=5, help="patient-grouped folds (default: 5)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME",
                       help=f"models to compare, also own ones (default: {' '.join(MODELS)})")  # fmt: skip
    parser.add_argument("--members", type=int, default=5, help="networks in each final ensemble (default: 5)")
    parser.add_argument("--leakage", action="store_true", help="add the leakage report: models that see only parts")


def main(args: argparse.Namespace) -> dict[str, Any]:
    started = [override(shipped_recipe(args.task), {"model.name": name}) for name in args.models]
    for path in parse_assignments(args.set):
        if not any(has_field(recipe, path) for recipe in started):
            raise unknown_field(started[0], path)
    if args.trials < 1 or args.members < 1 or args.folds < 2:
        raise UsageError("a benchmark needs --trials and --members of at least 1, and --folds of at least 2")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", f"raylab-benchmark-{args.task}")
    uri = run_tracking.checked_address()
    out: Path = args.out.absolute()
    folders = {landmark: prepare(args, out, landmark) for landmark in args.landmarks}
    with session(args.workers, out):
        winners = search(args, folders)
        finals = refit(args, folders, winners)
        views = predict_views(args, folders) if args.leakage else {}
    table = [
        row for landmark, folder in folders.items() for row in score_models(args, folder, landmark, finals[landmark])
    ]
    result = {
        "task": args.task,
        "source": args.source or "synthetic",
        "synthetic": args.source in (None, "synthetic"),
        "trials": args.trials,
        "members": args.members,
        "folds": args.folds,
        "seed": args.seed,
        "bootstraps": BOOTSTRAPS,
        "table": table,
    }
    if args.leakage:
        result["leakage"] = [
            row for landmark, folder in folders.items() for row in score_views(args, folder, landmark, views)
        ]
    write_json(out / "table.json", to_plain(result))
    write_text(out / "table.md", markdown(result))
    track(args, folders, result, uri)
    if not args.quiet:
        say(markdown(result))
        say(f"next: raylab compare --experiment {os.environ['MLFLOW_EXPERIMENT_NAME']}")
    return {"out": str(out), "experiment": os.environ["MLFLOW_EXPERIMENT_NAME"], **to_plain(result)}


def prepare(args: argparse.Namespace, out: Path, landmark: int) -> Path:
    """Prepare OUT/landmark-H with its data and folds, reuse what already exists, and return it."""
    folder = out / f"landmark-{landmark}"
    folder.mkdir(parents=True, exist_ok=True)
    given = {"source": args.source or "synthetic", "horizon": args.horizon, "label": args.label, "seed": args.seed}
    given |= {"path": None if args.path is None else str(args.path.absolute())}
    options = {**given, "task": args.task, "folds": args.folds}
    note = folder / "asked.json"
    if note.is_file() and read_json(note, dict[str, Any], "choose another --out") != options:
        raise UsageError(
            f"{out} contains a benchmark of other data or folds",
            f"it was started with {note.read_text()}",
            "choose another --out",
        )
    write_json(note, options)
    data = folder / "data"
    if not (data / "meta.json").is_file():
        if not args.quiet:
            say(f"preparing landmark {landmark} h")
        preparation = find_task(args.task).preparation
        assert preparation is not None  # tasks on intensive-care data have one
        asked = preparation.parse(args.task, {**given, "landmark": landmark, "patients": args.patients})
        preparation.run(args.task, data, asked, False, Resources(None, contextlib.nullcontext))
    for fold in range(args.folds):
        if not (folder / f"fold-{fold}" / "meta.json").is_file():
            resplit([data], folder / f"fold-{fold}", Split("patient", fold, args.folds), args.seed)
    return folder


@contextlib.contextmanager
def session(workers: int, out: Path) -> Any:
    """Connect to Ray if `workers` or RAY_ADDRESS is set; otherwise fits run in this process."""
    if workers or os.environ.get("RAY_ADDRESS"):
        with ray_session(workers, out / "ray.log"):
            yield
    else:
        yield


def recipe_of(args: argparse.Namespace, name: str) -> Recipe:
    """The recipe of a model with its search space and those fields of --set that the model has."""
    recipe = override(shipped_recipe(args.task), {"model.name": name, "seed": args.seed})
    settings = {path: value for path, value in parse_assignments(args.set).items() if has_field(recipe, path)}
    return with_search_space(override(recipe, settings))


def search(args: argparse.Namespace, folders: dict[int, Path]) -> dict[tuple[int, int, str], dict[str, Any]]:
    """The recipe (as JSON) of the candidate with the lowest refined val loss, for every (landmark, fold, model)."""
    from raylab.distributed.benchmark_fits import Fit, candidates, trial
    from raylab.distributed.map import run_chunks

    chunks: dict[tuple[int, int, str], dict[Path, Fit]] = {}
    best_recipes: dict[tuple[int, int, str], dict[str, Any]] = {}
    if args.trials == 1:  # nothing to select
        for landmark, fold, name in every(args, folders):
            recipe = recipe_of(args, name)
            best_recipes[landmark, fold, name] = override(recipe, candidates(recipe, 1, 0)[0]).model_dump(mode="json")
        return best_recipes
    for landmark, fold, name in every(args, folders):
        recipe = recipe_of(args, name)
        place = folders[landmark] / "trials" / f"fold-{fold}-{name}"
        place.mkdir(parents=True, exist_ok=True)
        chunks[landmark, fold, name] = {}
        for k, settings in enumerate(candidates(recipe, args.trials, args.seed + 1000 * fold)):
            fit = Fit.of(override(recipe, settings), folders[landmark] / f"fold-{fold}")
            chunks[landmark, fold, name][place / f"{k:03d}-{fit.key}.json"] = fit
    run_chunks(
        trial, {path: fit for of in chunks.values() for path, fit in of.items()}, tell=teller(args.quiet, "searches")
    )
    for key, of in chunks.items():
        ended = [read_json(path, FittedTrial, "remove it; then the same command fits it again") for path in of]
        best = min(ended, key=lambda end: end["refined_loss"])
        best_recipes[key] = best["recipe"]
    return best_recipes


def refit(
    args: argparse.Namespace, folders: dict[int, Path], winners: dict[tuple[int, int, str], dict[str, Any]]
) -> dict[int, dict[str, list[Path]]]:
    """The files with each model's probabilities on every fold's test rows, which only final models read, once."""
    from raylab.distributed.benchmark_fits import Fit, final
    from raylab.distributed.map import run_chunks

    chunks: dict[Path, Fit] = {}
    files: dict[int, dict[str, list[Path]]] = {landmark: {name: [] for name in args.models} for landmark in folders}
    for landmark, fold, name in every(args, folders):
        recipe = parse_recipe(winners[landmark, fold, name])
        if isinstance(recipe.model, NetworkModel):
            recipe = override(recipe, {"model.members": args.members})
        place = folders[landmark] / "final"
        place.mkdir(exist_ok=True)
        fit = Fit.of(recipe, folders[landmark] / f"fold-{fold}", "test")
        path = place / f"fold-{fold}-{name}-{fit.key}.parquet"
        chunks[path] = fit
        files[landmark][name].append(path)
    run_chunks(final, chunks, tell=teller(args.quiet, "final fits"))
    return files


def predict_views(args: argparse.Namespace, folders: dict[int, Path]) -> dict[int, list[Path]]:
    """Fit every view of the leakage report; returns the files with the probabilities."""
    from raylab.distributed.benchmark_fits import Fit, leaks
    from raylab.distributed.map import run_chunks

    recipe = recipe_of(args, BASELINE)
    files: dict[int, list[Path]] = {landmark: [] for landmark in folders}
    chunks = {}
    for landmark, folder in folders.items():
        (folder / "leakage").mkdir(exist_ok=True)
        for fold in range(args.folds):
            fit = Fit.of(recipe, folder / f"fold-{fold}", "test")
            path = folder / "leakage" / f"fold-{fold}-{fit.key}.parquet"
            chunks[path] = fit
            files[landmark].append(path)
    run_chunks(leaks, chunks, tell=teller(args.quiet, "leakage checks"))
    return files


def score_views(
    args: argparse.Namespace, folder: Path, landmark: int, views: dict[int, list[Path]]
) -> list[dict[str, Any]]:
    """A row per cohort and view: its AUROC, and its difference from the model that sees everything."""
    samples = pl.read_parquet(folder / "data" / "samples.parquet")
    p = pl.concat([pl.read_parquet(path) for path in views[landmark]])
    rows = []
    for cohort in occupied(samples):
        chosen = samples if cohort == "all" else samples.filter(pl.col(cohort))
        y, group = chosen["label"].to_numpy(), chosen["subject_id"].rank("dense").to_numpy()
        shown = chosen.join(p, ["stay_id", "at_h"], "left", maintain_order="left")
        for name in VIEWS:
            row: dict[str, Any] = {"landmark_h": landmark, "cohort": cohort, "view": name, "n": len(y)}
            if name not in p.columns:
                rows.append({**row, "why": "not recorded in this data"})
                continue
            mine, whole = shown[name].to_numpy(), shown["everything"].to_numpy()
            row["auroc"] = binary_scores(y, mine, group, BOOTSTRAPS, args.seed)["auroc"]
            if name != "everything":
                row["lost"] = paired_difference(y, mine, whole, group, "auroc", BOOTSTRAPS, args.seed)
                if row["auroc"].low is not None:
                    row["above_chance"] = row["auroc"].low > 0.5
            rows.append(row)
    return rows


def occupied(samples: pl.DataFrame) -> list[str]:
    """Those of COHORTS that have a row: where ventilation is not recorded, one has none."""
    return [cohort for cohort in COHORTS if cohort == "all" or samples[cohort].any()]


def every(args: argparse.Namespace, folders: dict[int, Path]) -> list[tuple[int, int, str]]:
    return [(landmark, fold, name) for name in args.models for landmark in folders for fold in range(args.folds)]


def teller(quiet: bool, what: str) -> Callable[[int, int], None] | None:
    return None if quiet else lambda done, total: say(f"{what}: {done} of {total}")


def score_models(
    args: argparse.Namespace, folder: Path, landmark: int, finals: dict[str, list[Path]]
) -> list[dict[str, Any]]:
    """A row per cohort and model: scores with intervals over patients, and the difference from the baseline on the same
    resamples."""
    samples = pl.read_parquet(folder / "data" / "samples.parquet")
    p = {name: pl.concat([pl.read_parquet(path) for path in paths]) for name, paths in finals.items()}
    if all(name in p for name in NETWORKS):
        stacked = pl.concat([p[name] for name in NETWORKS])
        p["networks"] = stacked.group_by("stay_id", "at_h").agg(pl.col("p").mean())
    rows = []
    for cohort in occupied(samples):
        chosen = samples if cohort == "all" else samples.filter(pl.col(cohort))
        y, group = chosen["label"].to_numpy(), chosen["subject_id"].rank("dense").to_numpy()
        of = {
            n: chosen.join(frame, ["stay_id", "at_h"], "left", maintain_order="left")["p"].to_numpy()
            for n, frame in p.items()
        }
        for name, mine in of.items():
            row: dict[str, Any] = {"landmark_h": landmark, "cohort": cohort, "model": name, "n": len(y)}
            row |= {"positive": int(y.sum()), "scores": binary_scores(y, mine, group, BOOTSTRAPS, args.seed)}
            if BASELINE in of and name != BASELINE:
                row["against_baseline"] = paired_difference(
                    y, mine, of[BASELINE], group, "auroc", BOOTSTRAPS, args.seed
                )
            rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The tables in Markdown."""
    synthetic = ", SYNTHETIC data" if result["synthetic"] else ""
    trials = result["trials"]
    searched = "no search (settings of the recipe)" if trials == 1 else f"nested search of {trials} trials"
    lines = [
        f"{result['source']}{synthetic}, {result['folds']} patient-grouped folds, {searched}, "
        f"ensembles of {result['members']}; 95% CI ({result['bootstraps']:,} bootstrap samples of patients). "
        "Cohorts without a patient have no row.",
        "",
        f"| landmark | cohort | model | n | positive | AUROC | AUPRC | Brier | AUROC minus {BASELINE} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["table"]:
        cells = [str(row["scores"][name]) for name in ("auroc", "auprc", "brier")]
        difference = str(row["against_baseline"]) if "against_baseline" in row else ""
        lines.append(
            f"| {row['landmark_h']} h | {row['cohort']} | {row['model']} | {row['n']} | {row['positive']} | "
            f"{' | '.join(cells)} | {difference} |"
        )
    if "leakage" in result:
        lines += ["", "Leakage checks: the same gradient boosting on parts of the inputs.", ""]
        lines += ["| landmark | cohort | sees | AUROC | minus everything | above chance |", "|---|---|---|---|---|---|"]
        for row in result["leakage"]:
            shown = str(row["auroc"]) if "auroc" in row else row["why"]
            lost = str(row["lost"]) if "lost" in row else ""
            above = "" if "above_chance" not in row else "yes" if row["above_chance"] else "no"
            lines.append(f"| {row['landmark_h']} h | {row['cohort']} | {row['view']} | {shown} | {lost} | {above} |")
    return "\n".join(lines) + "\n"


def track(args: argparse.Namespace, folders: dict[int, Path], result: dict[str, Any], uri: str) -> None:
    """Log one MLflow run for the benchmark with its table, and a nested run for each landmark and model."""
    first = next(iter(folders.values())) / "data"
    recipe = recipe_of(args, args.models[0])
    name = f"benchmark-{args.out.absolute().name}"
    top = home.new_run(next_name(name), args.task)
    new = run_tracking.describe_run(top, recipe, prepared.read_meta(first, args.task), first, "benchmark", uri)
    with run_tracking.open_run(top, new, system=False):
        outbox = Outbox(top / "outbox")
        for file in ("table.json", "table.md"):
            outbox.append({"kind": "artifact", "path": str(args.out.absolute() / file), "to": ""})
        for landmark, folder in folders.items():
            meta = prepared.read_meta(folder / "data", args.task)
            for model in dict.fromkeys(row["model"] for row in result["table"]):
                own = recipe_of(args, model) if model in args.models else recipe
                assert isinstance(own.data, IcuData)  # the benchmark is of an intensive-care task
                child = home.new_run(f"{top.name}-{landmark}h-{model}", args.task)
                new = run_tracking.describe_run(child, own, meta, folder / "data", "benchmark", uri, None, top)
                rows = [r for r in result["table"] if (r["landmark_h"], r["model"]) == (landmark, model)]
                with run_tracking.open_run(child, new, system=False):
                    outbox = Outbox(child / "outbox")
                    outbox.append({"kind": "metrics", "step": 0, "values": values(rows, own.data.cohort)})
                    if without := scores.without_interval(named_scores(rows, own.data.cohort)):
                        outbox.append({"kind": "tags", "values": {"raylab.no_interval.folds": json.dumps(without)}})


def next_name(name: str) -> str:
    """`name`, with a number appended if it exists, because every run of the benchmark is tracked separately."""
    existing = {path.name for path in (home.home() / "runs").glob(f"{name}*")}
    return next(new for k in range(len(existing) + 1) if (new := name if k == 0 else f"{name}-{k + 1}") not in existing)


def named_scores(rows: list[dict[str, Any]], cohort: str) -> dict[str, Score]:
    """{SCORE: score} of the rows of `cohort`, {COHORT/SCORE: score} of the others."""
    scores_by_name: dict[str, Score] = {}
    for row in rows:
        difference = {"auroc_minus_baseline": row["against_baseline"]} if "against_baseline" in row else {}
        begin = "" if row["cohort"] == cohort else f"{row['cohort']}/"
        scores_by_name |= {f"{begin}{name}": score for name, score in {**row["scores"], **difference}.items()}
    return scores_by_name


def values(rows: list[dict[str, Any]], cohort: str) -> dict[str, float]:
    """The scores of a model's rows as metrics: of `cohort` as `folds/SCORE` with interval ends and `folds/n`, of other
    cohorts as `folds/COHORT/SCORE`."""
    counts = {f"folds/{'' if row['cohort'] == cohort else row['cohort'] + '/'}n": float(row["n"]) for row in rows}
    named = named_scores(rows, cohort).items()
    return counts | {f"folds/{name}{end}": value for name, score in named for end, value in score.ends()}
