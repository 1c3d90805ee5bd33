"""The runs of an experiment as one HTML file: no script, no reference to anything outside.

A model has one colour in every plot, and its evaluations on other data have that of the model. Plots are SVG in the
page's colours; those that a run's evaluation has drawn are smaller copies of its PNG files.
"""

import base64
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from raylab.files import write_text
from raylab.score import NetBenefit, Score, fold_reasons
from tracking import compare, plots, svg
from tracking.importance import parameter_importance
from tracking.provenance import Provenance, keep_short, render

log = logging.getLogger(__name__)

FACTS = (
    *("run_id", "status", "started", "seconds", "seed"),
    *("data_source", "data_hash", "split_hash", "cohort", "code_revision"),
)
HIDDEN_TAGS = (  # shown elsewhere
    *("tag/parent", "tag/parent_name", "tag/best_run", "tag/split"),
    *("tag/val_score", "tag/test_score", "tag/data"),
)
TOP_TRIALS = 5
OVERLAID = 8  # more models in one plot cannot be told apart
PAGE_BYTES = 1_900_000  # that plots of single runs may fill: the page should stay small enough for an e-mail
PICTURE_COLOURS = 128

Row = dict[str, Any]


@dataclass(frozen=True)
class Extras:
    """What a run's artifacts add to its row: `plots` {path: PNG}, the content of attrition.json, the recipe.

    `data`: {"attrition": [{"step", ...}], "label": {...}, "counts": {split: {...}}, "warnings": [...]}, each optional.
    `details` {split: content of evaluation-SPLIT.json}: {"calibration": [plots.CalibrationBin], "decision":
    [NetBenefit], "cohorts": {name: {"n", score: Score}}}, each optional.
    """

    plots: Mapping[str, bytes] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Pictures:
    """PNG files for the page, reduced to few colours, as long as there is `room`; `left_out` counts the others."""

    def __init__(self, room: int) -> None:
        self.room, self.left_out = room, 0

    def take(self, pngs: Mapping[str, bytes]) -> list[dict[str, Any]]:
        found = []
        for name in sorted(pngs):
            try:
                png = shrink(pngs[name])
            except UnidentifiedImageError:
                log.warning("left out of the report: %s is not a picture", name)
                continue
            picture = _inline(png, Path(name).stem.replace("_", " ").replace("-", " ", 1))
            if len(picture["src"]) > self.room:
                self.left_out += 1
                continue
            self.room -= len(picture["src"])
            found.append(picture)
        return found

    def take_all(self, pngs: Mapping[str, bytes]) -> Row:
        """The plots of a run: `more_plots` are those of the val split, if there are others."""
        of_val = {name: png for name, png in pngs.items() if Path(name).name.startswith("val-")}
        others = {name: png for name, png in pngs.items() if name not in of_val}
        return {"plots": self.take(others or of_val), "more_plots": self.take(of_val if others else {})}


