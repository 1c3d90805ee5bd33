"""This node's address in the network between nodes, and free ports at it."""

import socket

import psutil

from raylab.errors import SlurmError


def address_of(interface: str | None) -> str:
    """The address at which other nodes reach this one. Raises SlurmError for an interface that does not exist."""
    here = {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if not here.get(interface):
            raise SlurmError(
                f"this node has no network interface '{interface}'",
                f"it has: {', '.join(name for name, found in here.items() if found)}",
                "correct `interface` of the site",
            )
        return str(here[interface][0])
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127.0.0.1"
    if not named.startswith("127."):
        return named
    others = [a for name, found in here.items() if name != "lo" for a in found if not a.startswith("127.")]
    return others[0] if others else named


def free_ports(host: str, count: int) -> list[int]:
    """`count` different ports that are free on `host` now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    except OSError as error:
        raise SlurmError(f"no free port on {host}", str(error), "use another node") from error
    finally:
        for probe in probes:
            probe.close()
