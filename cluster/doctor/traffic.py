"""Which network interface carries traffic between two nodes, and how fast: measured, not looked up."""

import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

CHUNK = bytes(1 << 20)
SECONDS, BYTES = 0.5, 64 << 20  # of one measurement, whichever ends first
CONNECT_SECONDS = 5.0

Place = tuple[str, int]
"""an address and a port"""


@dataclass(frozen=True)
class Traffic:
    """What was sent to one address of another node."""

    carrier: str  # the interface of this node through which it left, by the kernel's counters
    rate: float  # bytes/s


class Listener:
    """Takes what others send to `addresses` {interface: address} of this node, while the context is open."""

    def __init__(self, addresses: Mapping[str, str], host: str) -> None:
        self.host = host
        self.servers = {name: socket.create_server((address, 0)) for name, address in addresses.items()}
        self.places: dict[str, Place] = {name: server.getsockname()[:2] for name, server in self.servers.items()}

    def __enter__(self) -> "Listener":
        for server in self.servers.values():
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in self.servers.values():
            server.shutdown(socket.SHUT_RDWR)  # ends the thread in accept, which keeps a closed socket open
            server.close()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):  # the server was closed
            while True:
                threading.Thread(target=self._take, args=(server.accept()[0],), daemon=True).start()

    def _take(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            # The sender checks the name: an address such as a container bridge's is every node's own
            connection.sendall(f"{self.host}\n".encode())
            while connection.recv(len(CHUNK)):
                pass
            connection.sendall(b"done")


def send(place: Place, host: str) -> Traffic | None:
    """Send to the Listener of `host` at `place` for a moment; None if it cannot be reached there."""
    try:
        with socket.create_connection(place, CONNECT_SECONDS) as connection:
            if connection.makefile().readline() != f"{host}\n":
                return None
            before, began, sent = _count_sent(), time.monotonic(), 0
            while sent < BYTES and time.monotonic() - began < SECONDS:
                connection.sendall(CHUNK)
                sent += len(CHUNK)
            connection.shutdown(socket.SHUT_WR)
            if connection.recv(4) != b"done":
                return None
            seconds, after = time.monotonic() - began, _count_sent()
    except OSError:
        return None
    growth = {name: after[name] - before.get(name, 0) for name in after}
    return Traffic(max(growth, key=lambda name: growth[name]), sent / seconds)


def _count_sent() -> dict[str, int]:
    """The bytes that each interface has sent."""
    return {name: count.bytes_sent for name, count in psutil.net_io_counters(pernic=True, nowrap=False).items()}


def describe_rate(rate: float) -> str:
    """`1.2 GB/s`, `35 MB/s`"""
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.0f} MB/s"
