"""Another user of this machine, as whom tests try what must not work."""

import os
import re
import subprocess
from dataclasses import dataclass

import pytest

NOBODY = 65534


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


def skip_unless_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as a second user")
