"""The runs of an experiment side by side."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import polars as pl

from raylab.errors import TrackingError
from tracking import runs

if TYPE_CHECKING:
    from mlflow.entities import Run

# The scores that a table has room for, the one that ranks first; greater is better. Other tasks: the first three
# that have an interval.
PRIMARY = {
    "ards": ("auroc", "auprc", "ventilated_pf/auroc"),
    "covidnet": ("macro_recall", "accuracy"),
    "surrogate": ("r2_min", "r2_mean"),
}
NO_INTERVAL = "no_interval."  # begins the tag of a split that has {why: [score, ...]} of scores without an interval
SPLITS = ("test", "val")  # the best known first
FAILED = ("FAILED", "KILLED")
CURVES = ("train/loss", "val/loss", *dict.fromkeys(f"val/{name}" for names in PRIMARY.values() for name in names))
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


def scores(row: Mapping[str, Any], split: str) -> list[str]:
    """The names, without the split, of a run's scores on a split: what has an interval (`_low`) or a reason to have
    none, and the primary."""
    usual = [n for n in PRIMARY.get(row["task"] or "", ()) if row.get(f"{split}/{n}") is not None]
    ends = (name.removeprefix(f"{split}/") for name, value in row.items() if value is not None)
    ranged = [n.removesuffix("_low") for n in ends if n.endswith("_low") and f"{split}/{n}" in row]
    return list(dict.fromkeys(usual + sorted({*ranged, *without_interval(row, split)})))


def without_interval(row: Mapping[str, Any], split: str) -> dict[str, str]:
    """{score: why it has no interval}, of the scores on a split that say so in the tag no_interval.SPLIT."""
    found = json.loads(row.get(f"tag/{NO_INTERVAL}{split}") or "{}")
    return {name: why for why, names in found.items() for name in names if row.get(f"{split}/{name}") is not None}


def primary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores to show for `ranked` rows of one task: those primary ones that a row has on its own split."""
    if not rows:
        return []
    known = list(dict.fromkeys(name for row in rows if row["split"] for name in scores(row, row["split"])))
    usual = PRIMARY.get(rows[0]["task"] or "")
    return known[:3] if usual is None else [name for name in usual if name in known]


def interval(row: Mapping[str, Any], score: str, reason: bool = False) -> str:
    """ "0.812 [0.790, 0.833]", with more digits where its ends would look the same; "0.812 (too few)" where there is no
    interval, with the whole `reason` where it is asked for; "0.812" where nothing is known, "" without the score."""
    value, low, high = row.get(score), row.get(f"{score}_low"), row.get(f"{score}_high")
    if value is None:
        return ""
    split, _, name = score.partition("/")
    if why := without_interval(row, split).get(name):
        return f"{value:.3f} ({why if reason else why.partition(':')[0]})"
    if low is None or high is None:
        return f"{value:.3f}"
    digits = next((d for d in (3, 4, 5) if f"{low:.{d}f}" != f"{high:.{d}f}"), 6)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ranked(frame: pl.DataFrame) -> pl.DataFrame:
    """Without the trials, which belong to their search: by task and data set, test before val, best first, failed last.

    Two columns more: `data`, the source and a piece of the hash, because two data sets may share a source; `split`,
    the best known that the run has scores on.
    """
    runs = frame.filter(pl.col("kind").fill_null("") != "trial")
    split, best = [], []
    for row in runs.iter_rows(named=True):
        found = next((s for s in SPLITS if scores(row, s)), None)
        split.append(found)
        best.append(row[f"{found}/{scores(row, found)[0]}"] if found else None)
    return (
        runs.with_columns(
            pl.Series("split", split, pl.String),
            pl.Series("_best", best, pl.Float64),
            pl.concat_str(
                pl.col("data_source").fill_null("data not named"),
                pl.col("data_hash").str.slice(0, 8),
                separator=" ",
                ignore_nulls=True,
            ).alias("data"),
            pl.col("status").is_in(FAILED).alias("_failed"),
        )
        .sort(
            ["task", "data", "synthetic", "_failed", "split", "_best", "name"],
            descending=[False, False, False, False, False, True, False],
            nulls_last=True,
        )
        .drop("_best", "_failed")
    )


def table(frame: pl.DataFrame) -> str:
    """`ranked` as aligned plain text, one block a task."""
    shown = ranked(frame)
    blocks = ["\n".join(_block(runs)) for runs in shown.partition_by("task", maintain_order=True)]
    if shown["split"].eq("val").any():
        blocks.append("* val: these scores were used to choose; expect lower ones on the test split")
    if trials := frame.height - shown.height:
        blocks.append(f"({trials} trials not shown)")
    return "\n\n".join(blocks)


def _block(runs: pl.DataFrame) -> Iterator[str]:
    rows = runs.to_dicts()
    shown = primary(rows)
    lines = [["run", "kind", "status", "split", *shown, "n", "seed", "run id"]]
    for row in rows:
        n = row.get(f"{row['split']}/n")
        lines.append(
            [
                row["name"],
                row["kind"] or "-",
                row["status"].lower(),
                {"val": "val*", None: "-"}.get(row["split"], row["split"]),
                *(_short(interval(row, f"{row['split']}/{score}")) or "-" for score in shown),
                "-" if n is None else f"{n:.0f}",
                row["seed"] or "-",
                row["run_id"][:8],
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    head, *text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    yield from (f"{rows[0]['task'] or 'no task named'}", head, "  ".join("-" * w for w in widths))
    before = None
    for row, line in zip(rows, text, strict=True):
        data = row["data"] + (" SYNTHETIC" if row["synthetic"] else "")
        if data != before:
            yield f"{data}:"
        before = data
        yield line


def _short(score: str) -> str:
    """ "0.812 [0.790, 0.833]" as "0.812 [.790,.833]": lines have an end."""
    return score.replace("[0.", "[.").replace(", 0.", ",.").replace(", ", ",")


def curves(
    uri: str, frame: pl.DataFrame, metrics: Sequence[str] = CURVES
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """{metric: {run label: (steps, values)}} of the runs in `frame`, thinned to what a plot can show.

    A step seen twice (repeated after a restart) keeps its last value. Training counts steps from 1: what was logged
    at 0 belongs to the whole run.
    """
    client = runs.client(uri)
    labelled = labels(frame)
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for metric in metrics:
        if metric not in frame:
            continue
        for run_id in frame.filter(pl.col(metric).is_not_null())["run_id"]:
            history = sorted(client.get_metric_history(run_id, metric), key=lambda m: (m.step, m.timestamp))
            points = list({m.step: m.value for m in history if m.step > 0}.items())
            if not points:
                continue
            every = -(-len(points) // CURVE_POINTS)
            kept = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
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
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    # MlflowClient would ask the server about the run again for every file.
    kept = get_artifact_repository(runs.client(uri).get_run(run_id).info.artifact_uri, tracking_uri=uri)
    with TemporaryDirectory() as scratch:
        return {
            item.path: Path(kept.download_artifacts(item.path, scratch)).read_bytes()
            for item in kept.list_artifacts(directory or None)
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
