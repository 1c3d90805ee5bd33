"""raylab export: write a run's model as a signed file that another site can score, or an experiment as a research
object; neither holds a patient."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import cli
from jobs.common import bundle_card, home, outputs, provenance, research_object, run_tracking
from jobs.common.console import say
from jobs.common.environment import verb_environment
from jobs.common.model_inputs import ModelInputs, inputs_of
from jobs.common.results import RunReference, ScoresFile, find_run
from raylab import __version__
from raylab.data.prepared import Meta, sha256
from raylab.documents import read_document
from raylab.errors import DataError, UsageError
from raylab.evaluation.site_report import LIMIT
from raylab.tasks.base import Task
from raylab.training import ledger
from tracking.runs import PRIVACY

EXAMPLE = "raylab export NAME --out NAME.raylab"
SUFFIX = ".raylab"
CRATE_SUFFIX = ".crate.zip"
HASHES = ("recipe_hash", "data_hash", "split_hash", "code_revision", "lock_hash", "image_digest", "torch_version",
          "weights_sha256", "ledger_sha256")  # fmt: skip
SHOWN = ("auroc", "auprc", "brier", "ece", "calibration_slope", "calibration_intercept")


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "name, MLflow run id or directory of a finished run; with --crate several, or none for all of the experiment"
    parser.add_argument("runs", metavar="RUN", nargs="*", help=text)
    text = f"the bundle (default: NAME{SUFFIX}), or the research object (default: EXPERIMENT{CRATE_SUFFIX})"
    parser.add_argument("--out", type=Path, metavar="FILE", help=text)
    text = "Ed25519 key that signs a bundle, made if there is none (default: HOME/keys/bundles)"
    parser.add_argument("--key", type=Path, metavar="FILE", help=text)
    text = "write a research object (RO-Crate) instead: recipes, scores, figures, ledgers, models and hashes of runs"
    parser.add_argument("--crate", action="store_true", help=text)
    text = "of a research object: an author; give it once for each"
    parser.add_argument("--author", action="append", default=[], metavar="NAME", help=text)
    text = "of a research object: its licence, an address or words"
    parser.add_argument("--licence", metavar="TEXT", help=text)
    text = "of a research object: also the figures of real data, in which steps of curves are single rows"
    parser.add_argument("--figures", action="store_true", help=text)
    text = "of a research object: a report of `raylab compare` to add; its small counts are not left out"
    parser.add_argument("--report", type=Path, metavar="FILE", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.crate:
        if args.key is not None:
            raise UsageError("--key signs a bundle, and a research object has no signature", do="leave it out")
        return export_crate(
            args.runs,
            out=args.out,
            authors=args.author,
            licence=args.licence,
            figures=args.figures,
            report=args.report,
            quiet=args.quiet,
        )
    if args.author or args.figures or args.licence is not None or args.report is not None:
        raise UsageError("--author, --licence, --figures and --report are of a research object", do="add --crate")
    if len(args.runs) != 1:
        do = "give one, or --crate for a research object of several"
        raise UsageError(f"a bundle is of one run, got {len(args.runs)}", do=do)
    return export(args.runs[0], out=args.out, key=args.key, quiet=args.quiet)


@verb_environment()
def export(
    run: RunReference, *, out: Path | str | None = None, key: Path | str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Write the model of a finished run as a signed bundle (raylab/training/bundle.py).

    Returns {"run", "bundle": path, "sha256": of its bundle.json, "signer": public key, "concepts": names of the inputs,
    "suppressed": counts that are not told}. Raises DataError, and writes nothing, if the run has no model, if its data
    is not where it was trained, or if a statistic that the model needs rests on too few patients to leave the site.
    """
    from raylab.training import bundle as bundles  # loads torch

    path = None if out is None else check_output(Path(out))
    directory = find_run(run)
    path = path or check_output(Path(f"{directory.name}{SUFFIX}"))
    model = read_exported(directory)
    origin = provenance.describe(directory)
    counts = {split: bundles.suppress(of) for split, of in model.meta.counts.items()}
    scores, few = read_scores(directory, model.meta.data_hash, model.task)
    note = bundles.Bundle(
        format=bundles.FORMAT,
        name=directory.name,
        task=model.task.name,
        synthetic=model.meta.synthetic,
        raylab=__version__,
        concepts=model.inputs.names,
        units=model.inputs.units,
        counts=counts,
        hashes={name: getattr(origin, name) for name in HASHES},
        scores=scores,
        privacy=home.note(directory).tags.get(PRIVACY),
        files={},
    )
    card = bundle_card.render_card(note, origin, model.inputs, model.network, model.parameters)
    contents = {
        bundles.WEIGHTS: (directory / bundles.WEIGHTS).read_bytes(),
        bundles.NOTE: (directory / bundles.NOTE).read_bytes(),
        bundles.CARD: card.encode(),
    }
    signing = bundles.read_key(home.home() / "keys" / "bundles" if key is None else Path(key))
    sha256 = bundles.write_bundle(path, note, contents, signing)
    suppressed = sum(n is None for of in counts.values() for n in of.values())
    signer = bundles.public_key(signing)
    if not quiet:
        say(f"wrote {path}: {directory.name}, {len(note.concepts)} inputs, {path.stat().st_size / 1e6:.2f} MB")
        say(f"  signed by {signer}; tell the receiver this key on another way than the file")
        say(f"  {suppressed} counts below {LIMIT} are not told")
        if few:
            say(f"  scores on val are left out: {'; '.join(few)}; the least is {LIMIT}")
        say(f"next, at the other site: raylab evaluate {path.name} --signer KEY --data DIR --json report.json")
    return {
        "run": directory.name,
        "bundle": str(path.absolute()),
        "sha256": sha256,
        "signer": signer,
        "concepts": list(note.concepts),
        "suppressed": suppressed,
    }


