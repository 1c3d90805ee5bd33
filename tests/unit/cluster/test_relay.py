"""The relay's far end, on the head's node: lines in, connections to ports of ours out."""

import base64
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.other_user import as_other_user

ROOT = Path(__file__).parents[3]
# Says who has connected, by the number of connections, when asked
STRANGER = """
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.readline()
listener.setblocking(False)
try:
    listener.accept()
    print("somebody came", flush=True)
except BlockingIOError:
    print("nobody came", flush=True)
"""


class Far:
    def __init__(self, *ports: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.relay", "far", *map(str, ports)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        assert self.read() == "ready"

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def ours() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_connections_go_to_ports_on_which_this_user_listens(ours: socket.socket) -> None:
    port = ours.getsockname()[1]
    with as_other_user(STRANGER) as stranger:
        theirs = int(stranger.stdout.readline())
        far = Far(port, theirs)
        try:
            far.say(f"open 1 {theirs}")
            assert far.read() == "close 1"
            far.say(f"open 2 {port}")
            far.say(f"data 2 {base64.b64encode(b'hello').decode()}")
            with ours.accept()[0] as connection:
                assert connection.recv(100) == b"hello"
                connection.sendall(b"well")
                assert far.read() == f"data 2 {base64.b64encode(b'well').decode()}"
            far.say("open 3 1")  # a port that is none of the head's
            assert {far.read(), far.read()} == {"close 2", "close 3"}
        finally:
            far.process.kill()
            far.process.communicate()
        stranger.stdin.write("\n")
        stranger.stdin.flush()
        assert stranger.stdout.readline().strip() == "nobody came"
