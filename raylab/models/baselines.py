"""Baselines that are fitted at once instead of trained step by step.

They read the same inputs as a network, x [B, T, 3F + S] (data/icu/dataset.py), through a summary of each series. Once
fitted they are ordinary networks, with weights in safetensors and no pickle.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylab.config.recipe import BoostingModel, LinearModel
from raylab.errors import DataError

PER_SERIES = 8


class Summary(nn.Module):
    """Summarises the window of each series: x [B, T, 3F + S] -> float64 [B, 8F + S].

    Per series: last, mean, minimum, maximum, first, last minus first of the measured values, their count, and hours
    since the last one / T; then the static features. NaN if never measured.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """Summarise a batch as the class describes."""
        f = self.features
        value, mask, since = (x[..., k * f : (k + 1) * f].double() for k in range(3))
        count = mask.sum(1)
        ever = count > 0
        nothing = torch.full_like(count, torch.nan)
        inf = torch.full_like(value, torch.inf)
        first_at = mask.argmax(1, keepdim=True)
        first = value.gather(1, first_at)[:, 0]
        last = value[:, -1]
        parts = (
            last,
            (value * mask).sum(1) / count.clamp(min=1),
            torch.where(mask > 0, value, inf).amin(1),
            torch.where(mask > 0, value, -inf).amax(1),
            first,
            last - first,
        )
        measured = [torch.where(ever, part, nothing) for part in parts]
        return torch.cat([*measured, count, since[:, -1], x[:, -1, 3 * f :].double()], 1)


class Fitted(nn.Module, ABC):
    """A model without steps: `fit` sets its weights from the entire training split, deterministically."""

    @abstractmethod
    def fit(self, x: Tensor, y: np.ndarray) -> None:
        """Fit the weights to x [N, T, 3F + S] and y [N], which is 0 or 1."""


class Logistic(Fitted):
    """Logistic regression with an L2 penalty on standardised summaries; missing values are replaced by the mean."""

    mean: Tensor
    scale: Tensor

    def __init__(self, summary: nn.Module, width: int, config: LinearModel) -> None:
        super().__init__()
        self.summary, self.l2 = summary, config.l2
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(width, dtype=torch.float64))
        self.head = nn.Linear(width, 1).double()

    def inputs(self, x: Tensor) -> Tensor:
        return torch.nan_to_num((self.summary(x) - self.mean) / self.scale, nan=0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inputs(x))
        return out.to(x.dtype)

    def fit(self, x: Tensor, y: np.ndarray) -> None:
        """Fit the regression on series x [N, hours, features] and labels y [N]."""
        from sklearn.linear_model import LogisticRegression  # not above: it would slow down every worker's start

        check_both_classes(y)
        raw = self.summary(x)
        defined = ~raw.isnan()
        n = defined.sum(0).clamp(min=1)
        mean = torch.nan_to_num(raw).sum(0) / n
        deviation = (torch.where(defined, raw - mean, torch.zeros_like(raw)) ** 2).sum(0) / n
        self.mean = mean
        self.scale = torch.where(deviation > 0, deviation.sqrt(), torch.ones_like(deviation))
        regression = LogisticRegression(C=1 / self.l2, max_iter=1000).fit(self.inputs(x).numpy(), y)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(regression.coef_))
            self.head.bias.copy_(torch.from_numpy(regression.intercept_))


class Ratio(nn.Module):
    """Selects one series: x -> [B, 2], its last value (NaN if there is none) and whether there is one."""

    def __init__(self, at: int, features: int) -> None:
        super().__init__()
        self.at, self.features = at, features

    def forward(self, x: Tensor) -> Tensor:
        ever = x[..., self.features + self.at].sum(1) > 0
        last = x[:, -1, self.at].double()
        return torch.stack([torch.where(ever, last, torch.full_like(last, torch.nan)), ever.double()], 1)


