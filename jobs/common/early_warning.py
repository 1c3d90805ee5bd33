"""The early-warning view: which stays of a split get a page, and at which risk the pages show an alarm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from jobs.common import individuals, provenance, scores
from jobs.common.icu_evaluation import rolling
from jobs.common.stay_pages import Ward, risk_top, write_index, write_page
from raylab.config.recipe import Recipe
from raylab.data.icu.dataset import IcuSamples
from raylab.data.icu.meta import IcuMeta
from raylab.errors import UsageError
from raylab.evaluation import alarms
from raylab.evaluation.intervals import proportion
from raylab.evaluation.stay_course import courses, rows_to_explain
from raylab.files import write_text
from raylab.tasks import find_task
from raylab.tasks.base import Task

EVERY = 1 << 62  # stays: of all
RECALL = 0.8  # of onsets by the usual threshold


def check_pages(data: Path, task: str, pages: int | None, threshold: float | None, share: bool) -> None:
    """Raise UsageError if `pages` (None: none) were requested that cannot or must not be written."""
    if pages is None:
        if threshold is not None:
            raise UsageError("--threshold is for the pages of stays", do="add --pages")
        return
    meta = find_task(task).read_meta(data)
    assert isinstance(meta, IcuMeta)
    if meta.framing != "rolling":
        raise UsageError(
            "--pages requires rolling predictions",
            f"{data} has one prediction per stay, at {meta.landmark_h:g} h",
            f"raylab prepare {task} --rolling ..., and train on that",
        )
    if not meta.synthetic and not share:
        raise UsageError(
            "--pages shows single patients, and this data is of real ones",
            "the pages hold their measurements, hour by hour",
            "add --share-individuals if those who will see the pages may; the files are readable only by you",
        )
    if pages < 1:
        raise UsageError(f"--pages {pages}: there is no such number of stays", do="give a number from 1")
    if threshold is not None and not 0 < threshold < 1:
        raise UsageError(f"--threshold {threshold:g} is not a probability", do="give a number between 0 and 1")


@dataclass(frozen=True)
class Predicted:
    """A run's predictions p [N] of the rows of a split."""

    directory: Path
    data: Path
    split: str
    task: Task
    recipe: Recipe
    samples: IcuSamples
    network: Any
    p: NDArray[np.float64]


def write_pages(of: Predicted, threshold: float | None, pages: int, stay: str | None) -> Path:
    """Write one page per stay and their index into individuals/stays of the run, and return the path of the index.

    Of `stay` alone, or of `pages` stays drawn at random (EVERY: all). Alarms are predictions of at least `threshold`;
    None chooses it on the val split. Earlier pages there are removed. stays.csv says which page is of which stay. The
    pages are for their owner alone and never go to MLflow.
    """
    from raylab.evaluation.attributions import attributions, by_feature  # loads captum

    samples, p = of.samples, of.p
    rows = rolling(samples, p)
    how = "given on the command line"
    if threshold is None:
        threshold, how = choose_threshold(of, rows)
    stays = samples.rows["stay_id"].unique(maintain_order=True).to_list()
    if stay is not None:
        stays = [stay]
    elif pages < len(stays):
        chosen = np.random.default_rng(of.recipe.seed).permutation(len(stays))[:pages]
        stays = [stays[k] for k in sorted(chosen)]
    alarm, counts = alarms.raise_alarms(rows, threshold), alarms.counts(rows, threshold)
    ward = Ward(
        run=of.directory.name,
        model=of.recipe.model.name,
        data=of.data.name,
        split=of.split,
        meta=samples.meta,
        threshold=threshold,
        threshold_is=how,
        recall=proportion(counts["recalled"], counts["event"], rows.group, "no onset"),
        precision=proportion(counts["true"], counts["alarms"], rows.group, "no alarm"),
        stays=len(stays),
        top=risk_top(max(float(p.max()), threshold)),
        origin=(provenance.describe(of.directory),),
    )
    explained = rows_to_explain(samples, p, alarm, stays)
    gradients = attributions(of.network, samples.batch(explained), len(samples.spec["features"]))
    moved = by_feature(gradients, samples.spec)[1].sum(2)
    hours = pl.read_parquet(of.data / "hours.parquet").filter(pl.col("stay_id").is_in(stays))
    folder = individuals.folder(of.directory) / "stays"
    folder.mkdir(mode=0o700, exist_ok=True)
    for old in folder.glob("*.html"):
        old.unlink()
    found = courses(
        samples, p, alarm, alarms.is_ahead(rows), stays, hours, dict(zip(explained.tolist(), moved, strict=True))
    )
    digits = len(str(len(stays)))
    lines = [
        write_page(folder / f"stay-{number:0{digits}d}.html", course, number, ward)
        for number, course in enumerate(found, 1)
    ]
    write_index(folder / "index.html", lines, ward)
    write_text(
        folder / "stays.csv", pl.DataFrame({"page": [line["page"] for line in lines], "stay_id": stays}).write_csv()
    )
    return folder / "index.html"


def choose_threshold(of: Predicted, rows: alarms.Rolling) -> tuple[float, str]:
    """Return the highest threshold that recalls RECALL of the onsets of the val split, and this in words. `rows` are
    those of the split of `of`."""
    if of.split != "val":
        samples = of.task.load(of.data, "val", of.recipe.data, of.samples.spec)
        assert isinstance(samples, IcuSamples)
        rows = rolling(samples, scores.probabilities(of.task, of.recipe, samples, of.network))
    found = alarms.find_threshold(alarms.try_thresholds(rows), RECALL)
    if found is None:
        why = "no threshold recalls enough onsets of the val split, which may have none"
        raise UsageError("no threshold of alarms can be chosen", why, "give one with --threshold")
    return found[0], f"the highest that recalls {RECALL:.0%} of the onsets of the val split"
