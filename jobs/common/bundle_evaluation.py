"""Score a model bundle on the data of this site; what comes out are aggregates that may leave it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from jobs.common import icu_evaluation, scores
from jobs.common.console import say
from jobs.common.model_inputs import ModelInputs, inputs_of
from raylab.data.prepared import Meta
from raylab.errors import DataError, UsageError
from raylab.evaluation.site_report import LIMIT, SiteReport, check_report, find_few, tell_count
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
    if job.name != bundle.task:
        raise DataError(f"the model of {bundle.name} is of task '{job.name}', the bundle says '{bundle.task}'")
    inputs = inputs_of(job, spec)
    if bundle.concepts != inputs.names:
        raise DataError(f"the model of {bundle.name} has other inputs than the bundle says")
    if recalibrate is not None and job.kind != "icu":
        raise UsageError("--recalibrate is for tasks on intensive-care data", do="leave it out")
    meta = job.read_meta(data)
    samples = job.load(data, split, recipe.data, spec)
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
    if few := find_few(scored.n, scored.patients, scored.classes):
        raise DataError(
            f"split '{split}' of {data} has too few rows for scores that may leave the site",
            f"{'; '.join(few)}; the least is {LIMIT}",
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
        "format": 2,
        "bundle": sha256,
        "task": job.name,
        "synthetic": meta.synthetic,
        "split": split,
        "rows": tell_count(scored.n),
        "patients": tell_count(scored.patients),
        "classes": {name: tell_count(n) for name, n in scored.classes.items()},
        "scores": intervals(scored.scores),
        "coverage": describe_coverage(inputs.measure_coverage(data), meta),
        "shift": describe_shift(inputs, meta, inputs.count_patients(data)),
        "recalibration": again,
    }
    return check_report(content, bundle.concepts, spec["classes"], bundle.task, sha256)


def intervals(of: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    """Scores without the words and counts that are with them; of those that compare fewer than LIMIT rows, none."""
    told = {name: one for name, one in of.items() if one.n is None or min(one.n) >= LIMIT}
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in told.items()}


def describe_coverage(found: Mapping[str, float], meta: Meta) -> dict[str, float | None]:
    """For every input, the fraction of rows with a value; none for a fraction of fewer than LIMIT rows."""
    rows = sum(of["n"] for of in meta.counts.values()) if found else 0
    return {name: share if share == 0 or share * rows >= LIMIT else None for name, share in found.items()}


def describe_shift(inputs: ModelInputs, meta: Meta, patients: Mapping[str, int]) -> dict[str, float | None]:
    """For every input, how many standard deviations of the training data the mean here is off; none for a mean over
    fewer than LIMIT patients, by their number for each."""
    here = inputs.read_means(meta)
    shift: dict[str, float | None] = {}
    for name, (mean, std) in inputs.trained.items():
        own = here.get(name)
        is_known = own is not None and mean is not None and patients.get(name, LIMIT) >= LIMIT
        shift[name] = (own - mean) / std if is_known else None  # type: ignore[operator]
    return shift


def tell(report: SiteReport) -> None:
    """Print a report."""
    words = ", SYNTHETIC data" if report.synthetic else ""
    counts = ", ".join(f"{name} {n}" for name, n in report.classes.items())
    say(f"{report.split} split: {report.rows} rows of {report.patients} patients ({counts}){words}")
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
