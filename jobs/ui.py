"""raylab ui: serve the MLflow pages on a loopback port, accessible only to their owner, until Ctrl+C."""

import argparse
import os
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from jobs import cli
from jobs.common import home
from jobs.common.console import say
from jobs.common.run_tracking import experiment_name
from tracking import runs, server, views
from tracking.access import identity, login, secret

EXAMPLE = "raylab ui --port 5000"
LINK = "open it in Chrome, Edge or Firefox within 15 minutes; it works once; `raylab ui --detach` prints a new link"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="loopback port (default: 5000)")
    parser.add_argument("--detach", action="store_true", help="return and leave the server running")
    parser.add_argument("--stop", action="store_true", help="stop the server of this home")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if uri := login.tracking_uri():
        address = runs.address(home.home())
        runs.check(address)
        there = runs.reach(address)
        page = views.publish_runs(runs.client(address), experiment_name())
        if identity.is_local(there) and (file := identity.token_file(there)):  # a home's server, behind a relay
            link = secret.link(secret.read(file), urlsplit(there).port or 80, page)
            say(f"MLflow: {link}\n{LINK}")
            return {"uri": there, "link": link}
        link = f"{uri.rstrip('/')}/{page}"
        say(f"MLFLOW_TRACKING_URI is set: open {link}")
        return {"uri": uri, "link": link}
    if args.stop:
        running = server.running(home.home())
        if running is not None:
            running.stop()
        say("stopped" if running else "this home has no running server")
        return {"stopped": running is not None}
    serving = server.serve(home.home(), args.port)
    port = urlsplit(serving.uri).port or 80
    page = views.publish_runs(runs.client(serving.uri), experiment_name())
    link = secret.link(secret.create(home.home()), port, page)
    if not args.quiet:
        say(f"MLflow: {link}\n{LINK}")
        say(f"from another computer, first run: ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}")
        if "JUPYTER_SERVER_URL" in os.environ:  # a terminal of JupyterLab, whose browser may be anywhere
            say("in this JupyterLab without that: MLflow in its launcher, see docs/notebook.md")
    if args.detach:
        return {"uri": serving.uri, "pid": serving.pid, "link": link}
    if not args.quiet:
        say("press Ctrl+C to stop the server" if serving.is_new else "the server was already running, and stays after "
            "Ctrl+C; to stop it: raylab ui --stop")  # fmt: skip
    try:
        # The server may belong to another cluster on this node and end with it; the head then restarts this verb
        while server.running(home.home()) is not None:
            time.sleep(1)
    finally:
        if serving.is_new:
            serving.stop()
    return {"uri": serving.uri}


if __name__ == "__main__":
    sys.exit(cli.main(["ui", *sys.argv[1:]]))
