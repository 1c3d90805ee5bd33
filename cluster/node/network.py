"""This node's address in the network between nodes, the variables that follow from it, and free ports at it."""

import socket

from cluster.sites import Site
from raylab.errors import RunError, SlurmError
from raylab.interfaces import interface_of, list_addresses


def address_of(site: Site) -> str:
    """The address at which other nodes reach this one: that of the site's interface, else of its name for this node.

    Raises SlurmError for an interface or a name that this node does not have.
    """
    here = list_addresses()
    if site.interface is not None:
        if site.interface not in here:
            raise SlurmError(
                f"this node has no network interface '{site.interface}'",
                f"it has: {', '.join(here)}",
                "correct `interface` of the site",
            )
        return here[site.interface]
    if site.hostname_suffix is not None:
        return _resolve_own(add_suffix(socket.gethostname(), site.hostname_suffix), here)
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127.0.0.1"
    if not named.startswith("127."):
        return named
    others = [address for address in here.values() if not address.startswith("127.")]
    return others[0] if others else named


def add_suffix(host: str, suffix: str) -> str:
    """The name of a host in the fast network: `jwb0001.juwels` becomes `jwb0001i.juwels`."""
    short, dot, domain = host.partition(".")
    return f"{short}{suffix}{dot}{domain}"


def _resolve_own(name: str, here: dict[str, str]) -> str:
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise SlurmError(
            f"this node has no address as '{name}'", str(error), "correct `hostname_suffix` of the site"
        ) from error
    try:
        interface_of(address)
    except RunError as error:
        raise SlurmError(
            f"'{name}' resolves to {address}, which no network interface of this node has",
            f"it has: {', '.join(f'{interface} {own}' for interface, own in here.items())}",
            "remove `hostname_suffix` of the site, or set `interface` instead",
        ) from error
    return address


def socket_variables(site: Site, address: str) -> dict[str, str]:
    """The variables that make gloo and NCCL use the network that the site names; those of its `environment` stay.

    Empty if it names none: each worker then takes the interface of Ray's address, unless the site's `setup` says
    otherwise.
    """
    if site.interface is None and site.hostname_suffix is None:
        return {}
    interface = interface_of(address)
    # = is exact; else eth1 means eth10 as well
    variables = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {name: value for name, value in variables.items() if name not in site.environment}


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
