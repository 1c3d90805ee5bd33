"""The description of a run on its page in MLflow: Markdown that says what it is, on which data, what it has scored, and
which commands come next."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.common import home
from raylab.config.recipe import Recipe
from raylab.documents import parse_document, read_json
from raylab.score import Score
from raylab.tasks import find_task
from raylab.tasks.recipes import read_recipe
from raylab.training.run_record import RESUMABLE, RunRecord
from tracking import runs

TAG = "mlflow.note.content"
PLACEHOLDER = "DIR"
WHAT = {
    "train": "Training of",
    "federate": "Training across sites of",
    "transfer": "Transfer of",
    "tune": "Search for",
    "trial": "Trial of a search for",
    "evaluate": "Evaluation of",
    "benchmark": "Benchmark of",
}


def describe(directory: Path) -> str:
    """The description of the run in `directory`, with what it has scored so far."""
    scores = {path.stem.partition("-")[0]: read_json(path, dict[str, Any]) for path in _kept(directory)}
    return render(home.note(directory), read_recipe(directory / "recipe.json"), scores)


def render(record: RunRecord, recipe: Recipe, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The description of a run; `scores` {split: content of the file that `scores.keep` writes}.

    Text that a user has chosen is escaped. The path of the data is left out where others read the page.
    """
    synthetic = " This data is SYNTHETIC." if record.synthetic else ""
    source = record.tags.get("raylab.data_source", "")
    model = f"{WHAT[record.kind]} a **{escape(recipe.model.name)}** model, task **{escape(record.task)}**"
    lines = [
        f"{model}{f', from run **{escape(record.parent)}**' if record.parent else ''}.",
        f"Data: **{escape(source)}**, {(record.data_hash or '')[:8]}, split {(record.split_hash or '')[:8]}, "
        f"seed {recipe.seed}.{synthetic}",
    ]
    if record.charts:  # before the rest, which MLflow folds
        lines.insert(1, f"[Parallel coordinates and contour plots of the trials]({record.charts})")
    if scores:
        lines.append("\n".join(["| split | rows | patients | score | value, 95% CI |", "|---|---|---|---|---|",
                                *_rows(record, scores)]))  # fmt: skip
    if commands := list(_commands(record)):
        fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", "".join(commands))), 0)
        lines.append("\n".join(["Next:", "", fence, *commands, fence]))
    return "\n\n".join(lines)


def escape(text: str) -> str:
    """`text` as Markdown that shows it as it is, on one line.

    MLflow's Markdown (showdown) unescapes these characters only; the others have no meaning in it.
    """
    line = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    marked = re.sub(r"([\\`*_{}\[\]()#+\-.!~=|:])", r"\\\1", line.replace("&", "&amp;"))
    return marked.replace("<", "&lt;").replace(">", "&gt;")


def _kept(directory: Path) -> list[Path]:
    """The files of scores on the data that the run is of, not of those that it was evaluated on later."""
    data_hash = home.note(directory).data_hash or ""
    return sorted((directory / "scores").glob(f"*-{data_hash[:12]}.json"))


def _rows(record: RunRecord, scores: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    task = find_task(record.task)
    for split, content in scores.items():
        chosen = split == "val" and record.kind != "evaluate"
        name = f"{escape(split)}{' (used to choose the model)' if chosen else ''}"
        for score in (*task.primary, *task.secondary):
            if score in content:
                value = parse_document(content[score], Score, Path(split)).shorten()
                counts = f"{content['n']:,} | {content['patients']:,}"
                yield f"| {name} | {counts} | {escape(score)} | {escape(str(value))} |"


def _commands(record: RunRecord) -> Iterator[str]:
    if record.kind not in RESUMABLE:
        yield "raylab compare"
        return
    name = shlex.quote(record.name)
    data = shlex.quote(_one_line(record.data)) if runs.is_embedded(record.uri) else PLACEHOLDER
    yield f"raylab resume {name}    # if it has not finished"
    yield f"raylab evaluate {record.task} --run {name} --data {data} --split test"
    yield "raylab compare"


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text)
