"""Controls for scores on chest X-rays: border probe, contrasts within a source, strata by view, calibration."""

from pathlib import Path
from typing import Any

import numpy as np

from jobs.common import home
from raylab.data.prepared import read_meta
from raylab.documents import Document, read_json
from raylab.errors import DataError
from raylab.evaluation import temperature
from raylab.evaluation.cxr_controls import border_probe, within_source
from raylab.evaluation.metrics import confusion, confusion_by, multiclass_scores, paired_difference


class Temperature(Document):
    """model/temperature.json"""

    temperature: float
    fitted_on: str


def compute_controls(directory: Path, samples: Any, p: np.ndarray, bootstraps: int, seed: int) -> dict[str, Any]:
    """The entries of a result that put the score of run `directory` on `samples` into perspective.

    border_macro_recall         of the border probe, fitted on the run's own training data
    minus_border                network minus border probe, on the same resamples of groups
    within_source               AUROC of class pairs in one source, of the network and of the border probe
    confusion_by_view           if views are known
    ece_calibrated, brier_calibrated  at the temperature fitted on the run's val rows, if there is one
    """
    classes = samples.spec["classes"]
    result: dict[str, Any] = {}
    try:
        fitted_on = training_data(directory)
        border = border_probe(fitted_on, home.home() / "controls")(samples)
    except DataError as gone:
        border = None
        result["border"] = {"why": f"no border probe: {gone.what}"}
    if border is not None:
        scores = multiclass_scores(samples.y, border, samples.group, classes, bootstraps, seed)
        result["border_macro_recall"] = scores["macro_recall"]
        result["minus_border"] = paired_difference(
            samples.y, p, border, samples.group, "macro_recall", bootstraps, seed, classes
        )
        by_source = confusion_by(samples.source, samples.y, border)
        result["border"] = {"confusion": confusion(samples.y, border), "confusion_by_source": by_source}
    result["within_source"] = []
    controls = {} if border is None else {t[:3]: t[3] for t in within_source(samples, border, bootstraps, seed)}
    for source, one, other, auroc in within_source(samples, p, bootstraps, seed):
        result["within_source"].append(
            {"source": source, "classes": [one, other], "auroc": auroc, "border": controls.get((source, one, other))}
        )
    if set(samples.view) != {"unknown"}:
        result["confusion_by_view"] = confusion_by(samples.view, samples.y, p)
    note = directory / "model" / "temperature.json"
    if note.is_file():
        fitted = read_json(note, Temperature, "remove it: the scores then have no calibrated ECE")
        scaled = temperature.scaled(p, fitted["temperature"])
        scores = multiclass_scores(samples.y, scaled, samples.group, classes, bootstraps, seed)
        result |= {"temperature": fitted, "ece_calibrated": scores["ece"], "brier_calibrated": scores["brier"]}
    return result


def training_data(directory: Path) -> Path:
    """The prepared directory on which a run was trained; DataError if it is missing or has changed."""
    run_record = home.note(directory)
    path = Path(run_record.data)
    if read_meta(path, run_record.task).data_hash != run_record.data_hash:
        raise DataError(f"{path} is no longer the data on which run {directory.name} was trained")
    return path


def render_lines(result: dict[str, Any]) -> list[str]:
    """The lines printed below the scores."""
    text = []
    for row in result.get("within_source", []):
        n = " and ".join(str(n) for n in row["auroc"].n)
        border = f"; border probe {row['border'].value:.3f}" if row["border"] else ""
        text.append(
            f"within {row['source']}, {row['classes'][0]} against {row['classes'][1]} (n = {n}): "
            f"AUROC {row['auroc']}{border}"
        )
    if "why" in result.get("border", {}):
        text.append(result["border"]["why"])
    return text
