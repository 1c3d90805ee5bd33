"""The network interfaces of this machine."""

import socket

import psutil

from raylab.errors import RunError


def list_addresses() -> dict[str, str]:
    """The first IPv4 address of each interface that is up."""
    states, first = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        found = [one.address for one in addresses if one.family == socket.AF_INET]
        if found and name in states and states[name].isup:
            first[name] = found[0]
    return first


def interface_of(address: str) -> str:
    """Return the network interface with the IPv4 or IPv6 `address`: lo for a local Ray, the site's on a cluster."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in [a.address.partition("%")[0] for a in addresses]:
            return str(name)
    raise RunError(
        f"no network interface of this node has the address {address}",
        "Ray uses this address for this node, and the workers of a run would communicate over it",
        "start Ray with --node-ip-address=ADDRESS of an interface of this node",
    )
