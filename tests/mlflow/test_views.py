"""MLflow's page shows the views that raylab stores: the names in them are internal to the pinned version of MLflow."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import pytest

from scripts.browser import Browser, browser, find
from tracking import runs, server, views
from tracking.access import secret

PAGES = Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js"
PARAMS = ["optim.lr", "model.hidden", "data.class_fraction"]


@pytest.fixture(scope="module")
def search(direct: str) -> str:
    """A run and a search with three trials; returns the id of the search."""
    client = runs.client(direct)
    scores = {views.VAL_SCORE: "0.812 [0.760, 0.861] auroc", views.TEST_SCORE: "0.790 [0.731, 0.842] auroc"}
    tags = {"raylab.task": "ards", "raylab.kind": "train", views.DATA: "synthetic 511f887e", views.WORKERS: "1:2"}
    first = runs.start_run(direct, "views", "first", tags=tags | scores)
    client.log_param(first, "model.name", "gru")
    for name in ("train/loss", "val/auroc", "test/auroc", "system/cpu_utilization_percentage"):
        for step in (1, 2):
            client.log_metric(first, name, 0.5 / step, step=step)
    parent = runs.start_run(direct, "views", "search", tags=tags | {"raylab.kind": "tune"})
    for number, lr in enumerate((0.1, 0.02, 0.003)):
        trial = runs.start_run(direct, "views", f"search-{number:03d}", parent, tags | {"raylab.kind": "trial"})
        for name, value in zip(PARAMS, (lr, 16 * (number + 1), 1 / (number + 1)), strict=True):
            client.log_param(trial, name, value)
        client.log_metric(trial, "best/val/auroc", 0.6 + number / 10, step=3)
    return parent


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    if find() is None:
        pytest.skip("no Chromium or Chrome is installed")
    with browser() as opened:
        yield opened


def test_mlflow_reads_every_name_of_a_view() -> None:
    source = "".join(path.read_text() for path in PAGES.glob("*.js"))
    assert f'"{views.TAG}"' in source and '"viewStateShareKey"' in source
    for view in (views.runs_view(), views.search_view("0" * 32, PARAMS, "best/val/auroc")):
        for name in {*view, *view["compareRunSections"][0], *(n for chart in view["compareRunCharts"] for n in chart)}:
            assert re.search(rf"\b{name}\b", source), name


def test_a_view_is_stored_once_and_a_missing_experiment_has_none(direct: str, search: str) -> None:
    client = runs.client(direct)
    experiment = client.get_experiment_by_name("views")
    assert json.loads(experiment.tags[views.TAG + views.RUNS]) == views.runs_view()  # since it was created
    client.delete_experiment_tag(experiment.experiment_id, views.TAG + views.RUNS)
    assert views.publish_runs(client, "views") == views.page(experiment.experiment_id)
    tags = client.get_experiment(experiment.experiment_id).tags
    assert json.loads(tags[views.TAG + views.RUNS]) == views.runs_view()
    assert views.publish_runs(client, "no such experiment") == ""


def test_the_link_opens_the_runs_with_their_columns_and_then_the_charts(
    home: Path, served: server.Server, search: str, tab: Browser
) -> None:
    client = runs.client(served.uri)
    token, port = secret.read(secret.path(home)), urlsplit(served.uri).port or 0
    tab.open(secret.link(token, port, views.publish_runs(client, "views")), 1700, 900)
    tab.wait_for("document.body?.innerText.includes('0.812 [0.760, 0.861] auroc')")
    shown = tab.text()
    assert "0.790 [0.731, 0.842] auroc" in shown and "synthetic 511f887e" in shown and "1:2" in shown
    headers = [name for kind, name in views.COLUMNS if name in shown]
    assert headers == [name for _, name in views.COLUMNS] and "Error loading" not in shown
    assert "Model training" in shown and "Prompts" not in shown

    charts = "&compareRunsMode=CHART"
    tab.open(f"http://{secret.host_name(token)}:{port}/{views.publish_runs(client, 'views')}{charts}", 1700, 900)
    tab.wait_for("document.body?.innerText.includes('train/loss')")
    shown = tab.text()
    assert "System metrics" in shown and "cpu_utilization_percentage" not in shown  # its section is closed

    tab.open("about:blank")
    page = views.publish_search(client, search, PARAMS, "best/val/auroc")
    tab.open(f"http://{secret.host_name(token)}:{port}/{page}", 1700, 900)
    tab.wait_for("document.body?.innerText.includes('Parallel Coordinates')")
    tab.wait_for("document.querySelectorAll('.js-plotly-plot').length > 0")
    shown = tab.text()
    assert "optim.lr vs. model.hidden" in shown and "3 matching runs" in shown
