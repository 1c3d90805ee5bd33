"""A process that sees another one die: of those that the kernel kills, nobody else can say why.

Only the standard library is imported, so that it starts in milliseconds and needs little memory.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from raylab import memory
from raylab.errors import OutOfMemoryError, RunError
from raylab.files import write_json

NOTE = "death.json"  # in the directory of the run or trial whose process is watched
LOOK_SECONDS = 1.0  # between two looks at the memory of the process
CLOCK_SECONDS = 5.0  # that the kernel's log may differ from this clock
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # those that end a verb (jobs/common/interrupts.py)


@contextlib.contextmanager
def witness(note: Path, then: Sequence[str] = ()) -> Iterator[None]:
    """Be watched while the context is open. If this process dies, `note` says how (`read_death`), and the command
    `then` is run."""
    reading, writing = os.pipe()
    kills = memory.count_kills(memory.list_cgroups(os.getpid()))
    words = [sys.executable, "-I", "-S", __file__, str(reading), str(os.getpid()), str(kills), str(note), *then]
    watching = subprocess.Popen(
        words, pass_fds=[reading], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    os.close(reading)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):  # it was killed itself
            os.write(writing, b".")
        os.close(writing)
        watching.wait()


def read_death(note: Path, run: str, seconds: float = 0.0) -> RunError | None:
    """Return the error of a process whose death a witness has noted within `seconds`, and remove the note."""
    deadline = time.monotonic() + seconds
    while not note.is_file():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)
    content = json.loads(note.read_text())
    note.unlink()
    who = f"process {content['pid']} on {content['host']}"
    if content["killed_for_memory"]:
        why = f"the kernel ended it: {memory.describe(content['used'], content['limit'])}"
        return OutOfMemoryError(f"{who} ran out of memory", why, memory.advise(run))
    why = f"it was killed, or crashed; {memory.describe(content['used'], content['limit'])}"
    return RunError(f"{who} ended without a word", why, f"raylab resume {run}")


def watch(end: int, pid: int, kills: int, note: Path, then: Sequence[str]) -> None:
    """Until `end`, a pipe, closes: with a word if all is well, without one if the process `pid` has died. `kills`: for
    lack of memory in its cgroup so far."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    began, used = time.monotonic(), 0
    cgroups = memory.list_cgroups(os.getpid())  # which are its own, until it is moved
    while True:
        here = memory.list_cgroups(pid)
        if here and here != cgroups:
            cgroups, kills = here, memory.count_kills(here)
        used = max(used, memory.read_resident_bytes(pid))
        if select.select([end], [], [], LOOK_SECONDS)[0]:
            break
    if os.read(end, 1):
        return
    used_at_end = memory.read_kernel_log(pid, began - CLOCK_SECONDS)
    killed = used_at_end > 0 or memory.count_kills(cgroups) > kills
    content: dict[str, Any] = {"pid": pid, "host": os.uname().nodename, "killed_for_memory": killed}
    content |= {"used": used_at_end or used, "limit": memory.read_limit_bytes(cgroups)}
    note.parent.mkdir(exist_ok=True)
    write_json(note, content)
    if then:
        os.execv(then[0], list(then))


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
