"""A run on real processes without Ray: its membership lives in this one, and workers are killed, stopped and added."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

from raylab.distributed.membership import Membership
from raylab.files import read_lines, write_json
from tests.wait import wait_for

PRELOAD = [
    "raylab.training.run",
    "raylab.distributed.member",
    "raylab.data.icu.dataset",
    "raylab.data.images.dataset",
    "raylab.data.lung.sweep_dataset",
    "pytest",
    "hypothesis",
]  # of every worker
IDENTITY = {"raylab code": "abc", "data": "def", "version of torch": "2.15.0"}
KEY = b"of these processes alone"


class Desk:
    """The membership's methods for callers that wait: each runs in the loop of one thread, as in an actor."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def call(self, method: str, *values: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(getattr(self.membership, method)(*values), self.loop).result()


class Server(BaseManager):
    pass


class Client(BaseManager):
    pass


Client.register("desk")


class Relay:
    """A way to the desk of its own, which can be cut: what is under way then neither arrives nor fails."""

    def __init__(self, target: str) -> None:
        self.target, self.address = target, tempfile.mktemp(prefix="relay-")
        self.is_whole = threading.Event()
        self.is_whole.set()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.address)
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_whole.clear()

    def mend(self) -> None:
        self.is_whole.set()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(self.target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # an end is gone
            while content := source.recv(1 << 16):
                self.is_whole.wait()
                sink.sendall(content)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class Crew:
    """The workers of the run in `directory`, of which an attempt needs `minimum`. A context: leaving it ends them all.

    `work(directory, peers, send)` is what each does; `faults` of `start` are patches that it makes first.
    """

    def __init__(self, directory: Path, work: Callable[..., None], minimum: int, silence_seconds: float = 10.0) -> None:
        self.directory, self.work, self.silence_seconds = directory, work, silence_seconds
        self.desk = Desk(Membership(minimum, silence_seconds))
        self.socket = tempfile.mktemp(prefix="crew-")
        desk = self.desk

        class Own(Server):
            pass

        Own.register("desk", callable=lambda: desk)
        server = Own(address=self.socket, authkey=KEY).get_server()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.processes: dict[str, Any] = {}
        self.ended: dict[str, int] = {}  # exit code of each that is gone; two threads that ask a process may get 255
        self.rows: list[dict[str, Any]] = []
        self.receiving = threading.Lock()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._attend, daemon=True)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def __enter__(self) -> "Crew":
        self.watcher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.done.set()
        self.watcher.join()
        for process in self.processes.values():
            process.kill()
        for name, process in self.processes.items():
            process.join()
            self.ended.setdefault(name, process.exitcode)

    def start(
        self,
        fault: Callable[[], None] | None = None,
        relay: Relay | None = None,
        identity: Mapping[str, str] = IDENTITY,
    ) -> str:
        """Start a worker, in which `fault` is called before anything else, and which speaks with the membership through
        `relay`."""
        name = f"worker-{len(self.processes)}"
        address = self.socket if relay is None else relay.address
        arguments = (address, name, self.silence_seconds, identity, self.work, self.directory, fault)
        process = self.context.Process(target=_worker, args=arguments)
        process.start()
        self.processes[name] = process
        return name

    def name_of(self, pid: int) -> str:
        return next(name for name, process in self.processes.items() if process.pid == pid)

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.processes[name].pid, how)

    def leave(self, name: str) -> None:
        self.desk.call("leave", name)

    @property
    def members(self) -> tuple[str, ...]:
        return self.desk.membership.roster.members

    def ledger(self) -> list[dict[str, Any]]:
        return read_lines(self.directory / "ledger.jsonl")

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: any(line.get("step", 0) >= step for line in self.ledger()), 120, f"step {step}")

    def wait_for_end(self) -> None:
        wait_for((self.directory / "result.json").is_file, 120, "the end of the run")
        self._receive()

    def exit_codes(self) -> list[int]:
        """Those of all workers, in ascending order, when the last one has ended by itself."""
        wait_for(lambda: len(self.ended) == len(self.processes), 60, "every worker to end", lambda: str(self.ended))
        return sorted(self.ended.values())

    def _attend(self) -> None:
        """What the supervisor of a run does: it hears of deaths, and takes the rows that come."""
        while not self.done.wait(0.02):
            for name, process in list(self.processes.items()):
                if name not in self.ended and (code := process.exitcode) is not None:
                    self.desk.call("remove", name, "it has died", code != 0)
                    self.ended[name] = code
            self._receive()

    def _receive(self) -> None:
        with self.receiving:
            self.rows += self.desk.call("receive", self.rows[-1]["step"] if self.rows else 0).rows


def _worker(
    address: str,
    name: str,
    silence: float,
    identity: Mapping[str, str],
    work: Callable[..., None],
    directory: Path,
    fault: Callable[[], None] | None,
) -> None:
    import torch

    from raylab.distributed.member import Expelled, Member, Refused
    from raylab.errors import RaylabError
    from raylab.training.loop import AttemptHandedOver

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if fault is not None:
        fault()
    local = threading.local()

    def call(method: str, *values: Any) -> Any:
        if not hasattr(local, "call"):  # a connection is of one thread
            client = Client(address=address, authkey=KEY)
            client.connect()
            local.call = client.desk().call  # type: ignore[attr-defined]
        return local.call(method, *values)

    member = Member(name, call, silence, identity)
    try:
        work(directory, member, partial(call, "send"))
    except AttemptHandedOver:
        member.leave()
    except Expelled:
        os._exit(3)
    except (RaylabError, Refused) as error:
        write_json(directory.parent / f"{name}.json", error.args)
        os._exit(1)
    os._exit(0)  # gloo's threads may still wait for those who are gone
