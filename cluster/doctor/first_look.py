"""The first lines of the doctor's part on a node: whether the Python there can run it.

    python -m cluster.doctor.first_look MODULE [OPTION...] FACTS

runs MODULE, as `python -m` would. A node's Python may be another one, or lack packages, so this file needs only the
standard library of Python 3.6 or newer.
"""

import json
import platform
import runpy
import socket
import sys
import time
from typing import Any

MARK = "raylab-doctor "  # prefix of our lines in the step's output
# Characters of a line, twice as many with escapes: srun mixes lines of 1024 bytes or more with those of other nodes
PIECE = 400


def answer(**facts: object) -> str:
    """Output lines of the node's part, which `join` puts together again."""
    text = json.dumps(facts)
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    notes = [
        {"host": socket.gethostname(), "left": len(pieces) - at - 1, "text": text} for at, text in enumerate(pieces)
    ]
    return "\n".join(MARK + json.dumps(note) for note in notes)


def join(line: str, begun: "dict[str, str]") -> "tuple[str, dict[str, Any] | None]":
    """The host of an output line, and its facts, None before their last line. `begun`: the lines so far, by host."""
    note = json.loads(line[len(MARK) :])
    host = note["host"]
    begun[host] = begun.get(host, "") + note["text"]
    return host, None if note["left"] else json.loads(begun.pop(host))


def main() -> None:
    module, facts = sys.argv[1], json.loads(sys.argv[-1])
    del sys.argv[0]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except (ImportError, SyntaxError) as error:
        print(answer(time=time.time()))
        print(answer(findings=[explain(error, facts["versions"]["python"])]), flush=True)


def explain(error: Exception, wanted: str) -> "dict[str, object]":
    """The finding on a Python that cannot run the doctor: another version than `wanted`, or one without packages."""
    here = platform.python_version()
    cause = f"{type(error).__name__}: {error}"
    if here != wanted:
        what = f"{sys.executable} is Python {here} here and {wanted} on the login node ({cause})"
        do = "load the same Python in `setup` of the site on all nodes, or set `python` to one on shared storage"
    else:
        what = f"{sys.executable} cannot run raylab here ({cause})"
        do = "put the environment on shared storage, or correct `python`, `setup` or `image` of the site"
    return {"what": what, "ok": False, "do": do}


if __name__ == "__main__":
    main()
