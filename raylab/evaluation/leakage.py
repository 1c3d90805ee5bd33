"""Leakage checks of the ARDS task: models on restricted views of the inputs.

The same gradient boosting is fitted on each view. If a view of only measurement times, only the time of day or only
demographics scores above chance, that much of a score comes from the ward's behaviour or the case mix. The view without
FiO2 and PaO2 shows how much comes from the label's own ingredients.
"""

from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from raylab.data.icu.dataset import IcuSamples
from raylab.models.baselines import Summary, check_both_classes

GASES = ("fio2", "pao2", "pf", "sf")
VIEWS = {
    "everything": "all inputs",
    "masks": "only what was measured, how often and how long ago",
    "time of day": "only the hour of the clock at the prediction",
    "static": "only age, sex, height, weight, unit type",
    "without FiO2 and PaO2": "all inputs but these two and their ratios",
}
TREES, RATE, LEAVES = 100, 0.07, 8


def view(samples: IcuSamples, name: str) -> NDArray[np.float64] | None:
    """Return the inputs of a view [N, D]; None if the data does not have it."""
    f = len(samples.spec["features"])
    if name == "time of day":
        clock = samples.rows["clock_h"].cast(pl.Float64)
        return None if clock.null_count() else clock.to_numpy()[:, None]
    x = samples.batch(np.arange(len(samples)))
    if name == "static":
        static = x[:, -1, 3 * f :]
        return static.double().numpy() if static.shape[1] else None
    if name == "masks":
        masks: NDArray[np.float64] = torch.cat([x[..., f : 2 * f].sum(1), x[:, -1, 2 * f : 3 * f]], 1).double().numpy()
        return masks
    rows: NDArray[np.float64] = Summary(f)(x).numpy()
    if name == "everything":
        return rows
    gone = [i for i, feature in enumerate(samples.spec["features"]) if feature in GASES]
    return np.delete(rows, [k * f + i for k in range(8) for i in gone], axis=1)


def probabilities(train: IcuSamples, scored: IcuSamples) -> dict[str, NDArray[np.float64]]:
    """Return {view: p [N] of `scored`}, by a model of that view of `train`; views that the data lacks are omitted."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    check_both_classes(train.y)
    by_view = {}
    for name in VIEWS:
        train_x, scored_x = view(train, name), view(scored, name)
        if train_x is None or scored_x is None:
            continue
        options: dict[str, Any] = {"early_stopping": False, "random_state": 0, "l2_regularization": 10.0}
        model = HistGradientBoostingClassifier(max_iter=TREES, learning_rate=RATE, max_leaf_nodes=LEAVES, **options)
        by_view[name] = model.fit(train_x, train.y).predict_proba(scored_x)[:, 1]
    return by_view
