"""raylab explain: plot which hours and features, or which pixels of a section, influence a network's predictions, in
its MLflow run; of rolling predictions also write one page per stay."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cli
from jobs.common import home, individuals, provenance, run_tracking, scores
from jobs.common.console import say
from jobs.common.early_warning import EVERY, RECALL, Predicted, check_pages, write_pages
from jobs.evaluate import run_of_task
from raylab.data.icu.dataset import IcuSamples
from raylab.errors import UsageError
from raylab.files import atomic_write
from raylab.tasks import find_task
from tracking import plots
from tracking.outbox import Outbox
from tracking.provenance import save_png

EXAMPLE = "raylab explain ards --run NAME --data prepared/ards --split val"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help="task of the run, on intensive-care data or brain sections")
    parser.add_argument(
        "--run", required=True, metavar="RUN", help="name, MLflow run id or directory of a finished run"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared directory of the task")
    parser.add_argument("--split", choices=["train", "val"], default="val", help="split to explain (default: val)")
    parser.add_argument("--stay", metavar="ID", help="stay to plot (default: the one with the highest probability)")
    parser.add_argument("--rows", type=int, default=256, help="random rows to average over (default: 256)")
    parser.add_argument(
        "--pages",
        type=int,
        nargs="?",
        const=EVERY,
        metavar="N",
        help="rolling data: also write an HTML page per stay with risk, alarms and measurements over time: of N random "
        "stays, of --stay, or of every stay of the split",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help=f"risk from which the pages show an alarm (default: the highest that recalls {100 * RECALL:g}%% of the "
        "onsets of the val split)",
    )
    individuals.add_option(parser)


def main(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.evaluation.attributions import attributions, by_feature  # loads captum and torch

    directory, data = run_of_task(args.run, args.task), args.data.absolute()
    if find_task(args.task).kind == "sections":
        return explain_sections(args, directory, data)
    if find_task(args.task).kind != "icu":
        raise UsageError(f"explain shows hours and series, which task '{args.task}' does not have")
    check_pages(data, args.task, args.pages, args.threshold, args.share_individuals)
    home.check_writable(directory)
    job, recipe, samples, network = scores.load(directory, data, args.split)
    p = scores.probabilities(job, recipe, samples, network)
    if args.stay is None:
        one = int(p.argmax())
    elif args.stay in samples.ids:
        one = int(np.flatnonzero(samples.ids == args.stay)[-1])
    else:
        raise UsageError(
            f"split '{args.split}' has no row of that stay", do="use an id from the output of raylab predict"
        )
    rows = np.random.default_rng(recipe.seed).permutation(len(samples))[: args.rows]
    features = len(samples.spec["features"])
    gradients = attributions(network, samples.batch(np.append(rows, one)), features)
    names, matrices = by_feature(gradients, samples.spec)
    average = np.abs(matrices[:-1]).mean(0)
    synthetic = find_task(args.task).read_meta(data).synthetic
    figures = {
        "average": plots.attribution(
            average, names, f"Integrated gradients, mean of {len(rows)} rows", False, synthetic
        ),
        "one": plots.attribution(
            matrices[-1], names, f"Integrated gradients, one patient, p = {p[one]:.2f}", True, synthetic
        ),
    }
    few = len(np.unique(samples.group[rows])) < individuals.FEW
    private = set() if synthetic or args.share_individuals else {"one", *(["average"] if few else [])}
    files = {name: write(directory, name, figure, name in private) for name, figure in figures.items()}
    hidden = [path for name, path in files.items() if name in private]
    send(directory, [path for path in files.values() if path not in hidden])
    ranked = sorted(zip(names, average.sum(1).tolist(), strict=True), key=lambda pair: -pair[1])
    if args.pages is not None:
        assert isinstance(samples, IcuSamples)
        predicted = Predicted(directory, data, args.split, job, recipe, samples, network, p)
        index = write_pages(predicted, args.threshold, args.pages, args.stay)
    if not args.quiet:
        say(f"mean absolute attribution to the logit over {len(rows)} rows of {args.split}:")
        for name, share in ranked[:15]:
            say(f"  {name:<22} {share:.3f}")
        if shown := [path for path in files.values() if path not in hidden]:
            say(f"plots: {', '.join(shown)}")
        if hidden:
            individuals.tell(hidden)
        if args.pages is not None:
            say(f"pages, one per stay, readable only by you: {index}")
    return {
        "run_id": home.note(directory).run_id,
        "rows": len(rows),
        "features": dict(ranked),
        "plots": list(files.values()),
        "private": hidden,
        **({"pages": str(index)} if args.pages is not None else {}),
    }


def explain_sections(args: argparse.Namespace, directory: Path, data: Path) -> dict[str, Any]:
    """Plot which pixels of whole sections the predicted depth depends on."""
    if any(value is not None for value in (args.stay, args.pages, args.threshold)):
        raise UsageError("--stay, --pages and --threshold require a task on intensive-care data", do="leave them out")
    job, recipe, samples, network = scores.load(directory, data, args.split)
    if samples.spec["pairs"]:
        raise UsageError(f"a run of '{args.task}' predicts nothing", do="explain a run of 'sections'")
    from jobs.common.saliency_maps import draw_maps  # loads captum

    home.check_writable(directory)
    p = scores.probabilities(job, recipe, samples, network)
    figure = draw_maps(network, samples, p, args.split, job.read_meta(data).synthetic)  # type: ignore[arg-type]
    file = write(directory, "sections", figure, private=False)
    send(directory, [file])
    if not args.quiet:
        say(f"plots: {file}")
    return {"run_id": home.note(directory).run_id, "rows": len(samples), "plots": [file], "private": []}


def write(directory: Path, name: str, figure: Any, private: bool) -> str:
    """Save a figure in the run's directory, in `individuals` if it is `private`, and return its path."""
    folder = individuals.folder(directory) if private else directory / "plots"
    folder.mkdir(exist_ok=True)
    file = folder / f"explain-{name}.png"
    with atomic_write(file) as beside:
        save_png(figure, beside, [provenance.describe(directory)], dpi=110, bbox_inches="tight")
    return str(file)


def send(directory: Path, files: list[str]) -> None:
    """Log plots to the run's MLflow run; they wait on disk if the server is unavailable."""
    outbox = Outbox(directory / "outbox")
    for file in files:
        outbox.append({"kind": "artifact", "path": file, "to": "plots"})
    run_tracking.forward_now(directory)


if __name__ == "__main__":
    sys.exit(cli.main(["explain", *sys.argv[1:]]))
