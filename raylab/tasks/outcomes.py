"""Types of outcome: what a task predicts decides its loss, its probabilities, its scores and its columns.

Arrays: logits [B, outputs], or [B, members, outputs] of an ensemble; y int64 [B] (class indices), of a regression
float32 [B, outputs], of multi-labels float32 [B, outputs] of 0 and 1; p float64 [N] of a binary outcome (the positive
class), else [N, outputs].
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raylab.evaluation import metrics, multilabel
from raylab.evaluation.intervals import clustered, proportion
from raylab.score import Score

if TYPE_CHECKING:  # as in base.py
    from torch import Tensor

    from raylab.data.samples import Samples

EPSILON = 1e-7  # probabilities are kept this far from 0 and 1 in a log loss


@dataclass(frozen=True)
class PairedRows:
    """What two models predict for the same rows: y, p and `reference` as `Outcome.kept` returns them, the patients
    group [N], or what `unit` says, and the classes."""

    y: NDArray[Any]
    p: NDArray[Any]
    reference: NDArray[Any]
    group: NDArray[Any]
    classes: list[str]
    unit: str = "patient"


class Outcome(ABC):
    """One type of outcome. A new one implements these methods; figures of its scores are in jobs/common/figures.py."""

    def count(self, spec: dict[str, Any]) -> int:
        """Outputs of the network."""
        return len(spec["classes"])

    def loss(self, logits: "Tensor", y: "Tensor", class_weight: "Tensor | None") -> "Tensor":
        """Loss of each sample, [B]; of an ensemble, the mean of its members' losses."""
        import torch

        if logits.ndim == 3:
            return torch.stack([self.loss(member, y, class_weight) for member in logits.unbind(1)]).mean(0)
        return self.sample_loss(logits, y, class_weight)

    @abstractmethod
    def sample_loss(self, logits: "Tensor", y: "Tensor", class_weight: "Tensor | None") -> "Tensor":
        """Loss [B] of one network's logits [B, outputs]."""

    def probabilities(self, logits: "Tensor") -> "Tensor":
        """[B, outputs] in the logits' type; of an ensemble, the mean over its members."""
        p = self.activate(logits)
        return p.mean(1) if logits.ndim == 3 else p

    @abstractmethod
    def activate(self, logits: "Tensor") -> "Tensor":
        """Logits as probabilities, or as the values of a regression; same shape."""

    @abstractmethod
    def log_loss(self, y: NDArray[Any], p: NDArray[Any]) -> float:
        """Mean negative log likelihood of y under p; of a regression, the mean squared error."""

    @abstractmethod
    def point_scores(self, y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
        """Scores without intervals, for validation during training."""

    @abstractmethod
    def scores(
        self, samples: "Samples", p: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
    ) -> dict[str, Score]:
        """Every score with its 95% interval, clustered by patient, or what `unit` says that `samples.group` is."""

    @abstractmethod
    def differences(self, rows: PairedRows, bootstraps: int) -> dict[str, Score]:
        """Every score of p minus that of `reference`, with its 95% interval over shared resamples of patients."""

    def kept(self, samples: "Samples", p: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(y, p) as they are kept for later comparisons: in the units of the scores."""
        return samples.y, p

    def tables(self, samples: "Samples", p: NDArray[Any]) -> dict[str, Any]:
        """Counts beside the scores, by name."""
        return {}

    def class_counts(self, samples: "Samples") -> dict[str, int]:
        """Rows of each class; none of a regression."""
        return {name: int((samples.y == k).sum()) for k, name in enumerate(samples.spec["classes"])}

    def truth_columns(self, samples: "Samples") -> dict[str, Any]:
        """Columns of the truth in a table of predictions, by name."""
        return {"label": samples.y}

    @abstractmethod
    def prediction_columns(self, spec: dict[str, Any], p: NDArray[Any]) -> dict[str, Any]:
        """Columns of the prediction in a table of predictions, by name."""


class Binary(Outcome):
    """Something happens or does not: one logit."""

    def count(self, spec: dict[str, Any]) -> int:
        return 1

    def sample_loss(self, logits: "Tensor", y: "Tensor", class_weight: "Tensor | None") -> "Tensor":
        from torch.nn import functional as F

        each = F.binary_cross_entropy_with_logits(logits[:, 0], y.to(logits.dtype), reduction="none")
        return each if class_weight is None else each * class_weight[y]

    def activate(self, logits: "Tensor") -> "Tensor":
        return logits.sigmoid()

    def log_loss(self, y: NDArray[Any], p: NDArray[Any]) -> float:
        return _log_loss(np.where(y == 1, p, 1 - p))

    def point_scores(self, y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
        return metrics.binary_point(y, p)

    def scores(
        self, samples: "Samples", p: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
    ) -> dict[str, Score]:
        return metrics.binary_scores(samples.y, p, samples.group, bootstraps, seed, unit)

    def prediction_columns(self, spec: dict[str, Any], p: NDArray[Any]) -> dict[str, Any]:
        return {f"p_{spec['classes'][1]}": p}

    def differences(self, rows: PairedRows, bootstraps: int) -> dict[str, Score]:
        return metrics.binary_differences(rows.y, rows.p, rows.reference, rows.group, bootstraps, unit=rows.unit)


class Multiclass(Outcome):
    """One of several classes."""

    def sample_loss(self, logits: "Tensor", y: "Tensor", class_weight: "Tensor | None") -> "Tensor":
        from torch.nn import functional as F

        each = F.cross_entropy(logits, y, reduction="none")
        return each if class_weight is None else each * class_weight[y]

    def activate(self, logits: "Tensor") -> "Tensor":
        return logits.softmax(-1)

    def log_loss(self, y: NDArray[Any], p: NDArray[Any]) -> float:
        return _log_loss(p[np.arange(len(y)), y])

    def point_scores(self, y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
        return metrics.multiclass_point(y, p)

    def scores(
        self, samples: "Samples", p: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
    ) -> dict[str, Score]:
        classes = samples.spec["classes"]
        return metrics.multiclass_scores(samples.y, p, samples.group, classes, bootstraps, seed, unit)

    def differences(self, rows: PairedRows, bootstraps: int) -> dict[str, Score]:
        both = rows.p, rows.reference
        return metrics.multiclass_differences(rows.y, *both, rows.group, rows.classes, bootstraps, unit=rows.unit)

    def tables(self, samples: "Samples", p: NDArray[Any]) -> dict[str, Any]:
        by_source = metrics.confusion_by(samples.source, samples.y, p)
        return {"confusion": metrics.confusion(samples.y, p), "confusion_by_source": by_source}

    def prediction_columns(self, spec: dict[str, Any], p: NDArray[Any]) -> dict[str, Any]:
        return {f"p_{name}": p[:, k] for k, name in enumerate(spec["classes"])}


class MultiLabel(Outcome):
    """Any number of several classes: a logit of each."""

    def sample_loss(self, logits: "Tensor", y: "Tensor", class_weight: "Tensor | None") -> "Tensor":
        from torch.nn import functional as F

        each = F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none")
        return (each if class_weight is None else each * class_weight).mean(1)

    def activate(self, logits: "Tensor") -> "Tensor":
        return logits.sigmoid()

    def log_loss(self, y: NDArray[Any], p: NDArray[Any]) -> float:
        return _log_loss(np.where(y == 1, p, 1 - p))

    def point_scores(self, y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
        return multilabel.point(y, p)

    def scores(
        self, samples: "Samples", p: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
    ) -> dict[str, Score]:
        return multilabel.scores(samples.y, p, samples.group, samples.spec["classes"], bootstraps, seed, unit)

    def differences(self, rows: PairedRows, bootstraps: int) -> dict[str, Score]:
        return multilabel.differences(
            rows.y, rows.p, rows.reference, rows.group, rows.classes, bootstraps, unit=rows.unit
        )

    def tables(self, samples: "Samples", p: NDArray[Any]) -> dict[str, Any]:
        return {"labels": multilabel.counts(samples.y, p, samples.spec["classes"])}

    def class_counts(self, samples: "Samples") -> dict[str, int]:
        return {name: int(samples.y[:, k].sum()) for k, name in enumerate(samples.spec["classes"])}

    def truth_columns(self, samples: "Samples") -> dict[str, Any]:
        return {f"label_{name}": samples.y[:, k].astype(np.int64) for k, name in enumerate(samples.spec["classes"])}

    def prediction_columns(self, spec: dict[str, Any], p: NDArray[Any]) -> dict[str, Any]:
        return {f"p_{name}": p[:, k] for k, name in enumerate(spec["classes"])}


class Regression(Outcome):
    """Several numbers, standardised for the network and given back in their units."""

    def sample_loss(self, logits: "Tensor", y: "Tensor", class_weight: "Tensor | None") -> "Tensor":
        return (logits - y).square().mean(1)

    def activate(self, logits: "Tensor") -> "Tensor":
        return logits

    def log_loss(self, y: NDArray[Any], p: NDArray[Any]) -> float:
        return float(np.square(p - y).mean())

    def point_scores(self, y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
        return metrics.regression_point(y, p)

    def scores(
        self, samples: "Samples", p: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
    ) -> dict[str, Score]:
        from raylab.data.lung.sweep_dataset import outputs

        truth, values = outputs(samples.y, samples.spec), outputs(p, samples.spec)
        return metrics.regression_scores(truth, values, samples.group, samples.spec["classes"], bootstraps, seed, unit)

    def differences(self, rows: PairedRows, bootstraps: int) -> dict[str, Score]:
        both = rows.p, rows.reference
        return metrics.regression_differences(rows.y, *both, rows.group, rows.classes, bootstraps, unit=rows.unit)

    def kept(self, samples: "Samples", p: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        from raylab.data.lung.sweep_dataset import outputs

        return outputs(samples.y, samples.spec), outputs(p, samples.spec)

    def class_counts(self, samples: "Samples") -> dict[str, int]:
        return {}

    def truth_columns(self, samples: "Samples") -> dict[str, Any]:
        from raylab.data.lung.sweep_dataset import outputs

        truth = outputs(samples.y, samples.spec)
        return {name: truth[:, k] for k, name in enumerate(samples.spec["classes"])}

    def prediction_columns(self, spec: dict[str, Any], p: NDArray[Any]) -> dict[str, Any]:
        from raylab.data.lung.sweep_dataset import outputs

        values = outputs(p, spec)
        return {f"p_{name}": values[:, k] for k, name in enumerate(spec["classes"])}


class SectionDepth(Regression):
    """The depth of the section that a patch is from; errors are in sections."""

    def point_scores(self, y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
        found = metrics.regression_point(y, p.reshape(y.shape))
        return {"r2": found["r2_mean"]} if found else {}

    def log_loss(self, y: NDArray[Any], p: NDArray[Any]) -> float:
        return super().log_loss(y, p.reshape(y.shape))

    def scores(
        self, samples: "Samples", p: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
    ) -> dict[str, Score]:
        from raylab.evaluation.section_depth import depth_scores

        return depth_scores(*self.kept(samples, p), samples.group, bootstraps, seed, unit)

    def differences(self, rows: PairedRows, bootstraps: int) -> dict[str, Score]:
        from raylab.evaluation.section_depth import depth_differences

        return depth_differences(rows.y, rows.p, rows.reference, rows.group, bootstraps, unit=rows.unit)

    def kept(self, samples: "Samples", p: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        truth, values = super().kept(samples, p.reshape(-1, 1))
        per_section = samples.spec["depth_per_section"]
        return truth[:, 0] / per_section, values[:, 0] / per_section

    def truth_columns(self, samples: "Samples") -> dict[str, Any]:
        return {"section": samples.group, **super().truth_columns(samples)}

    def prediction_columns(self, spec: dict[str, Any], p: NDArray[Any]) -> dict[str, Any]:
        return super().prediction_columns(spec, p.reshape(-1, 1))


class Proximity(Outcome):
    """Which patch lies beside this one: embeddings of pairs, [B, 2 * EMBEDDING], learned without labels. y float32
    [N, 3] is the position of the first patch."""

    def count(self, spec: dict[str, Any]) -> int:
        from raylab.evaluation.proximity import EMBEDDING

        return 2 * EMBEDDING

    def sample_loss(self, logits: "Tensor", y: "Tensor", class_weight: "Tensor | None") -> "Tensor":
        from raylab.evaluation.proximity import contrastive_losses

        return contrastive_losses(logits, y)

    def activate(self, logits: "Tensor") -> "Tensor":
        from raylab.evaluation.proximity import normalise

        return normalise(logits)

    def log_loss(self, y: NDArray[Any], p: NDArray[Any]) -> float:
        from raylab.evaluation.proximity import compare_blocks

        return float(compare_blocks(p, y)[0].mean())

    def point_scores(self, y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
        return {"matching": float(self._hits(y, p).mean())}

    def scores(
        self, samples: "Samples", p: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
    ) -> dict[str, Score]:
        hits = self._hits(samples.y, p)
        return {"matching": proportion(hits, np.ones(len(hits)), samples.group, "no pairs", unit)}

    def differences(self, rows: PairedRows, bootstraps: int) -> dict[str, Score]:
        gain = self._hits(rows.y, rows.p).astype(float) - self._hits(rows.y, rows.reference)
        return clustered(lambda w: {"matching": w @ gain / w.sum(axis=1)}, rows.group, bootstraps, 0, {}, {}, rows.unit)

    def class_counts(self, samples: "Samples") -> dict[str, int]:
        return {}

    def truth_columns(self, samples: "Samples") -> dict[str, Any]:
        return {"section": samples.group}

    def prediction_columns(self, spec: dict[str, Any], p: NDArray[Any]) -> dict[str, Any]:
        """The embedding of the first patch of each pair."""
        return {f"embedding_{k}": p[:, k] for k in range(p.shape[1] // 2)}

    def _hits(self, y: NDArray[Any], p: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether the neighbour is the most similar of BLOCK patches, [N]."""
        from raylab.evaluation.proximity import compare_blocks

        return compare_blocks(p, y)[1]


def _log_loss(p_of_truth: NDArray[Any]) -> float:
    return float(-np.log(np.clip(p_of_truth, EPSILON, 1)).mean())