def shrink(png: bytes) -> bytes:
    """The picture with at most PICTURE_COLOURS colours, if that is smaller; the recipes of its runs are in the page."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(png))
    reduced = picture.convert("RGB").quantize(PICTURE_COLOURS)
    reduced.save(file, format="png", optimize=True, pnginfo=keep_short(picture))
    return min(png, file.getvalue(), key=len)


def report(
    uri: str,
    experiment: str,
    path: Path,
    frame: pl.DataFrame | None = None,
    differences: Sequence[compare.Differences] = (),
) -> Path:
    """Write the report of an experiment, or of its runs in `frame` from compare.collect, with paired differences
    between runs; returns `path`."""
    frame = compare.collect(uri, experiment) if frame is None else frame
    shown = compare.ranked(frame)
    extras = {run_id: _extras(uri, run_id) for run_id in shown["run_id"]}
    curves = compare.curves(uri, shown)
    return write_report(path, frame, curves, extras, f"raylab report: {experiment}", differences)


def write_report(
    path: Path,
    frame: pl.DataFrame,
    curves: Mapping[str, Mapping[str, plots.Curve]],
    extras: Mapping[str, Extras],
    title: str,
    differences: Sequence[compare.Differences] = (),
) -> Path:
    """Write the page with mode 0600: `frame` of compare.collect, `curves` {metric: {run: curve}}, `extras` by run."""
    shown = compare.ranked(frame)
    names = compare.labels(shown)
    styles = choose_styles(shown)
    runs = [
        _run(row, names, extras.get(row["run_id"], Extras()), styles[row["run_id"]])
        for row in shown.iter_rows(named=True)
    ]
    trials = frame.filter(pl.col("kind") == "trial")
    content = {
        "title": title,
        "provenance": render(list_provenance(runs)),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": runs,
        "trials": trials.height,
        "synthetic": sum(run["synthetic"] is True for run in runs),
        "unknown_source": sum(run["synthetic"] is None for run in runs),
        "differences": [vars(one) | {"scores": _texts(one.scores)} for one in differences],
        "groups": [_group(list(members), curves, trials) for _, members in groupby(runs, key=_data_set)],
        "external": external_validation(runs),
        "left_out": 0,
    }
    pictures = Pictures(PAGE_BYTES - len(_template().render(content)))
    for run in runs:
        run |= pictures.take_all(extras.get(run["run_id"], Extras()).plots)
    write_text(path, _template().render(content | {"left_out": pictures.left_out}))
    return path


def choose_styles(shown: pl.DataFrame) -> dict[str, plots.Style]:
    """{run id: style}: a model and its evaluations on other data share one."""
    models: dict[str, plots.Style] = {}
    for row in shown.iter_rows(named=True):
        models.setdefault(_model(row), plots.style(len(models)))
    return {row["run_id"]: models[_model(row)] for row in shown.iter_rows(named=True)}


def _model(row: Row) -> str:
    """The id of the run that has trained the model of a row."""
    parent = row.get("tag/parent")
    return str(parent) if row["kind"] == "evaluate" and parent else str(row["run_id"])


def external_validation(runs: Sequence[Row]) -> list[Row]:
    """For each model that was scored on other data too: its rows, those on its own data first."""
    by_model: dict[str, list[Row]] = {}
    for run in runs:
        if run["split"]:
            by_model.setdefault(_model(run), []).append(run)
    found = []
    for rows in by_model.values():
        rows.sort(key=lambda run: run["kind"] == "evaluate")  # stable
        if len({run["data"] for run in rows}) > 1:
            found.append(rows)
    return [_external(list(members)) for _, members in groupby(sorted(found, key=_task), key=_task)]


def _task(rows: Sequence[Row]) -> str:
    return rows[0]["task"] or ""


def _external(models: list[list[Row]]) -> Row:
    """The scores of models of one task on their own and on other data, as a table and a plot of the first score."""
    every = [run for rows in models for run in rows]
    scores = compare.primary(every)
    plot = _forest(every, scores[0], f"{_task(every)} on its own and on other data", name_data=True) if scores else None
    rows = [
        run | {"cells": [_cell(run, name, []) for name in scores], "first": run is of[0]} for of in models for run in of
    ]
    return {"task": _task(every), "scores": scores, "rows": rows, "plot": plot}


def list_provenance(rows: Sequence[Row]) -> list[Provenance]:
    """The provenance of runs by their tags in MLflow, and `recipe` as text. That of a parent is whole if it is among
    them."""
    found: dict[str, Provenance] = {}
    for row in rows:
        own = {f"raylab.{name}": row[name] for name in compare.FIXED if isinstance(row.get(name), str)}
        tags = own | {f"raylab.{n.removeprefix('tag/')}": v for n, v in row.items() if n.startswith("tag/") and v}
        more = {"synthetic": row["synthetic"], "recipe": json.loads(row["recipe"]) if row["recipe"] else None}
        found[row["run_id"]] = Provenance.of_tags(row["name"], row["run_id"], tags, **more)

    def with_parent(row: Row) -> Provenance:
        own = found[row["run_id"]]
        if not (parent := row.get("tag/parent")):
            return own
        known = [one for one in rows if one["run_id"] == parent]
        named = Provenance(name=row.get("tag/parent_name") or parent, run_id=parent)
        return own.model_copy(update={"parent": with_parent(known[0]) if known else named})

    return [with_parent(row) for row in rows]


def _texts(scores: Mapping[str, Score]) -> dict[str, tuple[str, str]]:
    """Each difference and its interval, or the reason why there is none."""
    texts = ((name, score.text(sign="+").partition(" ")) for name, score in scores.items())
    return {name: (value, rest) for name, (value, _, rest) in texts}


def _extras(uri: str, run_id: str) -> Extras:
    found = compare.artifacts(uri, run_id, suffix=".json")
    data, recipe = (
        compare.parse_json(found.get(name, b"{}"), f"{name} of MLflow run {run_id}")
        for name in ("attrition.json", "recipe.json")
    )
    details = {
        name.removeprefix("evaluation-").removesuffix(".json"): compare.parse_json(
            text, f"{name} of MLflow run {run_id}"
        )
        for name, text in found.items()
        if name.startswith("evaluation-")
    }
    return Extras(
        compare.artifacts(uri, run_id, "plots", ".png"),
        data if isinstance(data, dict) else {"attrition": data},
        json.dumps(recipe, indent=2) if recipe else "",
        details,
    )


def _run(row: Row, names: Mapping[str, str], extras: Extras, style: plots.Style) -> Row:
    facts = {name.replace("_", " "): row[name] for name in FACTS if row[name] is not None}
    if row["seconds"] is not None:
        facts["seconds"] = f"{row['seconds']:.0f}"
    facts["started"] = row["started"].strftime("%Y-%m-%d %H:%M:%S UTC")
    tags = {n: v for n, v in row.items() if n.startswith("tag/") and v and n not in HIDDEN_TAGS}
    tags = {n: v for n, v in tags.items() if not n.startswith(f"tag/{compare.NO_INTERVAL}")}
    facts |= {n.removeprefix("tag/").replace("_", " "): v for n, v in tags.items()}
    splits = compare.list_splits(row)
    scores = {
        (name, split): score
        for split in splits
        for name in compare.scores(row, split)
        if (score := compare.find_score(row, split, name)) is not None
    }
    for split in splits:
        of_cohorts = _cohort_scores(extras.details.get(compare.name_split(split), {}))
        scores |= {(name, split): score for name, score in of_cohorts}
    texts, reasons = fold_reasons(scores)
    parent = row.get("tag/parent")
    return row | {
        "style": style,
        "model": row.get("tag/parent_name") or names[row["run_id"]]
        if row["kind"] == "evaluate"
        else names[row["run_id"]],
        "details": extras.details,
        "label": names[row["run_id"]],
        "parent": {"name": row.get("tag/parent_name") or parent, "id": parent, "here": parent in names}
        if parent
        else None,
        "n": _count(row.get(f"{row['split']}/n")),
        "facts": facts,
        "split_text": compare.format_split(row).rstrip("*"),
        "used_to_choose": row["split"] is not None and compare.was_used_to_choose(row, row["split"]),
        "splits": [
            compare.name_split(split) + (f", n = {n}" if (n := _count(row.get(f"{split}/n"))) else "")
            for split in splits
        ],
        "scores": {
            name: [texts.get((name, split), "") for split in splits]
            for name in dict.fromkeys(name for name, _ in scores)
        },
        "reasons": reasons,
        "data_facts": extras.data,
        "recipe": extras.recipe,
        "plots": [],
        "more_plots": [],
    }


def _cohort_scores(details: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    """(COHORT/SCORE, score) of the scores of other cohorts than the run's own."""
    for cohort, content in details.get("cohorts", {}).items():
        for name, score in content.items():
            if isinstance(score, dict):
                yield f"{cohort}/{name}", Score.model_validate(score)


