"""Scores a finished run on a split, with intervals and plots, and logs the scores to MLflow."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.common import cxr_controls, description, home, predictions
from jobs.common.console import list_counts, say
from jobs.common.model_inputs import KINDS, inputs_of
from raylab.config.recipe import IcuData, Recipe
from raylab.data.icu import cohorts
from raylab.data.icu.dataset import IcuSamples
from raylab.data.icu.meta import IcuMeta
from raylab.data.samples import Samples
from raylab.evaluation import temperature
from raylab.evaluation.metrics import binary_scores_by
from raylab.files import atomic_write, write_json
from raylab.score import Score, fold_reasons
from raylab.tasks import find_task
from raylab.tasks.base import Task
from raylab.tasks.evaluation import Cohort, Evaluation
from raylab.tasks.outcomes import Multiclass
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.run import read_model
from tracking import views
from tracking.outbox import Outbox, append_new_metrics

BOOTSTRAPS = 1000


def load(directory: Path, data: Path, split: str) -> tuple[Task, Recipe, Samples, Any]:
    """Load (task, recipe, samples, network) of run `directory` on `data`, normalised with the run's own statistics."""
    job, recipe, spec, network = read_model(directory)
    if job.kind in KINDS:
        inputs_of(job, spec)  # DataError for an incomplete one
    return job, recipe, job.load(data, split, recipe.data, spec), network


def probabilities(job: Task, recipe: Recipe, samples: Samples, network: Any) -> np.ndarray:
    import torch

    torch.set_num_threads(recipe.loop.threads)
    return predict(job, network, samples, ProcessGroup(), recipe, "cpu")


def score_run(directory: Path, data: Path, split: str) -> Evaluation:
    """The evaluation of the run's model on a split of `data`, with every cohort of the task."""
    meta = find_task(home.note(directory).task).read_meta(data)
    job, recipe, samples, network = load(directory, data, split)
    p = probabilities(job, recipe, samples, network)
    icu: dict[str, Any] = {}
    if isinstance(recipe.data, IcuData):
        cohort, everybody, p_all = recipe.data.cohort, samples, p
        if cohort != "all":
            everybody = job.load(data, split, recipe.data.model_copy(update={"cohort": "all"}), samples.spec)
            p_all = probabilities(job, recipe, everybody, network)
        where = f"{data} has no row in split '{split}'"
        icu = {"cohort": cohort, "cohorts": score_cohorts(everybody, p_all, recipe.seed, where)}  # type: ignore[arg-type]
    scored = Evaluation(
        task=job,
        samples=samples,
        p=p,
        split=split,
        meta=meta,
        parameters=sum(weight.numel() for weight in network.parameters()),
        bootstraps=BOOTSTRAPS,
        scores=icu["cohorts"][cohort].scores
        if icu
        else job.outcome.scores(samples, p, BOOTSTRAPS, recipe.seed, meta.unit),
        tables=job.outcome.tables(samples, p),
        differs=differences(samples.spec, samples.meta) if isinstance(samples, IcuSamples) else [],
        **icu,
    )
    if job.kind == "images":
        scored = replace(scored, more=cxr_controls.compute_controls(directory, samples, p, BOOTSTRAPS, recipe.seed))
    return scored


def score_cohorts(samples: IcuSamples, p: np.ndarray, seed: int, where: str) -> dict[str, Cohort]:
    """The scores of every cohort, over one prediction `p` of all rows and the same resamples of all patients.

    `where` names the data in the reason for an empty cohort.
    """
    members = {
        name: np.ones(len(samples), bool) if name == "all" else samples.rows[name].to_numpy()
        for name in cohorts.COHORTS
    }
    present = {name: inside for name, inside in members.items() if inside.any()}
    scores = binary_scores_by(samples.y, p, samples.group, present, BOOTSTRAPS, seed)
    return {
        name: Cohort(int(inside.sum()), int(samples.y[inside].sum()), scores[name])
        if name in scores
        else Cohort(0, why=f"{where}, cohort '{name}'")
        for name, inside in members.items()
    }


def differences(spec: dict[str, Any], meta: IcuMeta) -> list[str]:
    """Descriptions of how the label of this data differs from the one on which the model was trained."""
    mine, theirs = spec["label"], meta.label
    in_words = {"onset", "population", "at_risk", "positive", "title", "persistence"}
    windows = [name for name in mine if name not in in_words]
    changed_windows = [
        f"{name.removesuffix('_h')}: the model's {mine[name]}, this data's {theirs.get(name, 'not recorded')}"
        for name in windows
        if mine[name] != theirs.get(name)
    ]
    return changed_windows + [
        f"{name}: the model's {spec[name]}, this data's {getattr(meta, name)}"
        for name in ("framing", "horizon_h", "gap_h")
        if spec[name] != getattr(meta, name)
    ]


