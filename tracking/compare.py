"""The runs of an experiment side by side."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import polars as pl

from raylab.errors import TrackingError
from tracking import runs

if TYPE_CHECKING:
    from mlflow.entities import Run

CURVES = ("train/loss", "val/loss", "val/auroc", "val/auprc", "val/macro_recall")
CURVE_POINTS = 400  # more cannot be seen in a plot
# The columns that every frame has, in this order; all text but the three noted.
FIXED: dict[str, pl.DataType | type[pl.DataType]] = {
    "name": pl.String,
    "kind": pl.String,
    "task": pl.String,
    "data_source": pl.String,
    "synthetic": pl.Boolean,
    "status": pl.String,
    "started": pl.Datetime("ms", "UTC"),
    "seconds": pl.Float64,
    "seed": pl.String,
    "data_hash": pl.String,
    "split_hash": pl.String,
    "code_revision": pl.String,
    "stopped": pl.String,
    "parent_run_id": pl.String,
    "run_id": pl.String,
}


def collect(uri: str, experiment: str) -> pl.DataFrame:
    """One row a run, trials included.

    Columns: those of FIXED; `tag/...` for other raylab.* tags; `param/...` for parameters that are
    not the same in all runs; metrics under their own names (last value), system metrics left out.
    """
    client = runs.client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = sorted(e.name for e in client.search_experiments())
        raise TrackingError(f"no experiment '{experiment}' at {uri}", f"known: {', '.join(known)}", "name one of these")
    rows = [_row(run) for run in _search(uri, found.experiment_id)]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in FIXED))
    params = [n for n in names if n.startswith("param/") and len({row.get(n) for row in rows}) > 1]
    tags = [n for n in names if n.startswith("tag/")]
    metrics = sorted(n for n in names if not n.startswith(("param/", "tag/")))
    schema: dict[str, pl.DataType | type[pl.DataType]] = (
        FIXED | dict.fromkeys(tags + params, pl.String) | dict.fromkeys(metrics, pl.Float64)
    )
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)


def scores(frame: pl.DataFrame) -> list[str]:
    """The scores to compare by, best known first: those of the test split if any run has one, else of val.

    A score is a metric with an interval (`_low`, `_high`) in some run, or a well-known name.
    """
    for split in ("test", "val"):
        usual = [f"{split}/{name}" for name in ("auroc", "auprc", "macro_recall")]
        ranged = [c.removesuffix("_low") for c in frame.columns if c.startswith(f"{split}/") and c.endswith("_low")]
        present = [n for n in dict.fromkeys(usual + sorted(ranged)) if n in frame and frame[n].is_not_null().any()]
        if present:
            return present
    return []


def interval(row: dict[str, Any], score: str) -> str:
    """ "0.812 [0.790, 0.833]", without the bracket where there is no interval, "" without the score."""
    value, low, high = row.get(score), row.get(f"{score}_low"), row.get(f"{score}_high")
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def ranked(frame: pl.DataFrame) -> pl.DataFrame:
    """Grouped by task and data, best first; without the trials, which belong to their search."""
    order = scores(frame)[:1]
    return frame.filter(pl.col("kind").fill_null("") != "trial").sort(
        ["task", "data_source", "synthetic", *order, "name"],
        descending=[False, False, False, *([True] * len(order)), False],
        nulls_last=True,
    )


def table(frame: pl.DataFrame) -> str:
    """`ranked` as aligned plain text."""
    shown = scores(frame)
    head = ["task", "data", "run", "kind", "status", *shown, "seed", "run id"]
    lines = [head]
    for row in ranked(frame).iter_rows(named=True):
        data = (row["data_source"] or "-") + (" SYNTHETIC" if row["synthetic"] else "")
        cells = [interval(row, score) or "-" for score in shown]
        lines.append(
            [
                row["task"] or "-",
                data,
                row["name"],
                row["kind"] or "-",
                row["status"],
                *cells,
                row["seed"] or "-",
                row["run_id"][:8],
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    trials = frame.filter(pl.col("kind") == "trial").height
    return text + (f"\n({trials} trials not shown)" if trials else "")


def curves(
    uri: str, frame: pl.DataFrame, metrics: Sequence[str] = CURVES
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """{metric: {run label: (steps, values)}} of the runs in `frame`, thinned to what a plot can show.

    A step seen twice (repeated after a restart) keeps its last value.
    """
    client = runs.client(uri)
    labelled = labels(frame)
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for metric in metrics:
        if metric not in frame:
            continue
        for run_id in frame.filter(pl.col(metric).is_not_null())["run_id"]:
            history = sorted(client.get_metric_history(run_id, metric), key=lambda m: (m.step, m.timestamp))
            points = list({m.step: m.value for m in history}.items())
            every = -(-len(points) // CURVE_POINTS)
            kept = points[::every] + ([points[-1]] if points and (len(points) - 1) % every else [])
            found.setdefault(metric, {})[labelled[run_id]] = ([s for s, _ in kept], [v for _, v in kept])
    return found


def labels(frame: pl.DataFrame) -> dict[str, str]:
    """run id -> name, made unique with a piece of the id where two runs share a name."""
    twice = set(frame.filter(pl.col("name").is_duplicated())["name"])
    return {
        run_id: f"{name} ({run_id[:6]})" if name in twice else name
        for run_id, name in frame.select("run_id", "name").iter_rows()
    }


def artifacts(uri: str, run_id: str, directory: str = "", suffix: str = "") -> dict[str, bytes]:
    """{path: content} of the run's artifact files directly in `directory` whose names end so."""
    client = runs.client(uri)
    with TemporaryDirectory() as scratch:
        return {
            item.path: Path(client.download_artifacts(run_id, item.path, scratch)).read_bytes()
            for item in client.list_artifacts(run_id, directory or None)
            if not item.is_dir and item.path.endswith(suffix)
        }


def _search(uri: str, experiment_id: str) -> Iterator["Run"]:
    token = None
    while True:
        page = runs.client(uri).search_runs([experiment_id], max_results=500, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _row(run: "Run") -> dict[str, Any]:
    tags = {k.removeprefix("raylab."): v for k, v in run.data.tags.items() if k.startswith("raylab.")}
    end = run.info.end_time
    row: dict[str, Any] = {name: tags.pop(name, None) for name in FIXED}
    row |= {f"tag/{name}": value for name, value in tags.items()}
    row |= {f"param/{name}": value for name, value in run.data.params.items()}
    row |= {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
    return row | {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "synthetic": {"true": True, "false": False}.get((row["synthetic"] or "").lower()),
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        "seconds": (end - run.info.start_time) / 1000 if end else None,
        "parent_run_id": run.data.tags.get("mlflow.parentRunId"),
    }
