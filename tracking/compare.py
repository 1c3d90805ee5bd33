"""The runs of an experiment side by side."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import polars as pl

from raylab.documents import to_plain
from raylab.errors import TrackingError
from raylab.score import Score
from raylab.score import without_interval as without
from tracking import runs
from tracking.access import login

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)

NO_INTERVAL = "no_interval."  # prefix of the tag with {why: [score, ...]} of a split's scores without an interval
# Prefixes of a split's metrics, the preferred split first: the test rows of a run's data, all rows of data that it
# never saw, the test rows of every fold of a benchmark, the val rows at the kept epoch, and at the last one.
SPLITS = ("test", "all", "folds", "best/val", "val")
READ_ONCE = ("test", "all")  # their scores are worth most if they are read once
ENDS = {"value": "", "low": "_low", "high": "_high"}
FAILED = ("FAILED", "KILLED")
CURVES = ("train/loss", "train/epoch_loss", "val/loss")  # in addition to those of the primary scores
CURVE_POINTS = 250  # a plot cannot show more
# The columns that every frame has, in this order.
FIXED: dict[str, pl.DataType | type[pl.DataType]] = {
    "name": pl.String,
    "kind": pl.String,
    "task": pl.String,
    "data_source": pl.String,
    "cohort": pl.String,
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
    "primary": pl.List(pl.String),
    "secondary": pl.List(pl.String),
}


@dataclass(frozen=True)
class Highlights:
    """The scores of a task that tables show; greater is better, and the first primary score ranks. Reports also show
    the secondary ones; `sensitivity/` means the sensitivity of every class."""

    primary: tuple[str, ...]
    secondary: tuple[str, ...] = ()


@dataclass(frozen=True)
class Differences:
    """The scores of one run minus those of another, on the same rows of a split."""

    run: str
    minus: str
    """name of the other run"""
    split: str
    n: int
    patients: int
    unit: str
    """what `patients` counts"""
    bootstraps: int
    scores: Mapping[str, Score]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = to_plain(vars(self))
        return found


def render_differences(found: Sequence[Differences]) -> str:
    """The differences as plain text, a block for each run, with the reasons for missing intervals below it."""
    first = found[0]
    lines = [
        f"paired differences, {first.split} split: {first.n:,} rows of {first.patients:,} {first.unit}s",
        f"(95% CI, {first.bootstraps:,} bootstrap samples of {first.unit}s)",
    ]
    for one in found:
        lines.append(f"{one.run} minus {one.minus}:")
        lines += [f"  {name:<30} {score.shorten().text(sign='+')}" for name, score in one.scores.items()]
        lines += [f"  {why}" for why in dict.fromkeys(score.why for score in one.scores.values()) if why]
    return "\n".join(lines)


def collect(
    uri: str,
    experiment: str,
    highlights: Mapping[str, Highlights] = MappingProxyType({}),
    only: Collection[str] | None = None,
) -> pl.DataFrame:
    """One row per run, trials included; with `only`, one per run of these ids and per trial of these.

    Of several evaluations of one model on a data set and split, only the newest has one.

    Columns: those of FIXED; `tag/...` for other raylab.* tags; `param/...` for parameters that differ between runs;
    metrics under their own names (last value), without system metrics. `highlights`: by task; for other tasks the first
    three scores that have an interval are shown.
    """
    client = runs.client(uri)
    with login.explained(uri):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = sorted(e.name for e in client.search_experiments())
            raise TrackingError(
                f"no experiment '{experiment}' at {uri}", f"known: {', '.join(known)}", "use one of these"
            )
        rows = _drop_old_evaluations([_row(run, highlights) for run in _search(uri, found.experiment_id)])
    if only is not None:
        rows = [
            row for row in rows if row["run_id"] in only or (row["kind"] == "trial" and row["parent_run_id"] in only)
        ]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in FIXED))
    params = [n for n in names if n.startswith("param/") and len({row.get(n) for row in rows}) > 1]
    tags = [n for n in names if n.startswith("tag/")]
    metrics = sorted(n for n in names if not n.startswith(("param/", "tag/")))
    schema: dict[str, pl.DataType | type[pl.DataType]] = (
        FIXED | dict.fromkeys(tags + params, pl.String) | dict.fromkeys(metrics, pl.Float64)
    )
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)


def scores(row: Mapping[str, Any], split: str) -> list[str]:
    """The names, without the split, of a run's scores on a split: the primary ones, and those that have an interval
    (`_low`) or a reason for having none."""
    usual = [n for n in row["primary"] or () if row.get(f"{split}/{n}") is not None]
    ends = (name.removeprefix(f"{split}/") for name, value in row.items() if value is not None)
    ranged = [n.removesuffix("_low") for n in ends if n.endswith("_low") and f"{split}/{n}" in row]
    return list(dict.fromkeys(usual + sorted({*ranged, *without_interval(row, split)})))


def without_interval(row: Mapping[str, Any], split: str) -> dict[str, str]:
    """{score: why it has no interval}, of the scores on a split, from the tag no_interval.SPLIT."""
    tag = f"{NO_INTERVAL}{split}"
    found = parse_json(row.get(f"tag/{tag}") or "{}", f"tag {tag} of run {row.get('name')}")
    found = found if isinstance(found, dict) else {}
    return {name: why for why, names in found.items() for name in names if row.get(f"{split}/{name}") is not None}


def parse_json(text: str | bytes, where: str) -> Any:
    """What `text` holds; {}, with a warning that names `where`, if it is damaged."""
    try:
        return json.loads(text)
    except ValueError as error:
        log.warning("skipped: %s could not be read as JSON: %s", where, error)
        return {}


def list_splits(row: Mapping[str, Any]) -> list[str]:
    """The SPLITS on which a run has scores; of the val split only the scores of the kept epoch, if it has any."""
    known = [split for split in SPLITS if scores(row, split)]
    return [split for split in known if split != "val" or "best/val" not in known]


def name_split(split: str) -> str:
    """The name of the split, without the prefix of its metrics."""
    return split.removeprefix("best/")


def was_used_to_choose(row: Mapping[str, Any], split: str) -> bool:
    """Whether the model was chosen by its scores on this split. The val split of other data chose nothing."""
    return name_split(split) == "val" and row["kind"] != "evaluate"


def count_test_reads(row: Mapping[str, Any]) -> int:
    """How often the test rows that a run was scored on have been read for it; 0 if that was not recorded."""
    return int(row.get("tag/test_reads") or 0)


def primary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores to show for `ranked` rows of one task: the primary ones that a row has on its own split."""
    if not rows:
        return []
    known = list(dict.fromkeys(name for row in rows if row["split"] for name in scores(row, row["split"])))
    usual = rows[0]["primary"]
    return known[:3] if usual is None else [name for name in usual if name in known]


