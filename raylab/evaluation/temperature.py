"""Temperature scaling: one parameter that calibrates a classifier's confidence without changing its predictions.

Guo et al., "On calibration of modern neural networks", arXiv 1706.04599, section 4.2. It is fitted on validation rows.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylab.errors import DataError

Floats = NDArray[np.float64]

LEAST, MOST = 0.05, 20.0  # range of temperatures searched
FLOOR = 1e-12  # probabilities below this have no useful logarithm


def fit(y: ArrayLike, p: ArrayLike) -> float:
    """Return the temperature T > 0 that minimises the log loss of y int [N] under p float [N, K]; above 1 if p is
    overconfident."""
    from scipy.optimize import minimize_scalar
    from scipy.special import softmax

    truth, logits = np.asarray(y), _logits(p)
    if len(truth) != len(logits) or len(truth) == 0:
        raise DataError(f"{len(truth)} labels for {len(logits)} rows of probabilities", "they describe the same rows")

    def loss(log_t: float) -> float:
        scaled = softmax(logits / np.exp(log_t), axis=1)
        return float(-np.log(np.maximum(scaled[np.arange(len(truth)), truth], FLOOR)).mean())

    optimum = minimize_scalar(loss, bounds=(np.log(LEAST), np.log(MOST)), method="bounded")
    return float(np.exp(optimum.x))


def scaled(p: ArrayLike, temperature: float) -> Floats:
    """Return probabilities [N, K] at `temperature`, softmax(log p / T); T = 1 leaves them unchanged."""
    from scipy.special import softmax

    probabilities: Floats = softmax(_logits(p) / temperature, axis=1)
    return probabilities


def _logits(p: ArrayLike) -> Floats:
    # The log of a softmax equals its logits up to a constant per row, which softmax ignores.
    logits: Floats = np.log(np.maximum(np.asarray(p, dtype=np.float64), FLOOR))
    return logits
