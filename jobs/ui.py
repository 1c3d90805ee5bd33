"""raylab ui: the MLflow pages on a loopback port, for their owner, until Ctrl-C."""

import argparse
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from jobs import cli
from jobs.common import home
from jobs.common.progress import say
from tracking import runs, server
from tracking.access import identity, login, secret

EXAMPLE = "raylab ui --port 5000"
LINK = "open it in Chrome, Edge or Firefox: once, within 15 minutes; `raylab ui --detach` prints a new link"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--detach", action="store_true", help="leave it running and return")
    parser.add_argument("--stop", action="store_true", help="end the server that serves this home")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if uri := login.tracking_uri():
        there = runs.reach(runs.address(home.home()))
        if identity.is_local(there) and (file := identity.token_file(there)):  # a home's server, behind a relay
            link = secret.link(secret.read(file), urlsplit(there).port or 80)
            say(f"MLflow: {link}\n{LINK}")
            return {"uri": there, "link": link}
        say(f"MLFLOW_TRACKING_URI is set: open {uri}")
        return {"uri": uri}
    if args.stop:
        running = server.running(home.home())
        if running is not None:
            running.stop()
        say("stopped" if running else "no server of ours is running")
        return {"stopped": running is not None}
    serving = server.serve(home.home(), args.port)
    port = urlsplit(serving.uri).port or 80
    link = secret.link(secret.create(home.home()), port)
    if not args.quiet:
        say(f"MLflow: {link}\n{LINK}")
        say(f"from another computer, first: ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}")
    if args.detach:
        return {"uri": serving.uri, "pid": serving.pid, "link": link}
    if not args.quiet:
        say("Ctrl-C ends it")
    try:
        # It may be of another cluster on this node, and end with it: the agent of our head then starts us again
        while server.running(home.home()) is not None:
            time.sleep(1)
    finally:
        serving.stop()
    return {"uri": serving.uri}


if __name__ == "__main__":
    sys.exit(cli.main(["ui", *sys.argv[1:]]))