def find_score(row: Mapping[str, Any], split: str, name: str) -> Score | None:
    """A score of a run on a split, with its interval or the reason why it has none, if they are known."""
    value, low, high = (row.get(f"{split}/{name}{tail}") for tail in ENDS.values())
    if value is None:
        return None
    if why := without_interval(row, split).get(name):
        return without(value, why)
    return Score(value=value, low=low, high=high)


def interval(row: Mapping[str, Any], score: str) -> str:
    """ "0.812 [0.790, 0.833]", with more digits if the ends would look the same; "0.812 (too few)" if there is no
    interval; "0.812" if neither is known, "" without the score."""
    split = next((split for split in SPLITS if score.startswith(f"{split}/")), "")
    found = find_score(row, split, score.removeprefix(f"{split}/"))
    return "" if found is None else str(found.shorten())


def add_split_columns(frame: pl.DataFrame) -> pl.DataFrame:
    """`collect` with two more columns: `data`, the source and part of the hash, because data sets may share a source
    (the newest one that a run names, because names have changed); `split`, the first of SPLITS on which the run has
    scores."""
    known = [next(iter(list_splits(row)), None) for row in frame.iter_rows(named=True)]
    return frame.with_columns(
        pl.Series("split", known, pl.String),
        pl.concat_str(
            _newest_name().fill_null("data not named"),
            pl.col("data_hash").str.slice(0, 8),
            separator=" ",
            ignore_nulls=True,
        ).alias("data"),
    )


