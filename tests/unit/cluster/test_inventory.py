"""What Slurm prints about a site, parsed."""

from datetime import datetime

import pytest

from cluster import inventory
from cluster.inventory import Limit, Maintenance, Node
from cluster.slurm import Slurm

PARTITIONS = """\
PartitionName=batch AllowGroups=ALL Default=YES MaxTime=1-00:00:00 Nodes=n[1-3] OverSubscribe=EXCLUSIVE State=UP
PartitionName=debug Default=NO MaxTime=UNLIMITED Nodes=n1 OverSubscribe=NO State=DOWN
"""
RESERVATION = (
    "ReservationName=upgrade StartTime=2026-11-26T20:10:00 EndTime=2026-11-26T22:10:00 Duration=02:00:00 Nodes=n[1-2] "
    "NodeCnt=2 Features=(null) PartitionName=(null) Flags=MAINT,IGNORE_JOBS,SPEC_NODES Users=daemon State=INACTIVE"
)
SHOW = f"""case "$*" in
  *partition) printf %s "{PARTITIONS}" ;;
  *reservation) echo "{RESERVATION}" ;;
  "show hostnames n[1-2]") printf "n1\\nn2\\n" ;;
esac"""


def test_partitions(commands):
    partitions = inventory.read_partitions(Slurm(commands(scontrol=SHOW)))
    batch, debug = partitions["batch"], partitions["debug"]
    assert (inventory.limit_seconds(batch), inventory.limit_seconds(debug)) == (86400, None)
    assert inventory.allocates_whole_nodes(batch, {}) and not inventory.allocates_whole_nodes(debug, {})
    assert inventory.allocates_whole_nodes(debug, {"SelectType": "select/linear"})


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:4", {"": 4}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:2(S:0,1),gpu:1g.5gb:7(S:0),craynetwork:4", {"a100": 2, "1g.5gb": 7}),
        ("mps:400,shard:gpu:3", {}),
    ],
)
def test_gpus_of_a_node(gres, gpus):
    assert inventory.parse_gpus(gres) == gpus


def test_nodes(commands):
    slurm = Slurm(commands(sinfo="printf 'n1|4|8000|gpu:fake:2\\nn2|8|16000+|(null)\\n'"))
    assert inventory.read_nodes(slurm, "batch") == [Node("n1", 4, 8000, {"fake": 2}), Node("n2", 8, 16000, {})]


def test_maintenances(commands):
    start, end = datetime(2026, 11, 26, 20, 10), datetime(2026, 11, 26, 22, 10)
    expected = Maintenance("upgrade", start, end, frozenset({"n1", "n2"}))
    assert inventory.read_maintenances(Slurm(commands(scontrol=SHOW))) == [expected]
    for others in ("No reservations in the system", RESERVATION.replace("MAINT,", "")):
        assert inventory.read_maintenances(Slurm(commands(scontrol=f"echo '{others}'"))) == []


ACCOUNTING = """case "$*" in
  *associations*format=Account) printf "lungs\\nhearts\\nlungs\\n" ;;
  *associations*) printf "lungs|4||normal|normal,long\\nhearts||9||long\\n" ;;
  *qos*) printf "normal||6\\nlong|2|\\n" ;;
esac"""


def test_accounts_and_limits(commands):
    slurm = Slurm(commands(sacctmgr=ACCOUNTING))
    assert inventory.read_accounts(slurm) == ["lungs", "hearts"]
    lungs = [Limit(4, "account lungs"), Limit(6, "QOS normal", ("long",))]
    assert inventory.read_limits(slurm, "lungs", None) == lungs
    assert inventory.read_limits(slurm, "hearts", None) == [Limit(9, "account hearts"), Limit(2, "QOS long")]
    assert inventory.read_limits(slurm, "lungs", "long") == [
        Limit(4, "account lungs"),
        Limit(2, "QOS long", ("normal",)),
    ]
    assert len(inventory.read_limits(slurm, None, None)) == 4


def test_without_accounting_there_is_no_answer(commands):
    slurm = Slurm(commands(sacctmgr="echo 'You are not running a supported accounting_storage plugin' >&2; exit 1"))
    assert inventory.read_accounts(slurm) is None and inventory.read_limits(slurm, None, None) == []