class Boosting(Fitted):
    """Histogram gradient boosting (scikit-learn) on summaries; each split sends missing values to a learned side.

    The trees are stored as tables [trees, nodes] in which a leaf is its own child, so that all rows traverse all trees
    in lockstep.
    """

    feature: Tensor
    left: Tensor
    right: Tensor
    threshold: Tensor
    value: Tensor
    missing_left: Tensor
    baseline: Tensor

    def __init__(self, summary: nn.Module, config: BoostingModel, outputs: int = 1) -> None:
        super().__init__()
        self.summary = summary
        self.config = config
        shape = (config.trees * outputs, 2 * config.leaves - 1)
        integers = torch.zeros(shape, dtype=torch.int64)
        floats = torch.zeros(shape, dtype=torch.float64)
        for name, table in (
            ("feature", integers),
            ("left", integers),
            ("right", integers),
            ("threshold", floats),
            ("value", floats),
        ):
            self.register_buffer(name, table.clone())
        self.register_buffer("missing_left", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("baseline", torch.zeros(outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.baseline + self.leaf_values(self.summary(x)).sum(1, keepdim=True)
        return out.to(x.dtype)

    def leaf_values(self, rows: Tensor) -> Tensor:
        """Return the value of the leaf that each row [B, D] reaches in each tree, [B, trees]."""
        tree = torch.arange(len(self.feature))[None]
        node = torch.zeros(len(rows), len(self.feature), dtype=torch.int64)
        for _ in range(self.config.leaves - 1):  # no tree is deeper
            seen = rows.gather(1, self.feature[tree, node])
            left = torch.where(seen.isnan(), self.missing_left[tree, node], seen <= self.threshold[tree, node])
            node = torch.where(left, self.left[tree, node], self.right[tree, node])
        return self.value[tree, node]

    def fit(self, x: Tensor, y: np.ndarray) -> None:
        """Grow the trees and write them into the tables."""
        check_both_classes(y)
        model = self.grow(self.summary(x).numpy(), y)
        self.baseline.copy_(torch.from_numpy(np.asarray(model._baseline_prediction).reshape(1)))
        for k, (tree,) in enumerate(model._predictors):
            self.write_tree(k, tree)

    def grow(self, rows: np.ndarray, y: np.ndarray) -> Any:
        """Return scikit-learn's model, fitted to rows [N, D] and classes y [N]."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(
            learning_rate=self.config.learning_rate,
            max_iter=self.config.trees,
            max_leaf_nodes=self.config.leaves,
            l2_regularization=self.config.l2,
            max_features=self.config.feature_fraction,
            early_stopping=False,
            random_state=0,
        ).fit(rows, y)

    def write_tree(self, k: int, tree: Any) -> None:
        """Write scikit-learn's tree into row `k` of the tables."""
        nodes = tree.nodes
        n = len(nodes)
        leaf, own = nodes["is_leaf"].astype(bool), np.arange(n)
        for table, column in (
            (self.feature, np.where(leaf, 0, nodes["feature_idx"])),
            (self.left, np.where(leaf, own, nodes["left"])),
            (self.right, np.where(leaf, own, nodes["right"])),
            (self.threshold, nodes["num_threshold"]),
            (self.value, np.where(leaf, nodes["value"], 0)),
            (self.missing_left, nodes["missing_go_to_left"]),
        ):
            table[k, :n] = torch.from_numpy(np.ascontiguousarray(column)).to(table.dtype)


def check_both_classes(y: np.ndarray) -> None:
    """Raise DataError unless y has both classes."""
    if len(np.unique(y)) < 2:
        raise DataError(
            f"train has only one class: {int(y.sum())} of {len(y)} rows are positive",
            "a model cannot learn from a single class",
            "use more data, or another cohort, --landmark or --horizon",
        )


def logistic(config: LinearModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    f = len(spec["features"])
    return Logistic(Summary(f), PER_SERIES * f + len(spec["static"]), config)


def boosting(config: BoostingModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Boosting(Summary(len(spec["features"])), config)


def last_pf(config: LinearModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    return _last("pf", config, spec)


def last_sf(config: LinearModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    return _last("sf", config, spec)


def _last(name: str, config: LinearModel, spec: dict[str, Any]) -> nn.Module:
    if name not in spec["features"]:
        raise DataError(
            f"the data has no {name}", "no oxygen measurement has an FiO2 close to it", "choose another model.name"
        )
    return Logistic(Ratio(spec["features"].index(name), len(spec["features"])), 2, config)