def _newest_name() -> pl.Expr:
    """The source that the newest run on the data of a row names."""
    newest = pl.col("data_source").sort_by("started").drop_nulls().last().over("task", "data_hash")
    return pl.when(pl.col("data_hash").fill_null("") == "").then(pl.col("data_source")).otherwise(newest)


def ranked(frame: pl.DataFrame) -> pl.DataFrame:
    """`add_split_columns` by task and data set, test before val, best first, failed last.

    Omits trials, which belong to their search, and a benchmark's own run, whose scores are in its child runs.
    """
    above = frame.filter(pl.col("kind") == "benchmark")["parent_run_id"].drop_nulls()
    rows = add_split_columns(
        frame.filter((pl.col("kind").fill_null("") != "trial") & ~pl.col("run_id").is_in(above.implode()))
    )
    best = [
        row[f"{row['split']}/{scores(row, row['split'])[0]}"] if row["split"] else None
        for row in rows.iter_rows(named=True)
    ]
    return (
        rows.with_columns(
            pl.Series("_best", best, pl.Float64),
            pl.col("split").replace_strict({s: k for k, s in enumerate(SPLITS)}, default=None).alias("_split"),
            pl.col("status").is_in(FAILED).alias("_failed"),
        )
        .sort(
            ["task", "data", "synthetic", "_failed", "_split", "_best", "name"],
            descending=[False, False, False, False, False, True, False],
            nulls_last=True,
        )
        .drop("_best", "_split", "_failed")
    )


def to_json_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows of `add_split_columns` for JSON: `split` by its name, and `n`, `test_reads` and the `scores` on it, each
    {"value", "low", "high"}, with "why" if the reason for a missing interval is known."""
    rows = add_split_columns(frame)
    found = []
    for row, told in zip(rows.iter_rows(named=True), json.loads(rows.write_json()), strict=True):
        split = row["split"]
        del told["primary"], told["secondary"]
        told["split"] = split and name_split(split)
        told["n"] = row.get(f"{split}/n")
        told["test_reads"] = count_test_reads(row)
        whys = without_interval(row, split)
        told["scores"] = {
            name: {end: row.get(f"{split}/{name}{tail}") for end, tail in ENDS.items()}
            | ({"why": whys[name]} if name in whys else {})
            for name in scores(row, split)
        }
        found.append(told)
    return found


def table(frame: pl.DataFrame, columns: int | None = None) -> str:
    """`ranked` as aligned plain text, one block per task; where a terminal of so many columns is too narrow for it, the
    scores are below their runs."""
    shown = ranked(frame)
    blocks = ["\n".join(_block(runs, columns)) for runs in shown.partition_by("task", maintain_order=True)]
    if any(row["split"] and was_used_to_choose(row, row["split"]) for row in shown.iter_rows(named=True)):
        blocks.append("* val: these scores were used to choose the model; expect lower ones on the test split")
    if trials := frame.filter(pl.col("kind") == "trial").height:
        blocks.append(f"({trials} trials not shown)")
    return "\n\n".join(blocks)


def _block(runs: pl.DataFrame, columns: int | None) -> Iterator[str]:
    rows = runs.to_dicts()
    shown = primary(rows)
    of_cohorts = any(row["cohort"] for row in rows)
    of_splits = any(row["split"] for row in rows)  # a sweep, for example, has no scores
    are_billed = any(row.get("tag/cost") for row in rows)
    names = ["run", "kind", "status", *(["split"] if of_splits else []), *(["cohort"] if of_cohorts else [])]
    lines = [[*names, *shown, *(["n"] if of_splits else []), *(["cost"] if are_billed else []), "seed", "run id"]]
    for row in rows:
        n = row.get(f"{row['split']}/n")
        lines.append(
            [
                row["name"],
                row["kind"] or "-",
                row["status"].lower(),
                *([format_split(row)] if of_splits else []),
                *([row["cohort"] or "-"] if of_cohorts else []),
                *(_short(interval(row, f"{row['split']}/{score}")) or "-" for score in shown),
                *(["-" if n is None else f"{n:.0f}"] if of_splits else []),
                *([row.get("tag/cost") or "-"] if are_billed else []),
                row["seed"] or "-",
                row["run_id"][:8],
            ]
        )
    if columns is not None and sum(_widths(lines)) + 2 * (len(lines[0]) - 1) > columns:
        first = len(names)
        below = [
            [f"\n    {name:<20} {cell}" for name, cell in zip(shown, line[first:], strict=False)] for line in lines
        ]
        lines = [line[:first] + line[first + len(shown) :] for line in lines]
        tails = ["", *map("".join, below[1:])]
    else:
        tails = [""] * len(lines)
    widths = _widths(lines)
    head, *text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() + tail
        for line, tail in zip(lines, tails, strict=True)
    ]
    yield from (f"{rows[0]['task'] or 'no task named'}", head, "  ".join("-" * w for w in widths))
    before = None
    for row, line in zip(rows, text, strict=True):
        data = row["data"] + (" SYNTHETIC" if row["synthetic"] else "")
        if data != before:
            yield f"{data}:"
        before = data
        yield line


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def format_split(row: Mapping[str, Any]) -> str:
    """The split of a row, `val*` if it was used to choose the model, with the number of reads if there are several."""
    split = row["split"]
    if split is None:
        return "-"
    text = name_split(split) + ("*" if was_used_to_choose(row, split) else "")
    reads = count_test_reads(row)
    return f"{text} ({reads} reads)" if split in READ_ONCE and reads > 1 else text


def _short(score: str) -> str:
    """ "0.812 [0.790, 0.833]" as "0.812 [.790,.833]", to keep lines short."""
    return score.replace("[0.", "[.").replace(", 0.", ",.").replace(", ", ",")


def curves(uri: str, frame: pl.DataFrame) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """{metric: {run label: (steps, values)}} of the losses and primary scores of the runs in `frame`, thinned for
    plotting.

    A step that was repeated after a restart keeps its last value. Training counts steps from 1; values at step 0 belong
    to the whole run. An evaluation has no curve.
    """
    client = runs.client(uri)
    labelled = labels(frame)
    frame = frame.filter(pl.col("kind").fill_null("") != "evaluate")
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    shown = (f"val/{name}" for names in frame["primary"].drop_nulls() for name in names)
    for metric in dict.fromkeys((*CURVES, *shown)):
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
    """{run id: name}, made unique with part of the id if two runs share a name."""
    twice = set(frame.filter(pl.col("name").is_duplicated())["name"])
    return {
        run_id: f"{name} ({run_id[:6]})" if name in twice else name
        for run_id, name in frame.select("run_id", "name").iter_rows()
    }


def artifacts(uri: str, run_id: str, directory: str = "", suffix: str = "") -> dict[str, bytes]:
    """{path: content} of the run's artifact files directly in `directory` whose names end with `suffix`."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    # MlflowClient would request the run from the server again for every file.
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


