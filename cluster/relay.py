"""Forwards loopback ports of the login node to the head's node through one Slurm step, without direct connections.

    near: a client -> 127.0.0.1:PORT -> lines -> srun --overlap -> far: lines -> 127.0.0.1:PORT of the head

    python -m cluster.relay near DIRECTORY     on the login node; keeps its ports while heads come and go
    python -m cluster.relay far PORT...        on the head's node, started by the near end

Bytes travel as lines of text: "open ID PORT", "data ID BASE64", "close ID". A step's output arrives by whole lines, so
lines get through unchanged and without delay.
"""

import argparse
import asyncio
import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

from cluster import client, jobscript
from cluster.directory import Directory
from cluster.slurm import Slurm, clean_environment
from raylab.documents import Document, read_json
from raylab.errors import RaylabError, SlurmError
from raylab.files import write_json
from raylab.loopback import is_own_listener

CHUNK = 12_000  # bytes of a line's payload before base64
LINE = 1 << 17  # maximum bytes of a line
START_SECONDS = 60.0
RETRY_SECONDS = 2.0

Send = Callable[[str], Awaitable[None]]


class Record(Document):
    """relay.json"""

    host: str
    pid: int
    ports: dict[str, int]
    generation: int | None = None


class Streams:
    """The connections of one end, multiplexed into lines."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def add(self, id: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers[id] = writer
        task = asyncio.ensure_future(self._pump(id, reader))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _pump(self, id: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self.send(f"data {id} {base64.b64encode(data).decode()}")
        if id in self.writers:
            await self.send(f"close {id}")
            self.close(id)

    async def take(self, words: list[str]) -> None:
        """Handle a `data` or `close` line of the other end."""
        id = int(words[1])
        writer = self.writers.get(id)
        if writer is None:
            return
        if words[0] == "data":
            with contextlib.suppress(OSError):
                writer.write(base64.b64decode(words[2]))
                await writer.drain()
        else:
            self.close(id)

    def close(self, id: int) -> None:
        writer = self.writers.pop(id, None)
        if writer is not None:
            writer.close()

    def close_all(self) -> None:
        for id in list(self.writers):
            self.close(id)


async def far(ports: list[int]) -> None:
    """Serve lines on standard input and output: connect only to those loopback `ports` on which this user listens."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    output = asyncio.StreamWriter(transport, protocol, None, loop)

    async def send(line: str) -> None:
        output.write(line.encode() + b"\n")
        await output.drain()

    streams = Streams(send)
    await send("ready")
    while line := await lines.readline():
        words = line.decode().split()
        if words[0] == "open":
            id, port = int(words[1]), int(words[2])
            try:
                # another user may have opened this port since its owner ended
                if port not in ports or not is_own_listener(port):
                    raise PermissionError(port)
                streams.add(id, *await asyncio.open_connection("127.0.0.1", port))
            except OSError:
                await send(f"close {id}")
        else:
            await streams.take(words)


class Near:
    """The end on the login node."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.slurm = Slurm()
        self.step: asyncio.subprocess.Process | None = None
        self.streams = Streams(self._send)
        self.targets: dict[str, int] = {}
        self.next = 0

    async def _send(self, line: str) -> None:
        if self.step is not None and self.step.stdin is not None:
            with contextlib.suppress(OSError):
                self.step.stdin.write(line.encode() + b"\n")
                await self.step.stdin.drain()

    async def serve(self) -> None:
        """Listen, and keep a step to the current head, until the cluster is gone."""
        ports = {}
        for name in ("dashboard", "mlflow"):

            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                await self._accept(name, reader, writer)

            server = await asyncio.start_server(accept, "127.0.0.1", 0)
            ports[name] = server.sockets[0].getsockname()[1]
        record = {"host": socket.gethostname(), "pid": os.getpid(), "ports": ports}
        write_json(self.directory.path / "relay.json", record)
        while (self.directory.path / "cluster.json").exists():
            try:
                await self._step()
            except RaylabError as error:
                print(error, file=sys.stderr, flush=True)
            self.streams.close_all()
            await asyncio.sleep(RETRY_SECONDS)

    async def _accept(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.step is None or name not in self.targets:
            writer.close()
            return
        self.next += 1
        await self._send(f"open {self.next} {self.targets[name]}")
        self.streams.add(self.next, reader, writer)

    async def _step(self) -> None:
        """Run one step on the head's node until it ends."""
        found = client.status(self.directory, self.slurm)["head"]
        if found is None:
            return
        self.targets = {"dashboard": int(found["dashboard"].rpartition(":")[2])} | found["ports"]
        program = "srun" if self.slurm.directory is None else str(self.slurm.directory / "srun")
        spec, site = self.directory.spec, self.directory.site
        environment = {"PYTHONPATH": spec.code, "RAYLAB_HOME": spec.home}
        far = [spec.python, "-m", "cluster.relay", "far", *map(str, self.targets.values())]
        self.step = await asyncio.create_subprocess_exec(
            program, f"--jobid={found['job']}", "--overlap", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=0",
            "--quiet",
            *jobscript.shell(site, site.head, environment, far),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=LINE, env=clean_environment(os.environ),
        )  # fmt: skip
        assert self.step.stdout is not None  # it is a pipe
        try:
            while line := await self.step.stdout.readline():
                words = line.decode().split()
                if words and words[0] in {"data", "close"}:
                    await self.streams.take(words)
                elif words == ["ready"]:
                    note = self.directory.path / "relay.json"
                    write_json(note, {**read_json(note, Record), "generation": found["generation"]})
        finally:
            step, self.step = self.step, None
            with contextlib.suppress(ProcessLookupError):
                step.kill()
            await step.wait()


def running(directory: Directory) -> dict[str, Any] | None:
    """The record (relay.json) of the relay that runs on this machine, else None."""
    path = directory.path / "relay.json"
    if not path.is_file():
        return None
    known: dict[str, Any] = read_json(path, Record, "end the relay, if it runs, and remove the file")
    if known["host"] != socket.gethostname() or not psutil.pid_exists(known["pid"]):
        return None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(known["pid"])
        if process.uids().real == os.getuid() and str(directory.path) in process.cmdline():
            return known
    return None


def start(directory: Directory) -> dict[str, Any]:
    """Start the relay of this cluster on this machine, unless it runs, and wait until it reaches the current head.

    Returns {"ports": {"dashboard", "mlflow"}, "pid", ...}. Raises SlurmError if it does not reach the head.
    """
    if running(directory) is None:
        (directory.path / "relay.json").unlink(missing_ok=True)
        with (directory.logs / "relay.out").open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "cluster.relay", "near", str(directory.path)],
                cwd=Path(__file__).parents[1], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found, head = running(directory), directory.read("head")
        if found is not None and head is not None and found.get("generation") == head["generation"]:
            return found
        time.sleep(0.2)
    raise SlurmError(
        f"the relay did not reach the head of cluster '{directory.path.name}' within {START_SECONDS:.0f} s",
        "the head may still be in the queue", f"raylab cluster status; {directory.logs}/relay.out",
    )  # fmt: skip


def stop(directory: Directory) -> None:
    """Stop this machine's relay of this cluster, if there is one."""
    if (found := running(directory)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(found["pid"], signal.SIGTERM)  # ends the srun of the step as well
    (directory.path / "relay.json").unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.relay")
    parser.add_argument("end", choices=("near", "far"))
    parser.add_argument("words", nargs="+")
    args = parser.parse_args()
    if args.end == "far":
        asyncio.run(far([int(port) for port in args.words]))
    else:
        asyncio.run(Near(Directory(Path(args.words[0]))).serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
