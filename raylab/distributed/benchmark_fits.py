"""Independent fits of a benchmark, each one chunk of `ray_map`: trials of a nested search, and the winners' final fits.

A chunk's argument is a plain `Fit`. Its file is JSON or parquet, written whole; beside it lies the run's directory.
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
from raylab.evaluation.clinical import recalibrated
from raylab.evaluation.leakage import probabilities
from raylab.evaluation.metrics import LOGIT_CLIP
from raylab.files import atomic_write, write_json
from raylab.tasks.recipes import parse_recipe
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.run import execute, read_model


@dataclass(frozen=True)
class Fit:
    """A recipe (as JSON) on a prepared directory. `split`: of which rows the final fit writes probabilities."""

    recipe: dict[str, Any]
    data: str
    split: str = "val"

    @property
    def key(self) -> str:
        """Eight letters that stand in its file's name: what was fitted with other settings is not taken for it."""
        return hashlib.sha256(json.dumps([self.recipe, self.split], sort_keys=True).encode()).hexdigest()[:8]


def candidates(recipe: Recipe, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` settings to try: the recipe's own points, then random draws from its space."""
    rng = random.Random(seed)
    found = [dict(point) for point in recipe.search.points]
    while len(found) < count:
        found.append({path: draw(rng, *parse_dimension(path, text)) for path, text in recipe.search.space.items()})
    return found[:count]


def draw(rng: random.Random, kind: str, values: list[Any]) -> Any:
    """One value of a dimension as `parse_dimension` gives it."""
    if kind == "choice":
        return rng.choice(values)
    low, high = values
    if kind == "randint":
        return rng.randint(low, high)
    if kind == "loguniform":
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return rng.uniform(low, high)


def trial(fit: Fit, path: Path) -> None:
    """Train and write the validation scores of the best epoch, and the loss by which a search chooses."""
    best, samples, p = fitted(fit, path)
    write_json(path, {"recipe": fit.recipe, "best": best, "refined_loss": refined_loss(samples.y, p)})


def refined_loss(y: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    """Log loss in nats after intercept and slope of logit(p) were fitted on these rows: what a model tells apart,
    whether it is calibrated or not, with less noise than the AUROC. `p` falling with `y` is worth no more than the
    prevalence; where nothing can be fitted it is the plain loss. The refinement of Murphy 1973 (J Appl Meteor 12:595),
    with the log instead of the Brier score."""
    try:
        q, fitted_line = recalibrated(p, y, p)
    except DataError:
        q = np.clip(p, LOGIT_CLIP, 1 - LOGIT_CLIP)
    else:
        if fitted_line["slope"] <= 0:
            q = np.full(len(y), y.mean())
    return float(-np.where(y == 1, np.log(q), np.log1p(-q)).mean())


def final(fit: Fit, path: Path) -> None:
    """Train and write stay_id, at_h and p of the rows of `fit.split`."""
    _, samples, p = fitted(fit, path)
    rows = samples.rows.select("stay_id", "at_h")  # type: ignore[attr-defined]  # of IcuSamples
    with atomic_write(path) as beside:
        rows.with_columns(p=pl.Series(p)).write_parquet(beside)


def fitted(fit: Fit, path: Path) -> tuple[dict[str, Any], Samples, NDArray[np.float64]]:
    """Train in the directory beside `path`: the best epoch's scores on val, the rows of `fit.split`, and the kept
    model's probabilities [N] of them."""
    directory = fresh(path)
    result = execute(parse_recipe(fit.recipe), Path(fit.data), directory, quiet)
    job, recipe, spec, network = read_model(directory)
    samples = job.load(Path(fit.data), fit.split, recipe.data, spec)
    return result["best"], samples, predict(job, network, samples, ProcessGroup(), recipe, "cpu")


def leaks(fit: Fit, path: Path) -> None:
    """Write stay_id, at_h and a column of p for each view of the leakage report, of the rows of `fit.split`."""
    data = parse_recipe(fit.recipe).data
    assert isinstance(data, IcuData)  # the benchmark's recipes are of no other task
    train, scored = (load_icu(Path(fit.data), split, data.cohort) for split in ("train", fit.split))
    columns = [pl.Series(name, p) for name, p in probabilities(train, scored).items()]
    with atomic_write(path) as beside:
        scored.rows.select("stay_id", "at_h").with_columns(columns).write_parquet(beside)


def fresh(path: Path) -> Path:
    """The run directory beside a chunk's file; what a killed fit left in it is gone on with."""
    directory = path.with_suffix("")
    directory.mkdir(exist_ok=True)
    return directory


def quiet(rows: list[dict[str, Any]]) -> int:
    """The `send` of a fit that nobody watches."""
    return int(rows[-1]["step"]) if rows else 0
