import socket

import pytest

from cluster.node import network
from cluster.node.network import add_suffix, address_of, socket_variables
from cluster.sites import NodeType, Site
from raylab.errors import SlurmError

NODES = {"cpu": NodeType(cpus=1, memory_mb=1000)}


def site(**other: object) -> Site:
    return Site.model_validate({"name": "here", "nodes": NODES, **other})


@pytest.mark.parametrize(
    ("host", "name"), [("n1", "n1i"), ("jwb0001.juwels", "jwb0001i.juwels"), ("n1.a.b", "n1i.a.b")]
)
def test_the_name_of_a_node_in_the_fast_network(host, name):
    assert add_suffix(host, "i") == name


@pytest.fixture
def names(monkeypatch):
    """This node is n1, and n1i, n1x and n1z have addresses of this machine, of none, and not any."""

    def resolve(name: str) -> str:
        found = {"n1": "192.0.2.1", "n1i": "127.0.0.1", "n1x": "192.0.2.99"}
        if name not in found:
            raise socket.gaierror(f"{name}: not known")
        return found[name]

    monkeypatch.setattr(socket, "gethostname", lambda: "n1")
    monkeypatch.setattr(socket, "gethostbyname", resolve)


def test_a_node_is_reached_at_its_name_with_the_suffix(names):
    assert address_of(site()) == "192.0.2.1"
    assert address_of(site(hostname_suffix="i")) == "127.0.0.1"
    with pytest.raises(SlurmError, match=r"'n1x' resolves to 192[.]0[.]2[.]99, which no network interface"):
        address_of(site(hostname_suffix="x"))
    with pytest.raises(SlurmError, match="no address as 'n1z'"):
        address_of(site(hostname_suffix="z"))


def test_gloo_and_nccl_use_the_network_that_the_site_names(names):
    both = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert socket_variables(site(), "192.0.2.1") == {}, "a worker takes the interface of Ray's address"
    for named in (site(interface="lo"), site(hostname_suffix="i")):
        assert socket_variables(named, address_of(named)) == both
    own = site(interface="lo", environment={"NCCL_SOCKET_IFNAME": "ib0,ib1"})
    assert socket_variables(own, "127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}, "what the site says itself stays"


def test_ports_that_are_free_are_different():
    assert len(set(network.free_ports("127.0.0.1", 6))) == 6
