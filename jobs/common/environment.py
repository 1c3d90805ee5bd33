"""The process settings under which every verb runs, from the command line or from Python."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.common.home import home

CHATTY = {
    **dict.fromkeys(("mlflow", "mlflow.pyfunc", "alembic", "torch.export"), logging.ERROR),
    "mlflow.store.db.utils": logging.CRITICAL,  # whose errors, with pages of SQL, are raised as well
}


@contextmanager
def verb_environment() -> Iterator[None]:
    """Make new files private to their owner, silence libraries, and keep torch's compiled code in the raylab home.

    The umask is a setting of the process and is restored when the verb ends.
    """
    for name, level in CHATTY.items():
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm in a notebook; no bar is shown
    # torch loads compiled code from here; its default is /tmp/torchinductor_USER, which any user may create first
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "compiled"))
    before = os.umask(0o077)  # this may be a shared machine
    try:
        yield
    finally:
        os.umask(before)
