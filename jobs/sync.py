"""raylab sync: send records that are waiting on disk to MLflow, also how runs ended whose process was killed. It is
safe to repeat."""

import argparse
import sys
import time
from typing import Any

from jobs import cli
from jobs.common import home, run_tracking
from jobs.common.console import say
from raylab import files
from raylab.errors import RaylabError
from raylab.storage import explain_storage_error
from tracking import forwarder

EXAMPLE = "raylab sync"


FOLLOW_SECONDS = 15.0
ENDS = ("FINISHED", "FAILED", "KILLED")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help=f"repeat every {FOLLOW_SECONDS:.0f} s until interrupted")


def main(args: argparse.Namespace) -> dict[str, Any]:
    while args.follow:
        once(quiet=True)
        time.sleep(FOLLOW_SECONDS)
    return once(args.quiet)


def once(quiet: bool) -> dict[str, Any]:
    """Send all waiting records and models, and mark the runs whose process was killed; the result counts what remains,
    with the errors."""
    home.remove_leftovers()
    models, errors = 0, {}  # models first, because logging one may add records
    for directory, run in (*home.records(), *home.records("[!.]*/trials/*")):
        owner = directory if run.number is None else directory.parents[1]
        lock = owner / "lock"
        has_ended = run.status in ENDS
        if has_ended and run.model_logged is not False:
            continue
        try:
            is_unlocked = files.is_unlocked(lock)
            with files.locked(lock, wait=False) as mine:
                if not mine:
                    continue  # a process works on it
                # on a Slurm cluster the next head resumes what is RUNNING
                if not has_ended and is_unlocked and home.note(owner).cluster is None:
                    run_tracking.mark_ended(directory)
                if run.model_logged is False and run_tracking.log_model(directory, run.input_shape):
                    models += 1
        except RaylabError as error:
            errors[str(directory)] = str(error)
        except OSError as error:
            errors[str(directory)] = str(explain_storage_error(error) or error)
    done = forwarder.sync(home.home(), lambda outbox: home.is_open(outbox.parent))
    errors |= done["errors"]
    if not quiet:
        say(f"{done['sent']} records and {models} models sent, {done['unsent']} waiting, {done['rejected']} rejected")
        for place, text in errors.items():
            say(f"  {place}: {text}")
    return {**done, "errors": errors, "models": models, "exit_code": 1 if done["unsent"] or errors else 0}


if __name__ == "__main__":
    sys.exit(cli.main(["sync", *sys.argv[1:]]))
