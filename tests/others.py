"""Another user of this machine, as whom tests try what must not work."""

import ctypes
import os
import re
import subprocess
from dataclasses import dataclass

import pytest

NOBODY = 65534
DROP_FROM_BOUNDING_SET = 24  # of Linux's prctl.h
DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER = 1, 2, 3  # of its capability.h


@dataclass(frozen=True)
class Outcome:
    """How a shell command of the other user went. `denied`: how often the system has refused it something."""

    code: int
    output: str

    @property
    def denied(self) -> int:
        return len(re.findall("[Pp]ermission denied|not permitted", self.output))


def as_other_user(command: str, seconds: float = 30) -> Outcome:
    """Run a shell command as the user nobody; the test is skipped where we are not root."""
    skip_unless_root()
    done = subprocess.run(
        ["sh", "-c", command],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    return Outcome(done.returncode, done.stdout)


def give_up_override() -> None:
    """Be refused by the modes and owners of files, even as root, from the next program on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER):
        libc.prctl(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)


def skip_unless_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as a second user")