def record(directory: Path, scored: Evaluation) -> None:
    """Append scores as metrics `SPLIT/score`, `_low` and `_high`, and the plots, to the run's outbox.

    Of cohorts other than the run's own only the scores that tables show are metrics. `evaluation-SPLIT.json`, an
    artifact, has all of them, and what `compare` draws.

    The scores are those of the best epoch and are logged at its last step. On the split that selected that epoch they
    are named `best/val/...`, because `val/...` is the curve over all epochs. A score without an interval has only its
    value; the tag raylab.no_interval.SPLIT (or .best/val) lists these by reason.
    """
    split, logged = scored.split, logged_scores(scored)
    run_record = home.note(directory)
    chosen_by_it = split == "val" and run_record.kind != "evaluate"
    prefix = "best/val" if chosen_by_it else split
    values: dict[str, float] = {f"{prefix}/n": scored.n}
    values |= {f"{prefix}/{name}{end}": value for name, score in logged.items() for end, value in score.ends()}
    outbox = Outbox(directory / "outbox")
    append_new_metrics(outbox, run_record.best_step, values)
    column = views.VAL_SCORE if split == "val" else views.TEST_SCORE
    tags = {column: describe_first(scored, of_all=split == "all")}
    if without := without_interval(logged):
        tags[f"raylab.no_interval.{prefix}"] = json.dumps(without)
    keep(directory, scored)
    predictions.keep(directory, scored)
    if scored.leakage is not None:
        tags[f"raylab.leakage.{split}"] = json.dumps(scored.leakage)
    outbox.append({"kind": "tags", "values": tags | {description.TAG: description.describe(directory)}})
    folder = directory / "plots"
    folder.mkdir(exist_ok=True)
    from jobs.common import provenance  # Matplotlib is needed only here, when a run has ended
    from jobs.common.figures import curves, draw
    from tracking.provenance import save_png

    others = {name: of.to_json() for name, of in scored.cohorts.items() if name != scored.cohort}
    if details := curves(scored) | ({"cohorts": others} if others else {}):
        write_json(folder / f"evaluation-{split}.json", details)
        outbox.append({"kind": "artifact", "path": str(folder / f"evaluation-{split}.json"), "to": ""})
    origin = [provenance.describe(directory)]
    for name, figure in draw(scored).items():
        file = folder / f"{split}-{name}.png"
        with atomic_write(file) as beside:
            save_png(figure, beside, origin, dpi=110, bbox_inches="tight")
        outbox.append({"kind": "artifact", "path": str(file), "to": "plots"})


def logged_scores(scored: Evaluation) -> dict[str, Score]:
    """The scores that are metrics in MLflow."""
    shown = {*scored.own_scores(), *scored.task.primary, *scored.task.secondary}
    return {name: score for name, score in scored.all_scores().items() if name in shown}


def describe_first(scored: Evaluation, of_all: bool = False) -> str:
    """`0.812 [0.760, 0.861] auroc`: the first of the task's scores that the rows have, "" without any. `of_all`: the
    rows are those of every split."""
    found = scored.all_scores()
    known = [name for name in scored.task.primary if name in found and found[name].value is not None]
    return f"{found[known[0]].shorten()} {known[0]}{', all rows' if of_all else ''}" if known else ""


def without_interval(scores: Mapping[str, Score]) -> dict[str, list[str]]:
    """{reason: [score, ...]} of the scores that have a value but no interval."""
    names_by_reason: dict[str, list[str]] = {}
    for name, score in scores.items():
        if score.value is not None and score.low is None:
            names_by_reason.setdefault(score.why or "", []).append(name)
    return names_by_reason


def keep(directory: Path, scored: Evaluation) -> None:
    """Write `scores/SPLIT-DATA.json` of a run, from which its model card is rendered."""
    folder = directory / "scores"
    folder.mkdir(exist_ok=True)
    facts = {
        "data": scored.meta.data_hash,
        "split": scored.split,
        "leakage": scored.leakage,
        "primary": list(scored.task.primary),  # a list of runs names scores without the code of an own task
    }
    write_json(folder / f"{scored.split}-{scored.meta.data_hash[:12]}.json", {**facts, **scored.to_json()})


def calibrate(directory: Path, scored: Evaluation) -> None:
    """Fit the temperature of a multiclass model on its val rows and store it with the model."""
    if isinstance(scored.task.outcome, Multiclass):
        value = temperature.fit(scored.samples.y, scored.p)
        write_json(directory / "model" / "temperature.json", {"temperature": value, "fitted_on": scored.split})


def tell(scored: Evaluation) -> None:
    """Print an evaluation."""
    counts = list_counts(scored.classes)
    synthetic = ", SYNTHETIC data" if scored.meta.synthetic else ""
    classes = f" ({counts})" if counts else ""
    say(f"{scored.split} split: {scored.n} rows of {scored.patients} {scored.meta.unit}s{classes}{synthetic}")
    texts, reasons = fold_reasons(scored.own_scores())
    for name, text in texts.items():
        say(f"  {name:<32} {text}")
    for reason in reasons:
        say(f"  {reason}")
    for name, of in scored.cohorts.items():
        if name != scored.cohort:
            texts, reasons = fold_reasons({score: of.scores[score] for score in ("auroc", "auprc") if not of.why})
            shown = of.why or "; ".join([f"AUROC {texts['auroc']}, AUPRC {texts['auprc']}", *reasons])
            say(f"  cohort {name + ',':<15} {of.positives} of {of.n}: {shown}")
    for line in cxr_controls.render_lines(scored.more):
        say(f"  {line}")
    for source, matrix in scored.tables.get("confusion_by_source", {}).items():
        say(f"  confusion matrix, {source} (rows: true class): {matrix}")
    if scored.differs:
        say(f"  the label differs from that of the training data: {'; '.join(scored.differs)}")
    if scored.absent:
        say(f"  never measured in this data: {', '.join(scored.absent)}")
