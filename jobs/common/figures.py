"""The figures of an evaluation, by type of outcome."""

from collections.abc import Callable
from typing import Any

import numpy as np

from raylab.data.lung.sweep_dataset import SweepSamples
from raylab.documents import to_plain
from raylab.tasks.evaluation import Evaluation
from raylab.tasks.outcomes import Binary, Multiclass, MultiLabel, Outcome, Proximity, Regression, SectionDepth
from tracking import plots

MAP_AXES = (("fio2", "shunt"), ("rate_per_min", "alveolar_dead_space"), ("tidal_volume_mL", "compliance_mL_per_cmH2O"))


def curves(scored: Evaluation) -> dict[str, Any]:
    """What `compare` draws of several models in one plot: bins of calibration and, if available, the decision curve of
    a binary outcome; empty for other outcomes."""
    if not isinstance(scored.task.outcome, Binary):
        return {}
    bins = plots.calibration_bins(scored.samples.y, scored.p)
    decision = scored.more.get("decision_curve")
    return {
        "calibration": [one._asdict() for one in bins],
        **({} if decision is None else {"decision": to_plain(decision)}),
    }


def draw(scored: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation, {name: figure}."""
    where = f"{scored.split} split, n = {scored.n}"
    return FIGURES[type(scored.task.outcome)](scored, where)


def binary(scored: Evaluation, where: str) -> dict[str, Any]:
    """ROC, precision-recall, calibration and, if available, decision curve; empty if there is only one class."""
    y, p, synthetic = scored.samples.y, scored.p, scored.meta.synthetic
    if len(np.unique(y)) < 2:
        return {}
    curve = scored.more.get("decision_curve")
    return {
        "roc": plots.roc(y, p, f"ROC, {where}", synthetic),
        "precision-recall": plots.precision_recall(y, p, f"Precision and recall, {where}", synthetic),
        "calibration": plots.calibration(y, p, title=f"Calibration, {where}", synthetic=synthetic),
        **({} if curve is None else {"decision": plots.decision(curve, f"Decision curve, {where}", synthetic)}),
    }


def multiclass(scored: Evaluation, where: str) -> dict[str, Any]:
    matrix, classes = np.array(scored.tables["confusion"]), scored.samples.spec["classes"]
    title, synthetic = f"Confusion, {where}", scored.meta.synthetic
    return {"confusion": plots.confusion(matrix, classes, title=title, synthetic=synthetic)}


def regression(scored: Evaluation, where: str) -> dict[str, Any]:
    """For each pair of inputs, a map of the mean absolute error of every output."""
    samples = scored.samples
    assert isinstance(samples, SweepSamples)
    inputs, error = samples.inputs(), np.abs(scored.p - samples.y)
    return {
        f"error-{x}-{y}": plots.error_maps(inputs[x], inputs[y], error, samples.spec["classes"], (x, y), where)
        for x, y in MAP_AXES
        if x in inputs and y in inputs
    }


def section_depth(scored: Evaluation, where: str) -> dict[str, Any]:
    """The mean prediction of each section against its depth."""
    from raylab.evaluation.section_depth import section_means

    samples = scored.samples
    truth, predicted = (section_means(v, samples.group) for v in scored.task.outcome.kept(samples, scored.p))
    title = f"Depth of sections, {where} patches"
    return {"depth": plots.agreement(truth, predicted, "depth, in sections", title, scored.meta.synthetic)}


FIGURES: dict[type[Outcome], Callable[[Evaluation, str], dict[str, Any]]] = {
    Binary: binary,
    Multiclass: multiclass,
    MultiLabel: lambda scored, where: {},  # a table of counts instead (multilabel.counts)
    Proximity: lambda scored, where: {},  # embeddings have no figure of their own
    Regression: regression,
    SectionDepth: section_depth,
}
