"""Waiting in tests: on a condition, with a deadline."""

import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float, what: str, describe: Callable[[], str] = str) -> Any:
    """The first true value of `condition`. After `seconds` in vain the test fails, with what `describe` says."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s for {what}\n{describe()}".rstrip())
