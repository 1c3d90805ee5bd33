"""raylab ui: the MLflow pages on a loopback port, until Ctrl-C."""

import argparse
import signal
import sys
from typing import Any

from jobs import cli, home
from jobs.progress import say
from tracking import login, server

EXAMPLE = "raylab ui --port 5000"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--detach", action="store_true", help="leave it running and return")
    parser.add_argument("--stop", action="store_true", help="end the server that serves this home")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if uri := login.tracking_uri():
        say(f"MLFLOW_TRACKING_URI is set: open {uri}")
        return {"uri": uri}
    if args.stop:
        running = server.running(home.home())
        if running is not None:
            running.stop()
        say("stopped" if running else "no server of ours is running")
        return {"stopped": running is not None}
    serving = server.serve(home.home(), args.port)
    say(f"MLflow: {serving.uri}   (from elsewhere: ssh -N -L {args.port}:{serving.uri.removeprefix('http://')} HOST)")
    if args.detach:
        return {"uri": serving.uri, "pid": serving.pid}
    say("Ctrl-C ends it")
    try:
        signal.pause()
    finally:
        serving.stop()
    return {"uri": serving.uri}


if __name__ == "__main__":
    sys.exit(cli.main(["ui", *sys.argv[1:]]))
