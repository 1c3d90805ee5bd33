"""Clinical scores that `evaluate` adds: calibration index, decision curve, subgroups, alarms, recalibration."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from jobs.common import scores
from jobs.common.console import say
from raylab.config.recipe import Recipe
from raylab.data.icu.dataset import IcuSamples
from raylab.errors import DataError, UsageError
from raylab.evaluation import alarms, clinical
from raylab.evaluation.metrics import binary_scores
from raylab.score import fold_reasons
from raylab.tasks.evaluation import Evaluation

AGES = ((0, 45), (45, 65), (65, 80), (80, 121))  # years, the upper one excluded
UNITS = {1: "coronary", 2: "cardiac surgery", 3: "medical", 4: "surgical"}
SHOWN = ("brier", "brier_scaled", "calibration_slope", "calibration_intercept")


def compute_clinical_scores(scored: Evaluation, recipe: Recipe) -> dict[str, Any]:
    """The additional entries of an evaluation on intensive-care data, by name."""
    samples, p = scored.samples, scored.p
    assert isinstance(samples, IcuSamples)
    rows = (samples.y, p, samples.group)
    extra: dict[str, Any] = {
        "ici": clinical.ici(*rows, scores.BOOTSTRAPS, recipe.seed),
        "decision_curve": clinical.decision_curve(*rows, scores.BOOTSTRAPS, recipe.seed),
        "subgroups": clinical.subgroups(*rows, members(samples.rows), scores.BOOTSTRAPS, recipe.seed),
        "ends": dict(sorted(samples.rows.group_by("outcome").len().iter_rows())),
        "notes": samples.meta.notes,
    }
    if samples.meta.framing == "rolling":
        extra["alarms"] = alarms.scores(rolling(samples, p), scores.BOOTSTRAPS, recipe.seed)
    return extra


def members(rows: pl.DataFrame) -> dict[str, NDArray[np.bool_]]:
    """{subgroup: mask over rows} for age bands, sex and type of unit; rows with a missing value are in no subgroup."""
    conditions = {}
    if "age" in rows.columns:
        for low, high in AGES:
            conditions[f"age {low} to {high - 1}"] = (pl.col("age") >= low) & (pl.col("age") < high)
    if "sex" in rows.columns:
        conditions |= {"female": pl.col("sex") == 0, "male": pl.col("sex") == 1}
    if "icu_type" in rows.columns:
        conditions |= {f"{name} unit": pl.col("icu_type") == kind for kind, name in UNITS.items()}
    return {name: rows.select(inside.fill_null(False)).to_series().to_numpy() for name, inside in conditions.items()}


def rolling(samples: IcuSamples, p: NDArray[np.float64]) -> alarms.Rolling:
    rows = samples.rows.select("stay_id", "group", "at_h", "onset_h")
    stays = rows.unique("stay_id", keep="first", maintain_order=True).with_row_index("stay")
    place = rows.join(stays.select("stay_id", "stay"), "stay_id", "left", maintain_order="left")["stay"]
    onset = rows["onset_h"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    at, group = rows["at_h"].to_numpy(), stays["group"].to_numpy()
    meta = samples.meta
    assert meta.horizon_h is not None  # rolling predictions always have a horizon
    return alarms.Rolling(place.cast(pl.Int64).to_numpy(), at, onset, p, group, meta.gap_h, meta.horizon_h)


def compare_recalibration(
    directory: Path, data: Path, scored: Evaluation, few: int, own: bool, seed: int
) -> dict[str, Any]:
    """Calibration before and after fitting intercept and slope on `few` patients of this site.

    They are drawn from its train split, or from its val split if the model was trained on it; their rows are not
    scored.
    """
    split = "val" if own else "train"
    job, recipe, others, network = scores.load(directory, data, split)
    patients = np.unique(others.group)
    if few > len(patients):
        what = f"--recalibrate {few}: the {split} split of {data} has only {len(patients)} patients"
        raise UsageError(what, do=f"--recalibrate N with N up to {len(patients)}")
    chosen = np.random.default_rng(seed).choice(patients, few, replace=False)
    inside = np.isin(others.group, chosen)
    p_few = scores.probabilities(job, recipe, others, network)[inside]
    samples, p = scored.samples, scored.p
    kept = ~np.isin(samples.group, chosen)
    if not kept.any():
        raise DataError("no rows are left to score", "recalibration uses every patient", "use a smaller --recalibrate")
    y, group = samples.y[kept], samples.group[kept]
    after, fit = clinical.recalibrate(p[kept], others.y[inside], p_few)

    def score(q: NDArray[np.float64]) -> dict[str, Any]:
        all_scores = binary_scores(y, q, group, scores.BOOTSTRAPS, seed)
        return {
            **{name: all_scores[name] for name in SHOWN},
            "ici": clinical.ici(y, q, group, scores.BOOTSTRAPS, seed),
        }

    return {"patients": few, "split": split, "n": len(y), "fit": fit, "before": score(p[kept]), "after": score(after)}


def tell(more: dict[str, Any]) -> None:
    """Print the clinical scores and the recalibration."""
    say("  net benefit (in brackets: of treating everyone):")
    texts, reasons = fold_reasons({row.threshold: row.model for row in more["decision_curve"]})
    for row in more["decision_curve"]:
        say(f"    at {row.threshold:<4g} {texts[row.threshold]} ({row.everybody:.3f})")
    for reason in reasons:
        say(f"    {reason}")
    say("  subgroups, AUROC:")
    for name, of in more["subgroups"].items():
        say(f"    {name:<22} {of.positive:>5} of {of.n:<6} {of.why or of.scores['auroc']}")
    say("  outcomes of the rows: " + ", ".join(f"{how} {n:,}" for how, n in more["ends"].items()))
    for row in more.get("alarms", ()):
        if row.why is not None:
            say(f"  alarms, event recall {row.event_recall_at_least:g}: {row.why}")
            continue
        say(
            f"  alarms: event recall {row.event_recall}, precision {row.alarm_precision}, "
            f"{row.alarms_per_patient_day} a patient-day, lead {row.lead_h} h"
        )
    if of := more.get("recalibrated"):
        say(f"  recalibrated on {of['patients']} patients of {of['split']}, {of['n']} rows scored:")
        for name in of["before"]:
            say(f"    {name:<24} {of['before'][name]} -> {of['after'][name]}")
    for note in more["notes"]:
        say(f"  note: {note}")