def _data_set(run: Row) -> tuple[Any, ...]:
    return run["task"], run["data"], run["synthetic"]


def _group(runs: list[Row], curves: Mapping[str, Mapping[str, plots.Curve]], trials: pl.DataFrame) -> Row:
    """The runs of one task on one data set."""
    first = runs[0]
    primary = compare.primary(runs)
    known = dict.fromkeys(name for run in runs if run["split"] for name in compare.scores(run, run["split"]))
    wanted = first["secondary"] or ()
    shown = primary + [n for n in known if any(n == w or (w.endswith("/") and n.startswith(w)) for w in wanted)]
    params = [n for n in first if n.startswith("param/") and len({run[n] for run in runs}) > 1]
    for run in runs:
        own = [n for n in params if run[n] is not None and (run["kind"] == "tune" or "/search." not in n)]
        run["params"] = {n.removeprefix("param/"): run[n] for n in own}
        run["cells"] = [_cell(run, name, runs if name in primary else []) for name in shown]
    group = {
        "task": first["task"] or "no task named",
        "data": first["data"],
        "synthetic": first["synthetic"],
        "runs": runs,
        "scores": shown,
        "splits": len({run["split_hash"] for run in runs}),
        "scored": any(run["split"] for run in runs),  # a sweep, for example, is not
        "cohorts": any(run["cohort"] for run in runs),
        "data_facts": {"attrition": [], "counts": {}, "label": {}}
        | next((r["data_facts"] for r in runs if r["data_facts"]), {}),
        "warnings": list(dict.fromkeys(text for run in runs for text in run["data_facts"].get("warnings", ()))),
        "searches": [_search(run, trials.filter(pl.col("parent_run_id") == run["run_id"])) for run in runs],
    }
    group["forest"] = _forest(runs, primary[0], f"{group['task']} on {group['data']}") if primary else None
    group["curves"] = _learning(group, curves)
    group["side_by_side"], group["not_overlaid"] = _side_by_side(group)
    group["searches"] = [found for found in group["searches"] if found]
    return group


