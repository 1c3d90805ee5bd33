"""Who listens on a loopback port, by the kernel's tables."""

import os
import socket
import subprocess
import sys

import pytest

from raylab.loopback import is_loopback, is_own_listener, listener_uids, no_proxy
from tests.other_user import NOBODY, as_other_user

LISTENER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "h-ab12.localhost")),
        *((host, False) for host in ("", "10.0.0.1", "localhost.example", "mlflow", "0.0.0.0", "127.0.0.1.example")),
    ],
)
def test_loopback_by_name_and_number(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")]
)
def test_own_listeners_are_found_on_every_kind_of_address(family: socket.AddressFamily, address: str) -> None:
    try:
        listener = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip("no such address on this machine")
    port = listener.getsockname()[1]
    with listener:
        assert listener_uids(port) == {os.getuid()} and is_own_listener(port)
    assert listener_uids(port) == set() and not is_own_listener(port)


def test_a_listener_of_another_user_is_not_ours() -> None:
    with as_other_user(LISTENER) as process:
        port = int(process.stdout.readline())
        assert listener_uids(port) == {NOBODY} and not is_own_listener(port)


def test_a_proxy_is_kept_out_of_the_way_to_loopback_and_nowhere_else() -> None:
    assert no_proxy({}) == {} and no_proxy({"no_proxy": "a"}) == {}
    proxied = {"http_proxy": "http://127.0.0.1:9"}
    assert no_proxy(proxied)["no_proxy"] == "127.0.0.1,localhost,::1"
    assert no_proxy({**proxied, "NO_PROXY": "intra.net, localhost"})["no_proxy"] == "intra.net,localhost,127.0.0.1,::1"
    assert no_proxy({**proxied, "no_proxy": "*"})["NO_PROXY"] == "*"
    code = "import requests; print(requests.utils.get_environ_proxies('http://h-a.localhost:1/'))"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        environment = {"PATH": os.environ["PATH"], name: "http://127.0.0.1:9"}
        asked = [sys.executable, "-c", code]
        before = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
        after = subprocess.run(
            asked, env=environment | no_proxy(environment), capture_output=True, text=True, check=True
        )
        assert "127.0.0.1:9" in before.stdout and after.stdout.strip() == "{}"
