"""Loopback ports: which users listen there, and how to reach them without a site's proxy.

Every user of a machine can listen on a free loopback port and connect to an open one, so a port does not identify
who answers. The kernel knows who listens.
"""

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTEN = "0A"  # the state of a listening socket in these tables
NAMES = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def is_loopback(host: str) -> bool:
    """Whether the host name or address names this machine's loopback interface."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listener_uids(port: int) -> set[int] | None:
    """The user ids of the sockets that accept connections to loopback port `port`; None without a kernel table."""
    if not TABLES[0].exists():
        return None
    return {uid for address, at, uid in _listeners() if at == port and _takes_loopback(address)}


def is_own_listener(port: int) -> bool:
    """Whether loopback port `port` is served by this user or root; True if the kernel does not say."""
    uids = listener_uids(port)
    return uids is None or (bool(uids) and uids <= {0, os.getuid()})


def no_proxy(environment: dict[str, str]) -> dict[str, str]:
    """The variables to set in `environment` so that HTTP to loopback bypasses the proxy; {} without a proxy."""
    if not any(environment.get(name) for name in PROXIES):
        return {}
    known = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [name.strip() for name in known.split(",") if name.strip()]
    value = "*" if "*" in names else ",".join([*names, *(name for name in NAMES if name not in names)])
    return {"no_proxy": value, "NO_PROXY": value}


def _listeners() -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int, int]]:
    for table in TABLES:
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                address, _, port = fields[1].partition(":")
                # 32-bit words in the machine's (little-endian) order
                words = (bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
                yield ipaddress.ip_address(b"".join(words)), int(port, 16), int(fields[7])


def _takes_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    plain = getattr(address, "ipv4_mapped", None) or address
    return plain.is_loopback or plain.is_unspecified