def _cell(run: Row, name: str, rivals: Sequence[Row]) -> dict[str, Any]:
    """The value, its interval, and whether it is the best on its split; a single run is never marked as the best."""
    score = f"{run['split']}/{name}"
    value, _, interval = compare.interval(run, score).partition(" ")
    same = [r for r in rivals if (r["split"], r["cohort"]) == (run["split"], run["cohort"])]
    others = {r[score] for r in same if r.get(score) is not None}
    return {"value": value, "interval": interval, "best": len(others) > 1 and run[score] == max(others)}


def _forest(members: Sequence[Row], name: str, what: str, name_data: bool = False) -> dict[str, Any] | None:
    """The score `name` of runs of one task, with the run or, with `name_data`, the model and the data of each line."""
    runs = [run for run in members if run["split"] and run.get(f"{run['split']}/{name}") is not None]
    if len(runs) < 2:
        return None  # the table suffices
    ends: list[list[Any]] = [[r.get(f"{r['split']}/{name}{end}") for r in runs] for end in compare.ENDS.values()]
    values, lows, highs = ends
    labels = [f"{r['model']} on {r['data']}" if name_data else r["label"] for r in runs]
    splits, colours = ["val" if r["used_to_choose"] else "test" for r in runs], [r["style"][0] for r in runs]
    title, synthetic = f"{name}: {what}", any(r["synthetic"] for r in runs)
    return _image(plots.forest(labels, values, lows, highs, name, title, synthetic, splits, colours), title)


