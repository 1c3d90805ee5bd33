"""Score a model bundle on the data of this site; what comes out are aggregates that may leave it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.common import icu_evaluation, scores
from jobs.common.console import say
from jobs.concepts import coverage
from raylab.data.icu.contributors import count_contributors
from raylab.data.icu.dataset import IcuSamples
from raylab.data.icu.meta import IcuMeta
from raylab.data.prepared import read_meta
from raylab.errors import DataError, UsageError
from raylab.evaluation.site_report import LIMIT, SiteReport, check_report, tell_count
from raylab.score import Score
from raylab.tasks.evaluation import Evaluation
from raylab.training import bundle as bundles
from raylab.training.run import read_model


def evaluate_bundle(
    file: Path, data: Path, split: str, recalibrate: int | None, signer: str | None, quiet: bool
) -> SiteReport:
    """Score the bundle `file` on a split of `data`, in this process.

    Raises DataError if the bundle is damaged, forged or not from `signer`, or if the data does not fit the model or has
    too few patients, and UsageError for too few patients to recalibrate on.
    """
    if recalibrate is not None and recalibrate < LIMIT:
        raise UsageError(f"--recalibrate {recalibrate}: a fit on fewer than {LIMIT} patients may not leave the site")
    bundle, sha256, named, contents = bundles.read_bundle(file, signer)
    if not quiet:
        say(f"{file.name}: {bundle.name}, task {bundle.task}, signed by {named}")
        if signer is None:
            say("  nobody has changed it since it was signed; to know by whom, give --signer KEY")
    with tempfile.TemporaryDirectory(prefix="raylab-bundle-") as scratch:
        directory = Path(scratch) / "bundle"
        bundles.extract_model(contents, directory)
        report = score_model(directory, bundle, sha256, data, split, recalibrate)
    if not quiet:
        tell(report)
    return report


def score_model(
    directory: Path, bundle: bundles.Bundle, sha256: str, data: Path, split: str, recalibrate: int | None
) -> SiteReport:
    """Score the model in `directory`, that of the bundle with this hash; see `evaluate_bundle`."""
    job, recipe, spec, network = read_model(directory)
    if job.name != bundle.task or job.kind != "icu":
        raise DataError(f"the model of {bundle.name} is of task '{job.name}', the bundle says '{bundle.task}'")
    if bundle.concepts != (*spec["features"], *spec["static"]):
        raise DataError(f"the model of {bundle.name} has other inputs than the bundle says")
    meta = read_meta(data, job.name, IcuMeta)
    samples = job.load(data, split, recipe.data, spec)
    assert isinstance(samples, IcuSamples)
    p = scores.probabilities(job, recipe, samples, network)
    scored = Evaluation(
        task=job,
        samples=samples,
        p=p,
        split=split,
        meta=meta,
        parameters=0,
        bootstraps=scores.BOOTSTRAPS,
        scores=job.outcome.scores(samples, p, scores.BOOTSTRAPS, recipe.seed),
    )
    positives = int(samples.y.sum())
    fewest = min(scored.patients, positives, scored.n - positives)
    if fewest < LIMIT:
        raise DataError(
            f"split '{split}' of {data} has too few rows for scores that may leave the site",
            f"{scored.patients} patients, {positives} positive and {scored.n - positives} negative rows, not {LIMIT}",
            "--split all, or more data",
        )
    again = None
    if recalibrate is not None:
        own = split == "val"
        fitted = icu_evaluation.compare_recalibration(directory, data, scored, recalibrate, own, recipe.seed)
        again = {
            "patients": tell_count(recalibrate),
            **fitted["fit"],
            **{when: intervals(fitted[when]) for when in ("before", "after")},
        }
    content = {
        "format": 1,
        "bundle": sha256,
        "task": job.name,
        "synthetic": meta.synthetic,
        "split": split,
        "rows": tell_count(scored.n),
        "patients": tell_count(scored.patients),
        "positives": tell_count(positives),
        "scores": intervals(scored.scores),
        "coverage": describe_coverage(data, meta, bundle),
        "shift": describe_shift(meta, count_contributors(data), spec),
        "recalibration": again,
    }
    return check_report(content, bundle.concepts, bundle.task, sha256)


def intervals(of: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    """Scores without the words and counts that are with them."""
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in of.items()}


def describe_coverage(data: Path, meta: IcuMeta, bundle: bundles.Bundle) -> dict[str, float | None]:
    """For every concept of the bundle, the fraction of rows with a value before the prediction time."""
    rows = sum(of["n"] for of in meta.counts.values())
    found = {name: of["rows"] for name, of in coverage(data).items() if name in bundle.concepts}
    return {name: share if share == 0 or share * rows >= LIMIT else None for name, share in found.items()}


def describe_shift(meta: IcuMeta, patients: Mapping[str, int], spec: dict[str, Any]) -> dict[str, float | None]:
    """For every input, how many standard deviations of the training data the mean here is off; none for a mean over
    fewer than LIMIT patients, by their number for each."""
    names = [*spec["features"], *spec["static"]]
    means, stds = [*spec["mean"], *spec["static_mean"]], [*spec["std"], *spec["static_std"]]
    found: dict[str, float | None] = {}
    for name, mean, std in zip(names, means, stds, strict=True):
        here = meta.statistics.get(name, {}).get("mean")
        is_known = here is not None and mean is not None and patients.get(name, LIMIT) >= LIMIT
        found[name] = (here - mean) / std if is_known else None
    return found


def tell(report: SiteReport) -> None:
    """Print a report."""
    words = ", SYNTHETIC data" if report.synthetic else ""
    say(f"{report.split} split: {report.rows} rows of {report.patients} patients, {report.positives} positive{words}")
    for name, one in report.scores.items():
        say(f"  {name:<32} {Score(value=one.value, low=one.low, high=one.high)}")
    shifted = {name: value for name, value in report.shift.items() if value is not None}
    for name, value in sorted(shifted.items(), key=lambda pair: -abs(pair[1]))[:5]:
        say(f"  shift of {name:<23} {value:+.2f} standard deviations")
    absent = [name for name, share in report.coverage.items() if share == 0]
    if absent:
        say(f"  never measured here: {', '.join(absent)}")
    if (again := report.recalibration) is not None:
        say(f"  recalibrated on {again.patients} patients: intercept {again.intercept:.3f}, slope {again.slope:.3f}")
