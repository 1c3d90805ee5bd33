"""Draw docs/mlflow.png and docs/report.png from the runs of a home, for example after `make demo`. Run it in the
repository's root, with a headless Chromium installed:

RAYLAB_HOME=HOME .venv/bin/python -m scripts.screenshots EXPERIMENT
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from jobs.common import home
from jobs.compare import compare
from scripts.browser import Browser, browser
from tracking import runs, server, views
from tracking.access import secret
from tracking.report import shrink

DOCS = Path("docs")
WIDTH = 1500  # CSS pixels


def draw_mlflow(tab: Browser, experiment: str) -> None:
    """The table of the runs, as `raylab ui` opens it."""
    serving = server.serve(home.home(), port=0)
    try:
        page = views.publish_runs(runs.client(serving.uri), experiment)
        if not page:
            sys.exit(f"there is no experiment '{experiment}' in {home.home()}")
        token = secret.read(secret.path(home.home()))
        tab.open(secret.link(token, urlsplit(serving.uri).port or 80, page), WIDTH, 620)
        tab.wait_for(
            "document.querySelectorAll('.ag-row').length > 1 && document.body.innerText.includes('auroc')", 120
        )
        save(tab, DOCS / "mlflow.png")
    finally:
        if serving.is_new:
            serving.stop()


def draw_report(tab: Browser, experiment: str) -> None:
    """The upper part of the report, down to its calibration and decision curves."""
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.html"
        compare(experiment=experiment, out=report, quiet=True)
        tab.open(report.as_uri(), WIDTH, 1000)
        bottom = tab.wait_for("document.querySelector('.two')?.getBoundingClientRect().bottom")
        tab.open(report.as_uri(), WIDTH, min(2200, int(bottom) + 20))
        tab.wait_for("document.readyState == 'complete'")
        save(tab, DOCS / "report.png")


def save(tab: Browser, path: Path) -> None:
    tab.run("new Promise(done => setTimeout(done, 1000))")  # for what is drawn after the last request
    tab.screenshot(path)
    path.write_bytes(shrink(path.read_bytes()))
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with browser() as opened:
        draw_mlflow(opened, sys.argv[1])
        draw_report(opened, sys.argv[1])
