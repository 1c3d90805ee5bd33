"""What MLflow's page of an experiment shows: the columns of its runs, and the charts of its searches.

MLflow keeps such a view in a tag of the experiment, `mlflow.sharedViewState.KEY`, and `page` is the address that opens
it. These are the names that MLflow's own "Share" button uses; they are not documented, so tests/mlflow/test_views.py
checks them against the pinned version.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracking.access import login

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "mlflow.sharedViewState."
RUNS = "raylab"  # key of the view of all runs; that of a search is its run id
VAL_SCORE, TEST_SCORE, DATA, WORKERS = "raylab.val_score", "raylab.test_score", "raylab.data", "raylab.workers"
# Scores are tags, because MLflow has no column for a score with its interval. Widths are in pixels.
COLUMNS: dict[tuple[str, str], int] = {
    ("tags", VAL_SCORE): 175,
    ("tags", TEST_SCORE): 175,
    ("tags", "raylab.task"): 75,
    ("params", "model.name"): 95,
    ("tags", DATA): 140,
    ("tags", "raylab.kind"): 80,
    ("tags", WORKERS): 95,
}
OPEN = ("val", "train")  # sections of charts that are open; MLflow names them by the metrics' first words
CLOSED = ("best/val", "test", "all", "folds", "Model metrics", "System metrics")
TRIALS = 500  # more lines than that are not readable


def column(kind: str, name: str) -> str:
    """The page's name of the column of a tag, a parameter or a metric."""
    return f"{kind}.`{name}`"


def runs_view() -> dict[str, Any]:
    """The view of all runs, newest first."""
    columns = [column(*one) for one in COLUMNS]
    return {
        "selectedColumns": columns,
        "columnOrder": columns,  # without it the widths are not used
        "columnWidths": dict(zip(columns, COLUMNS.values(), strict=True)),
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "compareRunCharts": [],
        "compareRunSections": _sections(*((name, name in OPEN) for name in OPEN + CLOSED)),
        "isAccordionReordered": True,
    }


def search_view(run_id: str, params: Sequence[str], metric: str) -> dict[str, Any]:
    """The trials of the search `run_id`, best first: parallel coordinates of all `params` and `metric`, and a contour
    plot of `metric` over each pair of the first three."""
    pairs = [(x, y) for k, x in enumerate(params[:3]) for y in params[k + 1 : 3]]
    charts = [
        _chart("PARALLEL", selectedParams=list(params), selectedMetrics=[metric], showAllRuns=True),
        *(
            _chart("CONTOUR", xaxis=_axis("PARAM", x), yaxis=_axis("PARAM", y), zaxis=_axis("METRIC", metric))
            for x, y in pairs
        ),
    ]
    columns = [column("metrics", metric), *(column("params", name) for name in params)]
    closed = ((name, False) for name in (*OPEN, *CLOSED))
    return {
        "selectedColumns": columns,
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": column("metrics", metric),
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [chart | {"uuid": f"search-{k}"} for k, chart in enumerate(charts)],
        "compareRunSections": _sections(("search", True), *closed),
        "isAccordionReordered": True,
    }


def _chart(kind: str, **more: Any) -> dict[str, Any]:
    fixed = {"type": kind, "runsCountToCompare": TRIALS, "metricSectionId": "search", "deleted": False}
    return {**fixed, "isGenerated": False, **more}


def _axis(kind: str, key: str) -> dict[str, str]:
    return {"type": kind, "key": key}


def _sections(*shown: tuple[str, bool]) -> list[dict[str, Any]]:
    """Sections of charts as (name, whether it is open). MLflow puts the chart of any other metric where it belongs."""
    return [
        {"uuid": name, "name": name, "display": is_open, "isReordered": True, "deleted": False, "isGenerated": False}
        for name, is_open in shown
    ]


def page(experiment_id: str, key: str = RUNS) -> str:
    """The part of an address that opens a view of an experiment at any MLflow server, from `#` on; a search opens at
    its charts."""
    charts = "" if key == RUNS else "&compareRunsMode=CHART"
    # without it the first visit shows the menus for language models
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={key}{charts}"


def publish_runs(client: "MlflowClient", experiment: str) -> str:
    """Store the view of all runs with an experiment, and return its `page`; "" if there is no such experiment yet."""
    with login.explained(client.tracking_uri):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return ""
        _publish(client, str(found.experiment_id), RUNS, runs_view())
    return page(str(found.experiment_id))


def publish_search(client: "MlflowClient", run_id: str, params: Sequence[str], metric: str) -> str:
    """Store the view of the trials of a search with its experiment, and return its `page`."""
    with login.explained(client.tracking_uri):
        experiment_id = str(client.get_run(run_id).info.experiment_id)
        _publish(client, experiment_id, run_id, search_view(run_id, params, metric))
    return page(experiment_id, run_id)


def new_tags() -> dict[str, str]:
    """The tags of a new experiment."""
    # Without the first, MLflow takes it for one of language models and shows traces first.
    return {"mlflow.experimentKind": "custom_model_development", TAG + RUNS: json.dumps(runs_view())}


def _publish(client: "MlflowClient", experiment_id: str, key: str, view: dict[str, Any]) -> None:
    text = json.dumps(view)
    if client.get_experiment(experiment_id).tags.get(TAG + key) != text:
        client.set_experiment_tag(experiment_id, TAG + key, text)
