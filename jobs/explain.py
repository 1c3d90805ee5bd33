"""raylab explain: which hours and features moved a network's predictions, as plots in its MLflow run."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cli, home, scores, tracked
from jobs.evaluate import checked
from jobs.progress import say
from raylab.data.prepared import read_meta
from raylab.errors import UsageError
from tracking import plots
from tracking.forward import Forwarder
from tracking.outbox import Outbox

EXAMPLE = "raylab explain ards --run NAME --data prepared/ards --split val"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["ards"])
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", choices=["train", "val"], default="val")
    parser.add_argument("--stay", metavar="ID", help="the patient's stay; that of the highest probability otherwise")
    parser.add_argument("--rows", type=int, default=256, help="rows that the average is over, drawn")


def main(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.explain import attributions, by_feature

    directory, data = checked(args)
    job, recipe, samples, network = scores.load(directory, data, args.split)
    p = scores.probabilities(job, recipe, samples, network)
    if args.stay is None:
        one = int(p.argmax())
    elif args.stay in samples.ids:
        one = int(np.flatnonzero(samples.ids == args.stay)[-1])
    else:
        raise UsageError(f"no row of stay '{args.stay}' in split '{args.split}'", do="take an id from raylab predict")
    drawn = np.random.default_rng(recipe.seed).permutation(len(samples))[: args.rows]
    features = len(samples.spec["features"])
    found = attributions(network, samples.batch(np.append(drawn, one)), features)
    names, matrices = by_feature(found, samples.spec)
    average = np.abs(matrices[:-1]).mean(0)
    synthetic = bool(read_meta(data, args.task)["synthetic"])
    figures = {
        "average": plots.attribution(
            average, names, f"Integrated gradients, mean of {len(drawn)} rows", False, synthetic
        ),
        "one": plots.attribution(
            matrices[-1], names, f"Integrated gradients, one patient, p = {p[one]:.2f}", True, synthetic
        ),
    }
    files = record(directory, figures)
    ranked = sorted(zip(names, average.sum(1).tolist(), strict=True), key=lambda pair: -pair[1])
    if not args.quiet:
        say(f"mean absolute share of the logit over {len(drawn)} rows of {args.split}:")
        for name, share in ranked[:15]:
            say(f"  {name:<22} {share:.3f}")
        say(f"plots: {', '.join(files)}")
    return {"run_id": home.note(directory)["run_id"], "rows": len(drawn), "features": dict(ranked), "plots": files}


def record(directory: Path, figures: dict[str, Any]) -> list[str]:
    folder, outbox, files = directory / "plots", Outbox(directory / "outbox"), []
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
        file = folder / f"explain-{name}.png"
        file.write_bytes(picture.getvalue())
        outbox.append({"kind": "artifact", "path": str(file), "to": "plots"})
        files.append(str(file))
    forwarder = Forwarder()
    forwarder.add(outbox.directory)
    if left := forwarder.close(tracked.FLUSH_SECONDS):
        say(f"{left} records wait on disk for the MLflow server; send them with: raylab sync")
    return files


if __name__ == "__main__":
    sys.exit(cli.main(["explain", *sys.argv[1:]]))
