"""A second Unix user, for tests of what other people on the machine can do. Root only; skipped elsewhere."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

NOBODY = 65534
# Python itself may lie where only root can read: what is needed is imported before root is given up for good.
BECOME = f"""
import encodings.idna, http.client, http.server, json, os, pathlib, socket, sys, threading, time, urllib.error
import urllib.parse, urllib.request
os.chdir("/")
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
"""


@contextlib.contextmanager
def as_other_user(code: str, *words: object) -> Iterator[Any]:
    """A process of the other user that runs `code` (standard library only, nothing on disk of ours), with pipes for
    text; it is ended at the end."""
    if os.getuid() != 0:
        pytest.skip("needs root, to start a process of a second user")
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", BECOME + code, *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run_as_other_user(code: str, *words: object, seconds: float = 120) -> str:
    """The output of `code`, run to its end by the other user."""
    with as_other_user(code, *words) as process:
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, err
        return str(out)
