"""The runs of an experiment as one HTML file: no script, no reference to anything outside."""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from tracking import compare, plots

FORESTS = 3
FACTS = ("run_id", "status", "started", "seconds", "seed", "data_source", "data_hash", "split_hash", "code_revision")


@dataclass(frozen=True)
class Extras:
    """What a run's artifacts add to its row: `plots` {name: PNG}, the attrition table, the recipe."""

    plots: Mapping[str, bytes] = field(default_factory=dict)
    attrition: Sequence[Mapping[str, Any]] = ()
    recipe: str = ""


def report(uri: str, experiment: str, path: Path) -> Path:
    """Collect an experiment and write its report; returns `path`."""
    frame = compare.collect(uri, experiment)
    shown = compare.ranked(frame)
    extras = {run_id: _extras(uri, run_id) for run_id in shown["run_id"]}
    return write_report(path, frame, compare.curves(uri, shown), extras, title=f"raylab report: {experiment}")


def write_report(
    path: Path,
    frame: pl.DataFrame,
    curves: Mapping[str, Mapping[str, plots.Curve]],
    extras: Mapping[str, Extras],
    title: str,
) -> Path:
    """Write the page, 0600: `frame` from compare.collect, `curves` {metric: {run: curve}}, `extras` by run id."""
    shown = compare.ranked(frame)
    names = compare.labels(shown)
    scores = compare.scores(shown)
    split = scores[0].partition("/")[0] if scores else ""
    runs = [_run(row, names, scores, split, extras.get(row["run_id"], Extras())) for row in shown.iter_rows(named=True)]
    groups = [_group(key, list(members), scores) for key, members in groupby(runs, key=_data)]
    synthetic = sum(run["synthetic"] is True for run in runs)
    page = _template().render(
        title=title,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        trials=frame.filter(pl.col("kind") == "trial").height,
        synthetic=synthetic,
        unknown_source=sum(run["synthetic"] is None for run in runs),
        scores=scores,
        split=split,
        counted=any(run["n"] for run in runs),
        groups=groups,
        forests=[f for group in groups for f in _forests(group, scores[:FORESTS])],
        curves=[f for group in groups for f in _learning(group, curves)],
        searches=_searches(frame, names),
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(page)
    return path


def _extras(uri: str, run_id: str) -> Extras:
    found = compare.artifacts(uri, run_id, suffix=".json")
    attrition = json.loads(found.get("attrition.json", b"[]"))
    rows = attrition if isinstance(attrition, list) else [{"step": k, "left": v} for k, v in attrition.items()]
    recipe = found.get("recipe.json")
    return Extras(
        compare.artifacts(uri, run_id, "plots", ".png"),
        rows,
        json.dumps(json.loads(recipe), indent=2) if recipe else "",
    )


def _run(
    row: dict[str, Any], names: Mapping[str, str], scores: Sequence[str], split: str, extras: Extras
) -> dict[str, Any]:
    facts = {name.replace("_", " "): row[name] for name in FACTS if row[name] is not None}
    if row["seconds"] is not None:
        facts["seconds"] = f"{row['seconds']:.0f}"
    facts["started"] = row["started"].strftime("%Y-%m-%d %H:%M:%S UTC")
    facts |= {n.removeprefix("tag/").replace("_", " "): v for n, v in row.items() if n.startswith("tag/") and v}
    return row | {
        "label": names[row["run_id"]],
        "scores": {score: compare.interval(row, score) for score in scores},
        "n": _count(row.get(f"{split}/n")),
        "positives": _count(row.get(f"{split}/positives")),
        "facts": facts,
        "params": {n.removeprefix("param/"): v for n, v in row.items() if n.startswith("param/") and v is not None},
        "attrition": extras.attrition,
        "recipe": extras.recipe,
        "plots": [_inline(png, Path(name).stem.replace("_", " ")) for name, png in extras.plots.items()],
    }


def _data(run: Mapping[str, Any]) -> tuple[str, str, bool | None]:
    return run["task"] or "no task named", run["data_source"] or "data not named", run["synthetic"]


def _group(key: tuple[str, str, bool | None], runs: list[dict[str, Any]], scores: Sequence[str]) -> dict[str, Any]:
    for run in runs:
        # One run alone is not the best of anything.
        run["best"] = [
            s
            for s in scores
            if len(runs) > 1 and run[s] is not None and run[s] == max(r[s] for r in runs if r[s] is not None)
        ]
    return {
        "task": key[0],
        "data": key[1],
        "synthetic": key[2],
        "runs": runs,
        "splits": len({run["split_hash"] for run in runs}),
        "seeded": any(run["seed"] for run in runs),
    }


def _forests(group: Mapping[str, Any], scores: Sequence[str]) -> list[dict[str, str]]:
    images = []
    for score in scores:
        runs = sorted((r for r in group["runs"] if r[score] is not None), key=lambda r: -r[score])
        if not runs:
            continue
        lows, highs = ([run.get(f"{score}_{end}") for run in runs] for end in ("low", "high"))
        title = f"{score}: {group['task']} on {group['data']}"
        figure = plots.forest(
            [r["label"] for r in runs], [r[score] for r in runs], lows, highs, score, title, bool(group["synthetic"])
        )
        images.append(_image(figure, title))
    return images


def _learning(group: Mapping[str, Any], curves: Mapping[str, Mapping[str, plots.Curve]]) -> list[dict[str, str]]:
    images = []
    for metric, lines in curves.items():
        ours = {run["label"]: lines[run["label"]] for run in group["runs"] if run["label"] in lines}
        if ours:
            title = f"{metric}: {group['task']} on {group['data']}"
            images.append(_image(plots.learning(ours, metric, title, bool(group["synthetic"])), title))
    return images


def _searches(frame: pl.DataFrame, names: Mapping[str, str]) -> list[dict[str, str]]:
    """One scatter a search: its trials' validation score over the parameters that differ between them."""
    images = []
    trials = frame.filter((pl.col("kind") == "trial") & pl.col("parent_run_id").is_not_null())
    for (parent,), members in trials.group_by("parent_run_id", maintain_order=True):
        usual = [f"val/{name}" for name in ("auroc", "auprc", "macro_recall", "loss")]
        score = next((n for n in usual if n in members and members[n].is_not_null().any()), None)
        if score is None:
            continue
        scored = members.filter(pl.col(score).is_not_null())
        searched = {
            name.removeprefix("param/"): scored[name].to_list()
            for name in scored.columns
            if name.startswith("param/") and scored[name].n_unique() > 1
        }
        stopped = scored["stopped"].is_not_null().to_list()
        figure = plots.search(searched, scored[score].to_list(), stopped, score, bool(scored["synthetic"].any()))
        images.append(_image(figure, f"{names.get(str(parent), 'search')}: {scored.height} trials"))
    return images


def _image(figure: Figure, alt: str) -> dict[str, str]:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130, bbox_inches="tight")
    return _inline(png.getvalue(), alt)


def _inline(png: bytes, alt: str) -> dict[str, str]:
    return {"alt": alt, "src": f"data:image/png;base64,{base64.b64encode(png).decode()}"}


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _template() -> Any:
    # Escaped: a run's name is text from outside.
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html.j2")
