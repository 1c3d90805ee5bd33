"""Sites in networks of their own: each is a process in a network namespace that has the links made here and no other.

rsync carries the exchange directories over them. One link is cut for some seconds, and all that crosses it is recorded.
"""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from raylab.data.icu.prepare import prepare_icu
from raylab.files import read_lines
from tests.unit.federation.test_training import mark
from tests.wait import wait_for

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("rsync"), reason="needs root, ip and rsync"
    ),
]
RAYLAB = Path(sys.executable).with_name("raylab")
SITES = {"north": 0, "south": 1, "west": 2}
LINKS = (("north", "south"), ("south", "west"), ("north", "west"))
CUT = ("north", "south")
CUT_SECONDS = 6
SETTINGS = ("loop.epochs=3", "loop.checkpoint_steps=5")
CONNECTION_BYTES = 10_000  # of one copy, without messages: rsync's greeting, a list of files, and headers
PASSES = 0.2  # s between two copies

# Copies the messages of `peer` from its rsync daemon, again and again; a copy that fails is tried again
CARRY = f"""
while true; do
  rsync --recursive --perms --times --delete --timeout=2 --contimeout=2 --include="*.$PEER.*" --include="$PEER.stop" \\
    --exclude="*" "rsync://$ADDRESS/exchange/messages/" "$DIRECTORY/messages/" 2>/dev/null
  sleep {PASSES}
done
"""
# Writes all frames of one interface to a file, each after its length, and at the end how many were lost
RECORD = """
import errno, signal, socket, struct, sys
interface, path = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: wire.setblocking(False))  # what has arrived is still read
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire, open(path, "wb") as out:
    wire.setsockopt(socket.SOL_SOCKET, 33, 1 << 28)  # SO_RCVBUFFORCE
    wire.bind((interface, 0))
    wire.settimeout(0.2)
    while True:
        try:
            frame = wire.recv(1 << 18)
        except TimeoutError:
            continue
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno != errno.ENETDOWN:  # the link was cut; it will be back
                raise
            continue
        out.write(struct.pack("<I", len(frame)) + frame)
    lost = struct.unpack("II", wire.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
    out.write(struct.pack("<I", 0) + struct.pack("<I", lost))
"""


def address(site: str, peer: str) -> str:
    """The address of `site` on its link to `peer`."""
    link = next(number for number, ends in enumerate(LINKS) if {site, peer} == set(ends))
    return f"10.77.{link}.{SITES[site] + 1}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