def _drop_old_evaluations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without evaluations replaced by a newer one of the same model, data and split. A failed evaluation does
    not replace one with scores."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (bool(list_splits(row)), row["started"])):
        if row["kind"] == "evaluate":
            split = row.get("tag/split") or next(iter(list_splits(row)), None)
            newest[row.get("tag/parent"), row["data_hash"], row["cohort"], split] = row
    kept = {row["run_id"] for row in newest.values()}
    return [row for row in rows if row["kind"] != "evaluate" or row["run_id"] in kept]


def _row(run: "Run", highlights: Mapping[str, Highlights]) -> dict[str, Any]:
    tags = {k.removeprefix("raylab."): v for k, v in run.data.tags.items() if k.startswith("raylab.")}
    end = run.info.end_time
    row: dict[str, Any] = {name: tags.pop(name, None) for name in FIXED}
    row |= {f"tag/{name}": value for name, value in tags.items()}
    row |= {f"param/{name}": value for name, value in run.data.params.items()}
    row |= {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
    known = highlights.get(row["task"] or "")
    return row | {
        "primary": None if known is None else known.primary,
        "secondary": None if known is None else known.secondary,
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "synthetic": {"true": True, "false": False}.get((row["synthetic"] or "").lower()),
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        # unknown where the clock was set back meanwhile
        "seconds": (end - run.info.start_time) / 1000 if end and end >= run.info.start_time else None,
        "parent_run_id": run.data.tags.get("mlflow.parentRunId"),
    }
