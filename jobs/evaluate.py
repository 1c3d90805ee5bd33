"""raylab evaluate: score a run on a split of its own or of other data, and count every read of a test split."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from jobs import cli, prepare
from jobs.common import home, icu_evaluation, model_card, run_tracking, scores
from jobs.common.console import open_screen, say
from jobs.common.environment import verb_environment
from jobs.common.results import Evaluation, RunReference, check_task, find_run
from raylab.data.images.manifest import SPLITS, discover
from raylab.data.prepared import sha256
from raylab.errors import DataError, UsageError, unknown
from raylab.evaluation.overlap import in_words, leakage
from raylab.tasks import evaluation, find_task
from raylab.tasks.plugins import load_stored
from raylab.tasks.recipes import read_recipe
from raylab.training.run import read_model
from raylab.training.run_record import RunRecord
from tracking.outbox import Outbox

Split = Literal["test", "val", "all"]
READS_TEST = ("test", "all")  # splits that hold test rows
EXAMPLE = "raylab evaluate ards --run NAME --data prepared/ards --split test --json scores.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK|BUNDLE", help="task of the run, or a model bundle (raylab export)")
    parser.add_argument("--run", metavar="RUN", help="name, MLflow run id or directory of a finished run")
    text = "of a bundle: public key of the expected sender; any other one is refused"
    parser.add_argument("--signer", metavar="KEY", help=text)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="prepared directory of the task; for images also a folder with label lists or a manifest",
    )
    parser.add_argument("--split", choices=get_args(Split), default="test", help="split to score (default: test)")
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="intensive-care data: also score with intercept and slope fitted on N patients of DIR",
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.run is None:
        return evaluate_bundle(args)
    if args.signer is not None:
        raise UsageError("--signer is the sender of a bundle, and a run has none", do="leave it out")
    return evaluate(
        args.run, args.data, task=args.task, split=args.split, recalibrate=args.recalibrate, quiet=args.quiet
    ).details


def evaluate_bundle(args: argparse.Namespace) -> dict[str, Any]:
    """Score a model bundle; the result holds aggregates alone, and no run is made of it."""
    if not Path(args.task).is_file():
        do = f"raylab evaluate {args.task} --run RUN --data {args.data}"
        raise UsageError("evaluate needs --run RUN, or the file of a model bundle", do=do)
    from jobs.common import bundle_evaluation

    data = args.data.absolute()
    with open_screen(args.quiet, f"{args.task}: scoring the {args.split} split"):
        report = bundle_evaluation.evaluate_bundle(
            Path(args.task), data, args.split, args.recalibrate, args.signer, args.quiet
        )
    return report.model_dump(mode="json")


@verb_environment()
def evaluate(
    run: RunReference,
    data: Path | str,
    *,
    task: str | None = None,
    split: Split = "test",
    recalibrate: int | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Score a run on a split of any prepared directory of its task, with intervals and a leakage check.

    `data`: for images also a folder with label lists or a manifest. `task`: DataError if the run is of another task.
    `recalibrate`: on intensive-care data, also score with intercept and slope fitted on this number of its patients.
    Every read of a test split is counted. Raises UsageError, DataError or TrackingError before anything is scored.
    """
    check_split(split, get_args(Split))
    directory = run_of_task(run, task)
    home.check_writable(directory)
    with open_screen(quiet, f"{directory.name}: scoring the {split} split"):
        return score(directory, Path(data).absolute(), split, recalibrate, quiet)


def score(directory: Path, data: Path, split: Split, recalibrate: int | None, quiet: bool) -> Evaluation:
    """Do what `evaluate` does, for the run in `directory`."""
    run_record = home.note(directory)
    task = run_record.task
    kind = find_task(task).kind
    if kind == "images" and not (data / "meta.json").is_file():
        data = prepare_folder(task, directory, data, split, quiet)
    meta = find_task(task).read_meta(data)
    own = meta.data_hash == run_record.data_hash
    if own and split == "all":
        raise DataError(
            f"run {directory.name} was trained on a part of {data}",
            "a score over all rows would include training rows",
            "use --split test or --split val; --split all is for data on which the model was not trained",
        )
    leaked = leakage_of_run(directory, data, split)
    uri = run_tracking.checked_address()
    if recalibrate is not None and (kind != "icu" or recalibrate < 1):
        what = "--recalibrate takes a positive number of patients and requires a task on intensive-care data"
        raise UsageError(what, do="--recalibrate N, or leave it out")
    scored = replace(scores.score_run(directory, data, split), leakage=leaked)
    if kind == "icu":
        recipe = read_recipe(directory / "recipe.json")
        more = icu_evaluation.compute_clinical_scores(scored, recipe)
        if recalibrate:
            more["recalibrated"] = icu_evaluation.compare_recalibration(
                directory, data, scored, recalibrate, own, recipe.seed
            )
        scored = replace(scored, more=more)
    reads = count_reads(directory, meta.data_hash, split)
    read_tag = {"raylab.test_reads": str(reads)} if split in READS_TEST else {}
    if own:
        run_id = run_record.run_id
        with home.lock_run(directory):
            record(directory, scored, read_tag)
    else:
        recipe = read_recipe(directory / "recipe.json")
        earlier = find_evaluation(directory, meta.data_hash, split, uri)
        target = earlier or home.new_run(None, f"{directory.name}-on-{data.name}")
        tags = {"raylab.split": split, **read_tag}
        new = run_tracking.describe_run(
            target, recipe, meta, data, "evaluate", uri, directory, directory, tags, run_record.best_step
        )
        if earlier is None:
            opened = run_tracking.open_run(target, new, system=False)
        else:
            opened = run_tracking.reopen_run(target, system=False)
        with opened:
            scores.record(target, scored)
            if earlier is not None:
                repeated = {tag: new.record.tags[tag] for tag in ("raylab.code_revision", *read_tag)}
                Outbox(target / "outbox").append({"kind": "tags", "values": repeated})
        run_id = home.note(target).run_id
    if kind == "images":
        scores.keep(directory, scored)  # the model card includes scores on other data
        model_card.write(directory, scored.parameters)
        home.share(directory)
        run_tracking.forward_now(directory)
    out = {
        "run_id": run_record.run_id,
        "evaluation_run_id": run_id,
        "name": directory.name,
        "task": task,
        "data": str(data),
        "data_hash": meta.data_hash,
        "split_hash": meta.split_hash,
        "synthetic": meta.synthetic,
        "split": split,
        "leakage": leaked,
        "test_reads": reads,
        **scored.to_json(),
    }
    if not quiet:
        scores.tell(scored)
        if kind == "icu":
            icu_evaluation.tell(scored.more)
        say(f"  leakage: {in_words(leaked)}")
        for name, report in leaked.get("parents", {}).items():
            say(f"  leakage from {name}, which provided the initial weights: {in_words(report)}")
        for warning in meta.printable_warnings:
            say(f"  warning about the data: {warning}")
        if reads > 1:
            say(f"note: this run has now been scored on these test rows {reads} times; if you selected anything")
            say("  after the first time, this score is optimistic")
        say("next: raylab compare        raylab ui")
    return Evaluation(directory.name, run_id, data, split, reads, out)


