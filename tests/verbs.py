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
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cgroup import Cgroup

ROOT = Path(__file__).parents[1]
MODULES = (
    "jobs.train", "jobs.tune", "jobs.resume", "jobs.common.run_tracking", "jobs.common.predictors", "mlflow.pytorch",
    "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store",
    "scipy.stats", "sklearn.metrics",
)  # fmt: skip


# It starts in milliseconds. Verbs that import little are the installed command, so that this is seen to work
COMMAND = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:2] in (["concepts"], ["runs"]):
    os.execv({installed!r}, sys.argv)
message = {{"words": sys.argv[1:], "environment": dict(os.environ), "directory": os.getcwd()}}
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({socket!r})
socket.send_fds(server, [json.dumps(message).encode()], [0, 1, 2])
sys.exit(int(server.recv(16)))
"""


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
        pid, status = self._fork(words, environment, {"output": str(output), "errors": str(errors)})
        return Verb(pid, status, output, errors)

    def run_in(self, directory: str, words: Sequence[str], environment: Mapping[str, str], streams: list[int]) -> int:
        """The exit code of the verb in this directory, with these standard input, output and error."""
        _, status = self._fork(words, environment, {"directory": directory}, streams)
        code = int(os.read(status, 16))
        os.close(status)
        return code

    def _fork(
        self,
        words: Sequence[object],
        environment: Mapping[str, str],
        more: Mapping[str, str],
        streams: Sequence[int] = (),
    ) -> tuple[int, int]:
        """The verb's process id, and where its exit code will be read."""
        message = {"words": [*map(str, words)], "environment": dict(environment), **more}
        status, other = os.pipe()
        socket.send_fds(self.socket, [json.dumps(message).encode()], [other, *streams])
        os.close(other)
        pid = self.socket.recv(16)
        assert pid, "the process that forks verbs has ended: its error is above"
        return int(pid), status

    @contextlib.contextmanager
    def as_command(self, file: Path) -> Iterator[None]:
        """While open, `file` is the command `raylab`, with which a shell starts verbs, one at a time."""
        place = file.with_suffix(".socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(place))
            listener.listen()
            file.write_text(
                COMMAND.format(
                    python=sys.executable, installed=f"{Path(sys.executable).parent}/raylab", socket=str(place)
                )
            )
            file.chmod(0o700)
            answering = threading.Thread(target=self._answer, args=(listener,))
            answering.start()
            try:
                yield
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                answering.join()

    def _answer(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # it was shut down
                return
            with connection:
                message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                code = self.run_in(**json.loads(message), streams=streams)
                for number in streams:
                    os.close(number)
                connection.send(str(code).encode())

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
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        if not message:
            return
        status, *streams = descriptors
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            verb = os.fork()
            if not verb:
                channel.close()
                os.close(status)
                run(**json.loads(message), streams=streams)
            channel.send(str(verb).encode())
            code = os.waitstatus_to_exitcode(os.waitpid(verb, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # whoever started it has been killed
                os.write(status, str(code).encode())
            os._exit(0)
        for number in descriptors:
            os.close(number)


def run(
    words: list[str],
    environment: dict[str, str],
    streams: list[int],
    output: str = "",
    errors: str = "",
    directory: str = ".",
) -> None:
    """Be the verb, to its end. Its streams are `streams`; without them, the files `output` and `errors`."""
    from jobs import cli

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what an import has found may not be this environment's TMPDIR
    os.chdir(directory)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number, path in () if streams else ((1, output), (2, errors)):
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
