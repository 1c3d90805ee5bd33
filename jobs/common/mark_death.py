"""What a run's witness does when the process of the run has died: it records the end that the process could not."""

import sys
from pathlib import Path

from jobs.common import home, run_tracking
from jobs.common.console import tell_error
from jobs.common.environment import verb_environment
from jobs.common.run_end import Ending, record_end
from raylab.errors import OutOfMemoryError, RunError
from raylab.witness import NOTE, read_death


@verb_environment()
def mark_death(directory: Path) -> None:
    """Mark the run in `directory`, unless it has been resumed by now.

    A run on a Slurm cluster stays RUNNING, except out of memory: the next head resumes those.
    """
    try:
        with home.lock_run(directory):
            error = read_death(directory / NOTE, directory.name)
            record = home.note(directory)
            is_memory = isinstance(error, OutOfMemoryError)
            if error is None or record.status != "RUNNING" or (record.cluster is not None and not is_memory):
                return
            for trial in (path.parent for path in sorted((directory / "trials").glob("*/run.json"))):
                if not (trial / "end.json").is_file():
                    record_end(trial, Ending("KILLED", "the search has ended"))
            end = Ending("FAILED" if is_memory else "KILLED", f"{error.what}: {error.why}", error.do)
            record_end(directory, end)
    except RunError:  # it has been resumed
        return
    tell_error(error)
    run_tracking.forward_now(directory)


if __name__ == "__main__":
    mark_death(Path(sys.argv[1]))