def find_evaluation(directory: Path, data_hash: str, split: str, uri: str) -> Path | None:
    """The run of an earlier evaluation of the run in `directory` on this split of other data, which a repetition
    continues: it is one run in MLflow. None if there is none in this MLflow and experiment."""
    found = None
    for path, record in home.records():
        if (
            record.kind == "evaluate"
            and record.parent_directory == str(directory)
            and (record.data_hash, record.tags.get("raylab.split")) == (data_hash, split)
            and (record.uri, record.experiment) == (uri, run_tracking.experiment_name())
        ):
            found = path  # the newest: names have the time
    return found


def prepare_folder(task: str, directory: Path, folder: Path, split: str, quiet: bool) -> Path:
    """Prepare `folder`, with images and label lists or a manifest, in the raylab home, and return the directory. It has
    the lists of `split` and images of the run's size."""
    files = discover(folder, splits=SPLITS if split == "all" else (split,))
    spec = read_model(directory)[2]
    size, classes = spec["size"], spec["classes"]
    read = [folder.absolute(), *files.lists.values(), *([files.manifest] if files.manifest else [])]
    text = "\n".join([str(size), *classes, *(f"{p}\t{sha256(p) if p.is_file() else ''}" for p in read)])
    out = home.home() / "prepared" / f"{folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    # `replace`: a file of the same name may have changed
    options = {"size": size, "manifest": files.manifest, "images": files.images, "source": "covidx", **files.lists}
    prepare.write_prepared(task, out, True, quiet, options | {"classes": tuple(classes)})
    return out


def leakage_of_run(directory: Path, data: Path, split: str) -> dict[str, Any]:
    """The result of `overlap.leakage` for the run's own training data; "parents": the same for every run or file from
    which its weights were initialised."""
    run_record = home.note(directory)

    def check(run: RunRecord) -> dict[str, Any]:
        return leakage(find_task(run_record.task).data_task, Path(run.data), data, split, run.data_hash)

    own, parents = check(run_record), {}
    run, seen = run_record, [directory]
    while True:
        weights = read_recipe(directory / "recipe.json").model.weights_path
        if run.parent is None:
            if weights is not None:
                parents[weights] = {"checked": False, "why": "the training data of a weights file is unknown"}
            return own | ({"parents": parents} if parents else {})
        parent = home.find_parent(run)
        if parent is None or parent in seen:  # a damaged record may name any run
            parents[run.parent] = {"checked": False, "why": "the run is no longer in this home"}
            return own | {"parents": parents}
        directory, run = parent, home.note(parent)
        seen.append(parent)
        parents[run.name] = check(run)


def check_split(split: str, splits: Sequence[str]) -> None:
    """Raise UsageError with the valid names if `split` is not one of `splits`; Python callers may pass any string."""
    if split not in splits:
        raise unknown("split", split, splits)


def run_of_task(run: RunReference, task: str | None) -> Path:
    """The directory of a run, whose own code is loaded; DataError if `task` is given and the run is of another one."""
    directory = find_run(run)
    load_stored(directory)
    check_task(directory, home.note(directory).task, task)
    return directory


def count_reads(directory: Path, data_hash: str, split: str) -> int:
    """Count a read of this data's test rows if `split` has any; returns how often the run has been scored on them."""
    run_record = home.note(directory)
    own = data_hash == run_record.data_hash
    elsewhere = run_record.test_reads_elsewhere
    reads = run_record.test_reads if own else elsewhere.get(data_hash, 0)
    if split in READS_TEST:
        reads += 1
        if own:
            home.annotate(directory, test_reads=reads)
        else:
            home.annotate(directory, test_reads_elsewhere={**elsewhere, data_hash: reads})
    return reads


def record(directory: Path, scored: evaluation.Evaluation, tags: dict[str, str]) -> None:
    """Log scores on the run's own data, and `tags`, to its own MLflow run."""
    scores.record(directory, scored)
    if tags:
        Outbox(directory / "outbox").append({"kind": "tags", "values": tags})
    run_tracking.forward_now(directory)


if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