@verb_environment()
def export_crate(
    runs: Sequence[RunReference] = (),
    *,
    out: Path | str | None = None,
    authors: Sequence[str] = (),
    licence: str | None = None,
    figures: bool = False,
    report: Path | str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write finished runs, or all of the present experiment, as a research object (research_object.py): a zip archive
    with an RO-Crate.

    `figures`: also those of real data. `report`: of `raylab compare`, to add as it is. Returns {"crate": path, "runs":
    names, "files": number of them, "left_out": what is not in it and why}. Raises UsageError or DataError, and writes
    nothing, if a run has no model, or if `export` would refuse it.
    """
    experiment = run_tracking.experiment_name()
    path = Path(out or f"{experiment}{CRATE_SUFFIX}")
    outputs.check(path, "--out", "crate")
    chosen = [find_run(run) for run in runs]
    left_out: list[str] = []
    if not chosen:
        chosen, left_out = research_object.list_runs(experiment)
    parts = []
    for directory in chosen:
        read_exported(directory)  # which refuses what may not leave
        part, reasons = research_object.collect(directory, figures)
        parts.append(part)
        left_out += reasons
    added = None if report is None else research_object.check_report(Path(report))
    count = research_object.write(path, experiment, parts, authors, licence, added)
    if not quiet:
        say(f"wrote {path}: {len(parts)} runs in {count} files, {path.stat().st_size / 1e6:.2f} MB")
        for line in left_out:
            say(f"  left out: {line}")
        if added is not None:
            say(f"  {added.name} is in it as it is, with its counts: look at it before you hand it on")
        say(f"next, where the data is: raylab rerun {path.name} --run {parts[0].name} --data DIR")
    return {"crate": str(path.absolute()), "runs": [part.name for part in parts], "files": count, "left_out": left_out}


class Exported(NamedTuple):
    """A model that may leave its site: `network` is its name, `meta` that of its data."""

    task: Task
    inputs: ModelInputs
    meta: Meta
    network: str
    parameters: int


def read_exported(directory: Path) -> Exported:
    """Read the model of a run and what it was trained on. Raises UsageError for a task without data of patients, and
    DataError if it is not finished, if its data has changed, or if a statistic that it needs may not leave the site."""
    from raylab.training.run import read_model  # loads torch

    task, recipe, spec, network = read_model(directory)
    inputs = inputs_of(task, spec)
    record = home.note(directory)
    check_weights(directory)
    meta = task.read_meta(Path(record.data))
    if meta.data_hash != record.data_hash:
        raise DataError(f"{record.data} is no longer the data of {directory.name}", "its data hash differs")
    check_statistics(inputs.count_patients(Path(record.data)), inputs.names, LIMIT)
    parameters = sum(weight.numel() for weight in network.parameters())
    return Exported(task, inputs, meta, recipe.model.name, parameters)


def check_weights(directory: Path) -> None:
    """Raise DataError if the weights of a finished run are not those that its ledger names."""
    ends = [entry for entry in ledger.read_ledger(directory / ledger.FILE) if isinstance(entry, ledger.Finish)]
    if ends and sha256(directory / "model" / "model.safetensors") != ends[-1].model_sha256:
        raise DataError(
            f"the weights of {directory.name} are not those with which it ended",
            "model/model.safetensors does not have the hash in the ledger",
            f"raylab verify {directory.name} says what was changed; raylab rerun {directory.name} trains it again",
        )


def check_output(path: Path) -> Path:
    """`path`, if a bundle can be written there."""
    outputs.check(path, "--out", "bundle")
    return path


def check_statistics(patients: Mapping[str, int], concepts: tuple[str, ...], limit: int) -> None:
    """Raise DataError if the mean of an input rests on fewer than `limit` patients, and so may tell one of them.
    `patients`: their number by input."""
    few = [name for name in concepts if patients.get(name, limit) < limit]
    if few:
        raise DataError(
            f"the model needs statistics that may tell of single patients: {', '.join(few)}",
            f"fewer than {limit} patients of the train split are behind each",
            "prepare the data without these concepts, or with more patients, and train again",
        )


def read_scores(directory: Path, data_hash: str, task: Task) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """The run's scores on the val split of its data, with their intervals; and what is too few for any, in words."""
    path = directory / "scores" / f"val-{data_hash[:12]}.json"
    told, few = research_object.tell_scores(read_document(path, ScoresFile, f"raylab resume {directory.name}"))
    shown = [name for name in dict.fromkeys((*task.primary, *SHOWN)) if name in told]
    return {name: {end: getattr(told[name], end) for end in ("value", "low", "high")} for name in shown}, few


if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
