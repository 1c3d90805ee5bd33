"""raylab's verbs in processes of their own that need not import anything: forked from one that has done so.

The libraries take some 14 s of processor time to import, which is more than most verbs in tests compute.
"""

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cgroup import Cgroup

ROOT = Path(__file__).parents[1]
MODULES = ("jobs.train", "jobs.tune", "jobs.resume", "jobs.common.run_tracking", "mlflow.pytorch", "torch._dynamo")


class Verb:
    """A verb that runs. What it says goes to the files `output` and `errors`, which may be the same."""

    def __init__(self, pid: int, status: int, output: Path, errors: Path) -> None:
        self.pid, self.status, self.output, self.errors = pid, status, output, errors
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, seconds: float) -> int:
        code = self._look(seconds)
        if code is None:
            raise subprocess.TimeoutExpired(f"verb {self.pid}", seconds, self.errors.read_text())
        return code

    def communicate(self, seconds: float) -> str:
        """What it has said, at its end."""
        self.wait(seconds)
        return self.output.read_text()

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _look(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self.status], [], [], seconds)[0]:
            self.returncode = int(os.read(self.status, 16))
            os.close(self.status)
        return self.returncode


class Verbs:
    """Forks verbs. They have `environment`, with which the libraries are imported, as Ray reads some of it then.

    `before` is called in the process before it imports anything: what it gives up is given up in every verb.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        modules: Sequence[str] = MODULES,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.socket, other = socket.socketpair()
        with other:
            words = [sys.executable, "-m", "tests.verbs", str(other.fileno()), *modules]
            self.server = subprocess.Popen(
                words,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[other.fileno()],
                preexec_fn=before,
            )

    def start(
        self, words: Sequence[object], environment: Mapping[str, str], output: Path, errors: Path | None = None
    ) -> Verb:
        """`python -m jobs.cli WORDS` as a session of its own, with exactly this environment."""
        errors = errors or output
        paths = {"output": str(output), "errors": str(errors)}
        message = {"words": [*map(str, words)], "environment": dict(environment)} | paths
        status, other = os.pipe()
        socket.send_fds(self.socket, [json.dumps(message).encode()], [other])
        os.close(other)
        pid = self.socket.recv(16)
        assert pid, "the process that forks verbs has ended: its error is above"
        return Verb(int(pid), status, output, errors)

    @contextlib.contextmanager
    def inside(self, cgroup: Cgroup) -> Iterator[None]:
        """Verbs that start here are in `cgroup`."""
        before = cgroup.find_own(self.server.pid)
        cgroup.take(self.server.pid)
        try:
            yield
        finally:
            (before / "cgroup.procs").write_text(str(self.server.pid))

    def stop(self) -> None:
        self.socket.close()
        self.server.wait(60)


def serve(channel: socket.socket) -> None:
    """Until the other side closes. For each request a process that waits for the verb and tells its exit code."""
    while True:
        message, (*descriptors,), _, _ = socket.recv_fds(channel, 1 << 20, 1)
        if not message:
            return
        (status,) = descriptors
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            verb = os.fork()
            if not verb:
                channel.close()
                os.close(status)
                run(**json.loads(message))
            channel.send(str(verb).encode())
            code = os.waitstatus_to_exitcode(os.waitpid(verb, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # whoever started it has been killed
                os.write(status, str(code).encode())
            os._exit(0)
        os.close(status)


def run(words: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """Be the verb, to its end."""
    from jobs import cli

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, output), (2, errors)):
        # only a terminal that can be read becomes that of the session, which is told when it is closed
        access = os.O_RDWR if Path(path).is_char_device() else os.O_WRONLY
        file = os.open(path, access | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the one before may have been another kind of file
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    code: Any = 1
    try:
        code = cli.main(words)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as Python itself
    os._exit(int(code))


if __name__ == "__main__":
    from jobs.common.session import ray_environment

    ray_environment()
    number, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background processes ignore it
    serve(socket.socket(fileno=int(number)))
    os._exit(0)  # to tear the libraries down takes seconds
