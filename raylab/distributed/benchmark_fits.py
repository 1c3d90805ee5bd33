"""Independent fits of a benchmark, each a chunk of `run_chunks`: trials of a nested search, and final fits of the best.

The argument of a chunk is a plain `Fit`. Its file, JSON or parquet, is written atomically, next to its run directory.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.config.recipe import IcuData, Recipe
from raylab.config.search_space import parse_dimension
from raylab.data.icu.dataset import load_icu
from raylab.data.samples import Samples
from raylab.errors import DataError
from raylab.evaluation.clinical import recalibrate
from raylab.evaluation.leakage import probabilities
from raylab.evaluation.metrics import LOGIT_CLIP
from raylab.files import atomic_write, write_json
from raylab.tasks.plugins import code_of, load_all
from raylab.tasks.recipes import parse_recipe
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.run import execute, load_samples, read_model


@dataclass(frozen=True)
class Fit:
    """A recipe (as JSON), the code that it needs, and a prepared directory. The final fit writes probabilities for the
    rows of `split`."""

    recipe: dict[str, Any]
    data: str
    split: str = "val"
    plugins: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, data: Path, split: str = "val") -> "Fit":
        return cls(recipe.model_dump(mode="json"), str(data), split, tuple(code_of(recipe)))

    @property
    def key(self) -> str:
        """Eight hex digits for the file name, so that a fit with other settings is not mistaken for this one."""
        what = [self.recipe, self.split, *self.plugins]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def candidates(recipe: Recipe, count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` settings to try: the recipe's own points, then random draws from its space."""
    rng = random.Random(seed)
    points = [dict(point) for point in recipe.search.points]
    while len(points) < count:
        points.append({path: draw(rng, *parse_dimension(path, text)) for path, text in recipe.search.space.items()})
    return points[:count]


def draw(rng: random.Random, kind: str, values: list[Any]) -> Any:
    """Draw one value of a search dimension, given as `parse_dimension` returns it."""
    if kind == "choice":
        return rng.choice(values)
    low, high = values
    if kind == "randint":
        return rng.randint(low, high)
    if kind == "loguniform":
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return rng.uniform(low, high)


def trial(fit: Fit, path: Path) -> None:
    """Train, then write the best epoch's validation scores and the loss that the search minimises."""
    best, samples, p = run_fit(fit, path)
    write_json(path, {"recipe": fit.recipe, "best": best, "refined_loss": refined_loss(samples.y, p)})


def refined_loss(y: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    """Return the log loss (nats) after refitting intercept and slope of logit(p) on these rows.

    It measures discrimination regardless of calibration, with less noise than the AUROC. If `p` falls with `y`, the
    loss is that of predicting the prevalence; if the fit does not exist, it is the plain log loss. This is the
    refinement of Murphy 1973 (J Appl Meteor 12:595), with the log score instead of the Brier score.
    """
    try:
        q, line = recalibrate(p, y, p)
    except DataError:
        q = np.clip(p, LOGIT_CLIP, 1 - LOGIT_CLIP)
    else:
        if line["slope"] <= 0:
            q = np.full(len(y), y.mean())
    return float(-np.where(y == 1, np.log(q), np.log1p(-q)).mean())


def final(fit: Fit, path: Path) -> None:
    """Train, then write stay_id, at_h and p of the rows of `fit.split`."""
    _, samples, p = run_fit(fit, path)
    rows = samples.rows.select("stay_id", "at_h")  # type: ignore[attr-defined]  # of IcuSamples
    with atomic_write(path) as beside:
        rows.with_columns(p=pl.Series(p)).write_parquet(beside)


def run_fit(fit: Fit, path: Path) -> tuple[dict[str, Any], Samples, NDArray[np.float64]]:
    """Train in the directory next to `path`; return the best epoch's scores on val, the rows of `fit.split`, and the
    best model's probabilities [N] for them."""
    directory = create_run_directory(path)
    load_all(fit.plugins)
    recipe = parse_recipe(fit.recipe)
    result = execute(recipe, *load_samples(recipe, Path(fit.data)), directory, ignore_rows)
    job, recipe, spec, network = read_model(directory)
    samples = job.load(Path(fit.data), fit.split, recipe.data, spec)
    return result["best"], samples, predict(job, network, samples, ProcessGroup(), recipe, "cpu")


def leaks(fit: Fit, path: Path) -> None:
    """Write stay_id, at_h and one column of probabilities per leakage view, for the rows of `fit.split`."""
    load_all(fit.plugins)
    data = parse_recipe(fit.recipe).data
    assert isinstance(data, IcuData)  # the benchmark has ICU recipes only
    train, scored = (load_icu(Path(fit.data), split, data.cohort) for split in ("train", fit.split))
    columns = [pl.Series(name, p) for name, p in probabilities(train, scored).items()]
    with atomic_write(path) as beside:
        scored.rows.select("stay_id", "at_h").with_columns(columns).write_parquet(beside)


def create_run_directory(path: Path) -> Path:
    """Return the run directory next to a chunk's file; a killed fit resumes from what it left there."""
    directory = path.with_suffix("")
    directory.mkdir(exist_ok=True)
    return directory


def ignore_rows(rows: list[dict[str, Any]]) -> int:
    """Discard the rows: the `send` of a fit whose metrics are not logged."""
    return int(rows[-1]["step"]) if rows else 0
