"""What every verb runs in, from the command line or called from Python."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.common.home import home

CHATTY = ("mlflow", "alembic", "torch.export")


@contextmanager
def verb_environment() -> Iterator[None]:
    """Files are for their owner alone, libraries are quiet, and torch keeps compiled code in the raylab home.

    The mode of new files is the process's: it is as before when the verb ends.
    """
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch loads compiled code from here; its own choice is /tmp/torchinductor_USER, which anybody may make first
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "compiled"))
    before = os.umask(0o077)  # this may be a shared machine
    try:
        yield
    finally:
        os.umask(before)
