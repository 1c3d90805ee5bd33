"""raylab export: write a run's model as one signed file that another site can score, and that holds no patient."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import cli
from jobs.common import home, outputs, provenance
from jobs.common.console import say
from jobs.common.environment import verb_environment
from jobs.common.results import RunReference, find_run
from raylab import __version__
from raylab.data.icu.concepts import CONCEPTS
from raylab.data.icu.contributors import count_contributors
from raylab.data.icu.meta import IcuMeta
from raylab.data.prepared import read_meta
from raylab.documents import read_json
from raylab.errors import DataError, UsageError
from raylab.evaluation.site_report import LIMIT
from raylab.score import Score
from tracking.provenance import Provenance

if TYPE_CHECKING:
    from raylab.training.bundle import Bundle

EXAMPLE = "raylab export NAME --out NAME.raylab"
SUFFIX = ".raylab"
HASHES = ("recipe_hash", "data_hash", "split_hash", "code_revision", "lock_hash", "image_digest", "torch_version",
          "weights_sha256", "ledger_sha256")  # fmt: skip
SHOWN = ("auroc", "auprc", "brier", "calibration_slope", "calibration_intercept")


LEAKS = """\
The bundle holds no row of a patient. Weights and statistics are functions of the training data, and are not proven to
tell nothing of a single patient."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", help="name, MLflow run id or directory of a finished run")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the bundle (default: NAME{SUFFIX})")
    text = "Ed25519 signing key, made if there is none (default: HOME/keys/bundles)"
    parser.add_argument("--key", type=Path, metavar="FILE", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    return export(args.name, out=args.out, key=args.key, quiet=args.quiet)


@verb_environment()
def export(
    run: RunReference, *, out: Path | str | None = None, key: Path | str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Write the model of a finished run on intensive-care data as a signed bundle (raylab/training/bundle.py).

    Returns {"run", "bundle": path, "sha256": of its bundle.json, "signer": public key, "concepts", "suppressed": counts
    that are not told}. Raises DataError, and writes nothing, if the run has no model, if its data is not where it was
    trained, or if a statistic that the model needs rests on too few patients to leave the site.
    """
    from raylab.training import bundle as bundles  # loads torch
    from raylab.training.run import read_model

    if out is not None:
        outputs.check(Path(out), "--out", "bundle")
    directory = find_run(run)
    path = Path(out or f"{directory.name}{SUFFIX}")
    outputs.check(path, "--out", "bundle")
    job, recipe, spec, network = read_model(directory)
    if job.kind != "icu":
        raise UsageError(f"run {directory.name} is of task '{job.name}'; bundles are of tasks on intensive-care data")
    record = home.note(directory)
    meta = read_meta(Path(record.data), record.task, IcuMeta)
    if meta.data_hash != record.data_hash:
        raise DataError(f"{record.data} is no longer the data of {directory.name}", "its data hash differs")
    concepts = (*spec["features"], *spec["static"])
    check_statistics(count_contributors(Path(record.data)), concepts, LIMIT)
    origin = provenance.describe(directory)
    counts = {split: bundles.suppress(of) for split, of in meta.counts.items()}
    note = bundles.Bundle(
        format=bundles.FORMAT,
        name=directory.name,
        task=job.name,
        synthetic=record.synthetic,
        raylab=__version__,
        concepts=concepts,
        units={name: CONCEPTS[name].unit for name in concepts if name in CONCEPTS},
        counts=counts,
        hashes={name: getattr(origin, name) for name in HASHES},
        scores=read_scores(directory, record.data_hash or ""),
        files={},
    )
    contents = {
        bundles.WEIGHTS: (directory / bundles.WEIGHTS).read_bytes(),
        bundles.NOTE: (directory / bundles.NOTE).read_bytes(),
        bundles.CARD: render_card(note, origin, spec, recipe.model.name, count_parameters(network)).encode(),
    }
    signing = bundles.read_key(home.home() / "keys" / "bundles" if key is None else Path(key))
    sha256 = bundles.write_bundle(path, note, contents, signing)
    suppressed = sum(n is None for of in counts.values() for n in of.values())
    signer = bundles.public_key(signing)
    if not quiet:
        say(f"wrote {path}: {directory.name}, {len(concepts)} concepts, {path.stat().st_size / 1e6:.2f} MB")
        say(f"  signed by {signer}; tell the receiver this key on another way than the file")
        say(f"  {suppressed} counts below {LIMIT} are not told")
        say(f"next, at the other site: raylab evaluate {path.name} --signer KEY --data DIR --json report.json")
    return {
        "run": directory.name,
        "bundle": str(path.absolute()),
        "sha256": sha256,
        "signer": signer,
        "concepts": list(concepts),
        "suppressed": suppressed,
    }


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


def read_scores(directory: Path, data_hash: str) -> dict[str, dict[str, float | None]]:
    """The run's scores on the val split of its data, with their intervals."""
    found = read_json(directory / "scores" / f"val-{data_hash[:12]}.json", dict[str, Any], "raylab resume NAME")
    scores = {name: Score.model_validate(found[name]) for name in SHOWN if isinstance(found.get(name), dict)}
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in scores.items()}


def count_parameters(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters())


def render_card(bundle: "Bundle", origin: Provenance, spec: dict[str, Any], model: str, parameters: int) -> str:
    """The model card in Markdown, from what the bundle tells anyway."""
    label = {name: value for name, value in spec["label"].items() if value is not None}
    lines = [
        f"# Model card: {bundle.name}",
        "",
        *(["**SYNTHETIC DATA: its scores say nothing about patients.**", ""] if bundle.synthetic else []),
        "Not a medical device. Not for clinical use.",
        "",
        f"- task: {bundle.task}; model: {model}, {parameters:,} parameters",
        f"- input: {spec['hours']} h of {len(spec['features'])} hourly series and {len(spec['static'])} static values, "
        f"prediction at {spec['landmark_h']:g} h",
        f"- label: {'; '.join(f'{name}: {value}' for name, value in label.items())}",
        f"- trained by raylab {bundle.raylab}, code {origin.code_revision}, on {origin.data_source}",
        "",
        "## Training data",
        "| split | " + " | ".join(next(iter(bundle.counts.values()), {})) + " |",
        "|---" * (1 + len(next(iter(bundle.counts.values()), {}))) + "|",
    ]
    lines += [
        f"| {split} | " + " | ".join("<10" if n is None else f"{n:,}" for n in of.values()) + " |"
        for split, of in bundle.counts.items()
    ]
    lines += ["", "## Scores on the val split, by which the epoch was chosen", ""]
    for name, score in bundle.scores.items():
        lines.append(f"- {name}: {Score.model_validate(score)}")
    inputs = ", ".join(f"{name} ({bundle.units.get(name, 'derived')})" for name in bundle.concepts)
    lines += ["", "## Inputs", "", inputs, "", LEAKS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