def _side_by_side(group: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Calibration and decision curves of the group's models on one split, and the number of models left out of them."""
    runs = [
        run
        for run in group["runs"]
        if run["split"] and "calibration" in run["details"].get(compare.name_split(run["split"]), {})
    ]
    if not runs:
        return [], 0
    split = compare.name_split(runs[0]["split"])
    cohort = runs[0]["cohort"]
    same = [run for run in runs if (compare.name_split(run["split"]), run["cohort"]) == (split, cohort)]
    shown, styles = same[:OVERLAID], {run["label"]: run["style"] for run in same}
    synthetic, where = bool(group["synthetic"]), f"{split} split"
    calibration = {
        run["label"]: [plots.CalibrationBin(**one) for one in run["details"][split]["calibration"]] for run in shown
    }
    decision = {
        run["label"]: [NetBenefit.model_validate(one) for one in curve]
        for run in shown
        if (curve := run["details"][split].get("decision"))
    }
    figures = {f"Calibration, {where}": plots.calibrations(calibration, f"Calibration, {where}", synthetic, styles)}
    if decision:
        figures[f"Decision curves, {where}"] = plots.decisions(decision, f"Decision curves, {where}", synthetic, styles)
    return [_image(figure, f"{alt}: {group['task']} on {group['data']}") for alt, figure in figures.items()], len(
        same
    ) - len(shown)


def _learning(group: Mapping[str, Any], curves: Mapping[str, Mapping[str, plots.Curve]]) -> list[dict[str, Any]]:
    images = []
    looks = {run["label"]: run["style"] for run in group["runs"]}
    for metric, lines in curves.items():
        same: dict[tuple[tuple[float, ...], ...], list[str]] = {}  # runs with identical curves share a line
        for run in group["runs"]:
            if run["label"] in lines:
                steps, values = lines[run["label"]]
                same.setdefault((tuple(steps), tuple(values)), []).append(run["label"])
        if same:
            ours = {" = ".join(labels): (curve[0], curve[1]) for curve, labels in same.items()}
            styles = {" = ".join(labels): looks[labels[0]] for labels in same.values()}
            figure = plots.learning(ours, metric, metric, bool(group["synthetic"]), styles)
            images.append(_image(figure, f"{metric}: {group['task']} on {group['data']}"))
    return images


def _search(run: Row, trials: pl.DataFrame) -> Row | None:
    """The trials' validation score over the parameters that differ between them, and the best trials."""
    usual = [f"{split}/{name}" for split in ("best/val", "val") for name in run["primary"] or ()]
    score = next((n for n in (*usual, "val/loss") if n in trials and trials[n].is_not_null().any()), None)
    if score is None:
        return None
    scored = trials.filter(pl.col(score).is_not_null()).sort(score, "name", descending=[score != "val/loss", False])
    params = [n for n in scored.columns if n.startswith("param/") and scored[n].n_unique() > 1]
    searched = {name.removeprefix("param/"): scored[name].to_list() for name in params}
    stopped = [(how or "").startswith("stopped") for how in scored["stopped"]]
    synthetic, lower = bool(run["synthetic"]), score == "val/loss"
    figure = plots.search(searched, scored[score].to_list(), stopped, score, synthetic)
    begun = scored.sort("started", "name")
    ended = [(how or "").startswith("stopped") for how in begun["stopped"]]
    images = [
        _image(plots.history(begun[score].to_list(), ended, score, lower, synthetic), f"History of {run['label']}")
    ]
    if shares := parameter_importance(searched, scored[score].to_list()):
        images.append(_image(plots.importance(shares, score, synthetic), f"Importance of parameters in {run['label']}"))
    return {
        "images": images,
        "label": run["label"],
        "run_id": run["run_id"],
        "score": score,
        "params": list(searched),
        "top": [
            {
                "name": trial["name"] + (" (kept)" if trial["run_id"] == run.get("tag/best_run") else ""),
                "score": compare.interval(trial, score),
                "params": [_number(trial[name]) for name in params],
                "end": trial["stopped"] or trial["status"].lower(),
            }
            for trial in scored.head(TOP_TRIALS).iter_rows(named=True)
        ],
        "scored": scored.height,
        "unscored": trials.height - scored.height,
        "image": _image(figure, f"{run['label']}: {scored.height} trials"),
    }


def _image(figure: Figure, alt: str) -> dict[str, Any]:
    return {"alt": alt, "svg": svg.draw(figure, alt)}


def _inline(png: bytes, alt: str) -> dict[str, Any]:
    return {"alt": alt, "src": f"data:image/png;base64,{base64.b64encode(png).decode()}"}


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _number(value: str | None) -> str:
    """A parameter's text, with four digits if it is a number."""
    try:
        return f"{float(value or ''):.4g}"
    except ValueError:
        return value or "–"


def _template() -> Any:
    # autoescape, because a run's name is untrusted text
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")
