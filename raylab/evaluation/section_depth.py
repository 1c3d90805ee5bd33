"""Errors of the predicted depth of patches and of whole sections, in sections, with intervals over sections."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from raylab.evaluation.intervals import Floats, WeightedScores, clustered, clustered_difference
from raylab.score import Score

WHY: Mapping[str, str] = {"r2": "all patches have the same depth"}


def depth_scores(
    y: Floats, p: Floats, section: NDArray[np.int64], bootstraps: int = 1000, seed: int = 0, unit: str = "section"
) -> dict[str, Score]:
    """Return the scores of predictions p [N] of the depth y [N] of patches, both in sections, with 95% intervals over
    sections [N].

    section_error   mean over sections of |mean prediction of the section's patches - depth|
    patch_error     mean over patches of |prediction - depth|
    r2              of patches: 1 - squared error / variance of the depth
    """
    return clustered(_weigh(y, p, section), section, bootstraps, seed, WHY, {}, unit)


def depth_differences(
    y: Floats,
    p: Floats,
    reference: Floats,
    section: NDArray[np.int64],
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "section",
) -> dict[str, Score]:
    """Return the scores of p minus those of `reference` on the same patches, over shared resamples of sections."""
    of_p, of_reference = _weigh(y, p, section), _weigh(y, reference, section)
    return clustered_difference(of_p, of_reference, section, bootstraps, seed, WHY, {}, unit)


def section_means(values: Floats, section: NDArray[np.int64]) -> Floats:
    """Return the mean of values [N] of each section, in the order of their numbers."""
    _, index = np.unique(section, return_inverse=True)
    means: Floats = np.bincount(index, values) / np.bincount(index)
    return means


def _weigh(y: Floats, p: Floats, section: NDArray[np.int64]) -> WeightedScores:
    _, first = np.unique(section, return_index=True)
    section_error_G = np.abs(section_means(p - y, section))

    def scores(w: Floats) -> dict[str, Floats]:
        total, of_sections = w.sum(axis=1), w[:, first]  # a section is drawn with all of its patches
        mean = w @ y / total
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = w @ np.square(y) / total - np.square(mean)
            r2 = np.where(variance > 1e-12, 1 - w @ np.square(p - y) / total / variance, np.nan)
        return {
            "section_error": of_sections @ section_error_G / of_sections.sum(axis=1),
            "patch_error": w @ np.abs(p - y) / total,
            "r2": r2,
        }

    return scores