class Network:
    """Three namespaces and the links between them, and processes in them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []  # type: tuple[Path, list[subprocess.Popen[bytes]]]
        self.prefix = f"raylab{os.getpid()}-"

    def open(self) -> None:
        for site in SITES:
            ip("netns", "add", self.prefix + site)
            ip("-n", self.prefix + site, "link", "set", "lo", "up")
        for one, other in LINKS:
            names = f"to-{other}", f"to-{one}"
            ip("-n", self.prefix + one, "link", "add", names[0], "type", "veth", "peer", "name", names[1],
               "netns", self.prefix + other)  # fmt: skip
            for name, site, peer in ((names[0], one, other), (names[1], other, one)):
                ip("-n", self.prefix + site, "address", "add", f"{address(site, peer)}/24", "dev", name)
                ip("-n", self.prefix + site, "link", "set", name, "up")

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
        for site in SITES:
            ip("netns", "delete", self.prefix + site)

    def start(self, site: str, *words: str, log: str = "", **environment: str) -> "subprocess.Popen[bytes]":
        with (self.folder / (log or f"{site}.txt")).open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.prefix + site, *words],
                env=os.environ | environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def cut(self, one: str, other: str, *, is_cut: bool) -> None:
        ip("-n", self.prefix + one, "link", "set", f"to-{other}", "down" if is_cut else "up")

    def carry(self, exchanges: dict[str, Path]) -> None:
        """Serve the exchange directory of each site to the others, and copy theirs."""
        for site, directory in exchanges.items():
            (directory / "messages").mkdir(exist_ok=True)
            rsync = self.folder / f"rsync-{site}.conf"
            rsync.write_text(
                f"use chroot = no\nuid = 0\ngid = 0\npid file = {rsync}.pid\n[exchange]\npath = {directory}\n"
            )
            words = ("rsync", "--daemon", "--no-detach", f"--config={rsync}", "--port=873")
            self.start(site, *words, log="rsync.txt")
            for peer in SITES:
                if peer != site:
                    where = {"PEER": peer, "ADDRESS": address(peer, site), "DIRECTORY": str(directory)}
                    self.start(site, "sh", "-c", CARRY, log="carry.txt", **where)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    try:
        made.open()
        yield made
    finally:
        made.close()


def raylab(*words: object) -> None:
    done = subprocess.run([RAYLAB, "federate", *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def read_streams(path: Path) -> tuple[list[bytes], int, int]:
    """Return the TCP streams of a record, both directions of each connection, the bytes of all frames, and how many
    frames the record lacks."""
    content, position, size = path.read_bytes(), 0, 0
    flows: dict[bytes, dict[int, bytes]] = {}
    while (length := struct.unpack_from("<I", content, position)[0]) > 0:
        frame = content[position + 4 : position + 4 + length]
        position, size = position + 4 + length, size + length
        if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
            continue
        packet = frame[14 : 14 + struct.unpack_from("!H", frame, 16)[0]] if frame[16:18] != b"\0\0" else frame[14:]
        header = (packet[0] & 15) * 4
        tcp = packet[header:]
        payload = tcp[(tcp[12] >> 4) * 4 :]
        if payload:
            flow = flows.setdefault(packet[12:20] + tcp[:4], {})
            number = struct.unpack_from("!I", tcp, 4)[0]
            flow[number] = max(flow.get(number, b""), payload, key=len)
    lost = struct.unpack_from("<I", content, position + 4)[0]
    return [_join(flow) for flow in flows.values()], size, lost


def _join(flow: dict[int, bytes]) -> bytes:
    """The bytes of one direction in order, each once; the numbers do not wrap around in so few bytes."""
    out, end = b"", min(flow)
    for number in sorted(flow):
        payload = flow[number][max(0, end - number) :]
        out, end = out + payload, max(end, number + len(flow[number]))
    return out


def rows_of(data: Path) -> list[bytes]:
    """Rows of raw values of a prepared directory, as their bytes."""
    values = pl.read_parquet(data / "hours.parquet").select(pl.col(pl.Float32)).to_numpy()
    rows = [row[np.isfinite(row)].tobytes() for row in values[:: max(1, len(values) // 200)]]
    return [row for row in rows if len(row) >= 12]


def test_sites_in_networks_of_their_own_survive_a_cut_link_and_only_sums_cross(tmp_path, network):
    data, exchanges, keys = {}, {}, tmp_path / "keys"
    for seed, name in enumerate(SITES):
        data[name] = tmp_path / "data" / name
        prepare_icu("ards", "synthetic", None, data[name], patients=80 + 20 * seed, seed=seed)
        mark(data[name], f"CANARY-{name}-7f3a")
        raylab("keys", "--site", name, "--out", keys)
    first = exchanges["north"] = tmp_path / "exchange-north"
    files = [keys / f"{name}.public.json" for name in SITES]
    raylab("agree", "ards", "--smoke", "--exchange", first, "--sites", *files, "--rows", 12, 12, 16,
           "--set", *SETTINGS)  # fmt: skip
    for name in SITES:
        raylab("sign", "--exchange", first, "--key", keys / f"{name}.key")
    for name in ("south", "west"):
        exchanges[name] = shutil.copytree(first, tmp_path / f"exchange-{name}")

    routes = ["ip", "netns", "exec", network.prefix + "north", "ip", "-json", "route"]
    found = json.loads(subprocess.run(routes, capture_output=True, check=True, timeout=20).stdout)
    assert {route["dev"] for route in found} == {"to-south", "to-west"} and "default" not in {r["dst"] for r in found}

    record = tmp_path / "north-south.bin"
    recorder = network.start("north", sys.executable, "-c", RECORD, "to-south", str(record), log="record.txt")
    wait_for(record.exists, 60, "the recorder")
    network.carry(exchanges)
    runs = {}
    for name in SITES:
        words = ["--exchange", exchanges[name], "--key", keys / f"{name}.key", "--data", data[name]]
        words += ["--name", "site", "--json", tmp_path / f"{name}.json"]
        home = str(tmp_path / f"home-{name}")
        runs[name] = network.start(name, str(RAYLAB), "federate", "run", *map(str, words), RAYLAB_HOME=home)

    def steps() -> int:
        lines = read_lines(tmp_path / "home-north" / "runs" / "site" / "ledger.jsonl")
        return sum("step" in line for line in lines)

    def said() -> str:
        return "\n".join((tmp_path / f"{name}.txt").read_text()[-1500:] for name in SITES)

    wait_for(lambda: steps() >= 3, 240, "three steps", said)
    network.cut(*CUT, is_cut=True)
    before = steps()
    with pytest.raises(AssertionError):
        wait_for(lambda: steps() > before + 1, CUT_SECONDS, "steps over a link that is cut")
    assert all(run.poll() is None for run in runs.values()), said()
    network.cut(*CUT, is_cut=False)
    assert [run.wait(280) for run in runs.values()] == [0, 0, 0], said()

    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SITES}
    assert len({result["weights_sha256"] for result in results.values()}) == 1
    assert steps() == results["north"]["steps"] > before + 5 and results["north"]["attempts"] == 1
    words = [f"{name}={data[name]}" for name in SITES]
    raylab("pool", "--exchange", first, "--data", *words, "--out", tmp_path / "pooled")
    pooled = json.loads((tmp_path / "pooled" / "result.json").read_text())
    assert pooled["weights_sha256"] == results["north"]["weights_sha256"]

    # the recorder must find a row of raw values that does cross, as a file that rsync copies
    control = b"".join(rows_of(data["south"])[:3])
    (exchanges["south"] / "messages" / "control.south.rows").write_bytes(control)
    wait_for((exchanges["north"] / "messages" / "control.south.rows").exists, 60, "the control")
    recorder.terminate()
    recorder.wait(20)
    streams, size, lost = read_streams(record)
    assert lost == 0
    assert any(control in stream for stream in streams), "the record cannot show a row that crosses"
    streams = [stream.replace(control, b"") for stream in streams]
    assert sum(b"raylab federation message 1" in stream for stream in streams) > 10
    for name in SITES:
        rows = rows_of(data[name])
        assert len(rows) > 20
        for stream in streams:
            assert b"CANARY" not in stream
            assert not [row for row in rows if row in stream], f"a row of {name}"
    stated = sum(results[name]["traffic"]["bytes_sent"] for name in CUT)
    assert stated < size < 1.2 * stated + CONNECTION_BYTES * len(streams)
