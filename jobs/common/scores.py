"""Predictions of a finished run on a split: scores with intervals, plots, and their way into MLflow."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.common import cxr_controls, home
from jobs.common.figures import draw
from jobs.common.progress import say
from raylab.config.recipe import IcuData, Recipe
from raylab.data.icu import cohorts
from raylab.data.icu.dataset import IcuSamples
from raylab.data.prepared import read_meta
from raylab.data.samples import Samples
from raylab.evaluation import temperature
from raylab.evaluation.intervals import text
from raylab.files import read_lines, write_json
from raylab.tasks.base import Task
from raylab.tasks.outcomes import Multiclass
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.run import read_model
from tracking.outbox import Outbox

BOOTSTRAPS = 1000
MATRICES = ("confusion", "confusion_by_source")


def load(directory: Path, data: Path, split: str) -> tuple[Task, Recipe, Samples, Any]:
    """(task, recipe, samples, network) to score run `directory` on `data`, with the run's own statistics."""
    job, recipe, spec, network = read_model(directory)
    return job, recipe, job.load(data, split, recipe.data, spec), network


def probabilities(job: Task, recipe: Recipe, samples: Samples, network: Any) -> np.ndarray:
    import torch

    torch.set_num_threads(recipe.loop.threads)
    return predict(job, network, samples, ProcessGroup(), recipe, "cpu")


def of_run(directory: Path, data: Path, split: str) -> dict[str, Any]:
    """{"result": scores (JSON), "samples", "p", "split", "meta"} of a run on a split; every cohort of the task."""
    meta = read_meta(data, home.note(directory).task)
    job, recipe, samples, network = load(directory, data, split)
    p = probabilities(job, recipe, samples, network)
    own = job.outcome.scores(samples, p, BOOTSTRAPS, recipe.seed)
    result: dict[str, Any] = {
        **own,
        "loss": job.outcome.log_loss(samples.y, p),
        "n": len(samples),
        "patients": len(np.unique(samples.group)),
        "classes": job.outcome.class_counts(samples),
        "absent": list(getattr(samples, "absent", [])),
        "differs": differences(samples),
        "bootstraps": BOOTSTRAPS,
    }
    if isinstance(recipe.data, IcuData):
        cohort = result["cohort"] = recipe.data.cohort
        everybody, p_all = samples, p
        if cohort != "all":
            everybody = job.load(data, split, recipe.data.model_copy(update={"cohort": "all"}), samples.spec)
            p_all = probabilities(job, recipe, everybody, network)
        where = f"{data} has no row in split '{split}'"
        result["cohorts"] = by_cohort(job, everybody, p_all, recipe.seed, where, {cohort: own})  # type: ignore[arg-type]
    if job.kind == "images":
        result |= cxr_controls.beside(directory, samples, p, BOOTSTRAPS, recipe.seed)
    parameters = sum(weight.numel() for weight in network.parameters())
    out = {"result": result, "samples": samples, "p": p, "split": split, "meta": meta, "job": job}
    return out | {"parameters": parameters}


def by_cohort(
    job: Task, samples: IcuSamples, p: np.ndarray, seed: int, where: str, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Scores of every cohort, the unflattering ones too, as masks over one prediction `p` of all rows.

    `where` names the data in the reason for an empty cohort. Scores of the `known` cohorts are not computed again.
    """
    found: dict[str, dict[str, Any]] = {}
    for cohort in cohorts.COHORTS:
        inside = np.ones(len(samples), bool) if cohort == "all" else samples.rows[cohort].to_numpy()
        if not inside.any():
            found[cohort] = {"n": 0, "why": f"{where}, cohort '{cohort}'"}
            continue
        part = samples.subset(inside)
        scores = known.get(cohort) or job.outcome.scores(part, p[inside], BOOTSTRAPS, seed)
        found[cohort] = {"n": len(part), "positives": int(part.y.sum()), **scores}
    return found


def differences(samples: Samples) -> list[str]:
    """Where this data's label is not the one that the model learnt, in words."""
    if not isinstance(samples, IcuSamples):
        return []
    spec, meta = samples.spec, samples.meta
    mine, theirs = spec["label"], meta.label
    in_words = {"onset", "population", "at_risk", "positive", "title", "persistence"}
    windows = [name for name in mine if name not in in_words]
    found = [
        f"{name.removesuffix('_h')}: the model's {mine[name]}, this data's {theirs.get(name, 'not said')}"
        for name in windows
        if mine[name] != theirs.get(name)
    ]
    return found + [
        f"{name}: the model's {spec[name]}, this data's {getattr(meta, name)}"
        for name in ("framing", "horizon_h", "gap_h")
        if spec[name] != getattr(meta, name)
    ]


def record(directory: Path, scored: dict[str, Any]) -> None:
    """Append scores as metrics `SPLIT/score`, `_low`, `_high`, and the plots, to the run's outbox.

    They are of the kept model, so they stand at the last step of its epoch; those of the split that chose it are
    `best/val/...`, because `val/...` is the curve over all epochs. Scores without an interval have the value alone; the
    tag raylab.no_interval.SPLIT (or .best/val) has them by reason.
    """
    result, split = scored["result"], scored["split"]
    described = home.note(directory)
    chosen_by_it = split == "val" and described.kind != "evaluate"
    prefix = "best/val" if chosen_by_it else split
    values: dict[str, float] = {f"{prefix}/n": result["n"]}
    for name, score in flat_scores(result).items():
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
            if score[key] is not None:
                values[f"{prefix}/{name}{end}"] = score[key]
    outbox = Outbox(directory / "outbox")
    append_new_metrics(outbox, described.best_step, values)
    if without := without_interval(result):
        outbox.append({"kind": "tags", "values": {f"raylab.no_interval.{prefix}": json.dumps(without)}})
    keep(directory, scored)
    if "leakage" in scored:
        outbox.append({"kind": "tags", "values": {f"raylab.leakage.{split}": json.dumps(scored["leakage"])}})
    folder = directory / "plots"
    folder.mkdir(exist_ok=True)
    for name, figure in draw(scored).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
        file = folder / f"{split}-{name}.png"
        file.write_bytes(picture.getvalue())
        outbox.append({"kind": "artifact", "path": str(file), "to": "plots"})


def append_new_metrics(outbox: Outbox, step: int, values: Mapping[str, float]) -> None:
    """Append what the outbox does not hold yet: a score that is computed again is one point, not two."""
    held: dict[str, float] = {}
    for record in read_lines(outbox.path):
        if record["kind"] == "metrics" and record["step"] == step:
            held |= record["values"]
    if new := {name: float(value) for name, value in values.items() if held.get(name) != value}:
        outbox.append({"kind": "metrics", "step": step, "values": new})


def flat_scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores {name: {"value", "low", "high"}} among a result's entries."""
    found = {k: v for k, v in result.items() if isinstance(v, dict) and {"value", "low", "high"} <= v.keys()}
    for cohort, scores in result.get("cohorts", {}).items():
        if cohort != result.get("cohort"):
            found |= {f"{cohort}/{k}": v for k, v in flat_scores(scores).items()}
    return found


def without_interval(result: dict[str, Any]) -> dict[str, list[str]]:
    """{why: [score, ...]} of the scores that have a value and no interval."""
    found: dict[str, list[str]] = {}
    for name, score in flat_scores(result).items():
        if score["value"] is not None and score["low"] is None:
            found.setdefault(score["why"], []).append(name)
    return found


def keep(directory: Path, scored: dict[str, Any]) -> None:
    """`scores/SPLIT-DATA.json` of a run: what its model card is made from."""
    folder = directory / "scores"
    folder.mkdir(exist_ok=True)
    told = {"data": scored["meta"].data_hash, "split": scored["split"], "leakage": scored.get("leakage")}
    write_json(folder / f"{scored['split']}-{told['data'][:12]}.json", {**told, **scored["result"]})


def calibrate(directory: Path, scored: dict[str, Any]) -> None:
    """Fit the temperature of a run's model on its val rows, and keep it with the model. Several classes only."""
    if isinstance(scored["job"].outcome, Multiclass):
        fitted = temperature.fit(scored["samples"].y, scored["p"])
        write_json(directory / "model" / "temperature.json", {"temperature": fitted, "fitted_on": scored["split"]})


def tell(out: dict[str, Any]) -> None:
    counts = ", ".join(f"{name} {n}" for name, n in out["classes"].items())
    synthetic = ", SYNTHETIC data" if out.get("synthetic") else ""
    classes = f" ({counts})" if counts else ""
    say(f"{out['split']} split: {out['n']} rows of {out['patients']} patients{classes}{synthetic}")
    for name, score in flat_scores({**out, "cohorts": {}}).items():
        say(f"  {name:<32} {text(score)}")
    for cohort, of in out.get("cohorts", {}).items():
        if cohort != out["cohort"]:
            shown = of.get("why") or f"AUROC {text(of['auroc'])}, AUPRC {text(of['auprc'])}"
            say(f"  cohort {cohort + ',':<15} {of.get('positives', 0)} of {of['n']}: {shown}")
    for line in cxr_controls.lines(out):
        say(f"  {line}")
    for source, matrix in out.get("confusion_by_source", {}).items():
        say(f"  confusion, {source} (rows truth): {matrix}")
    if out["differs"]:
        say(f"  the label differs from the one learnt: {'; '.join(out['differs'])}")
    if out["absent"]:
        say(f"  never measured in this data: {', '.join(out['absent'])}")
