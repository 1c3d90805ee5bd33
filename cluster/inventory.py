"""What Slurm says about a site: partitions, nodes, reservations, and the accounts and limits of this user."""

import getpass
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from cluster import sites
from cluster.slurm import Slurm
from raylab.errors import RaylabError


@dataclass(frozen=True)
class Node:
    """A node: CPUs, memory in MB, GPUs by type ("" where the site has no types)."""

    name: str
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Maintenance:
    """Nodes that are reserved for a maintenance from `start` to `end`."""

    name: str
    start: datetime
    end: datetime
    nodes: frozenset[str]


@dataclass(frozen=True)
class Limit:
    """The most jobs of this user that may run, or wait and run, at a time, and whose rule this is.

    `others`: for the limit of a QOS, the other ones that this user may name.
    """

    jobs: int
    rule: str
    others: tuple[str, ...] = ()


def read_partitions(slurm: Slurm) -> dict[str, dict[str, str]]:
    """Every partition, with the fields of `scontrol show partition`."""
    return parse_partitions(slurm.run("scontrol", "--oneliner", "show", "partition"))


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """Partitions from lines of `Name=value` pairs."""
    lines = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines()]
    return {fields["PartitionName"]: fields for fields in lines if "PartitionName" in fields}


def allocates_whole_nodes(partition: Mapping[str, str], config: Mapping[str, str]) -> bool:
    """Whether a job of this partition gets whole nodes, whatever it requests."""
    return partition.get("OverSubscribe") == "EXCLUSIVE" or config.get("SelectType") == "select/linear"


def read_nodes(slurm: Slurm, partition: str) -> list[Node]:
    """The nodes of a partition, also those that are down."""
    words = ("--noheader", "--Node", f"--partition={partition}", "--format=%N|%c|%m|%G")
    return parse_nodes(slurm.run("sinfo", *words))


def parse_nodes(table: str) -> list[Node]:
    """Nodes from lines of NAME|CPUS|MEMORY|GRES."""
    nodes = []
    for line in table.splitlines():
        name, cpus, memory, gres = line.split("|")
        nodes.append(Node(name, int(cpus), int(memory.rstrip("+")), parse_gpus(gres)))
    return nodes


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs by type from a GRES list such as `gpu:a100:4(S:0-1),craynetwork:4`."""
    gpus: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)(?=[,(]|$)", gres):
        gpus[kind] = gpus.get(kind, 0) + int(count)
    return gpus


def read_maintenances(slurm: Slurm) -> list[Maintenance]:
    """The reservations for maintenances that are not over."""
    maintenances = []
    for line in slurm.run("scontrol", "--oneliner", "show", "reservation").splitlines():
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        if "MAINT" in fields.get("Flags", "").split(","):
            start, end = (datetime.fromisoformat(fields[name]) for name in ("StartTime", "EndTime"))
            nodes = slurm.run("scontrol", "show", "hostnames", fields["Nodes"]).split()
            maintenances.append(Maintenance(fields["ReservationName"], start, end, frozenset(nodes)))
    return maintenances


def read_accounts(slurm: Slurm) -> list[str] | None:
    """The accounts of this user; None where the site has no accounting or keeps it from its users."""
    rows = _ask_accounting(slurm, "associations", f"user={getpass.getuser()}", "Account")
    return None if rows is None else list(dict.fromkeys(row[0] for row in rows if row[0]))


def read_limits(slurm: Slurm, account: str | None, qos: str | None) -> list[Limit]:
    """Limits on this user's number of jobs in `account`, or any of the accounts, and `qos`, or the default one."""
    user = f"user={getpass.getuser()}"
    rows = _ask_accounting(slurm, "associations", user, "Account,MaxJobs,MaxSubmitJobs,DefaultQOS,QOS") or []
    limits, allowed, used = [], set(), {qos} if qos else set()
    for name, running, submitted, default, names in rows:
        if account in (None, name):
            limits += [Limit(int(count), f"account {name}") for count in (running, submitted) if count]
            allowed |= set(names.split(",")) - {""}
            used |= {default or names.split(",")[0]} if qos is None else set()
    for name, running, submitted in _ask_accounting(slurm, "qos", "", "Name,MaxJobsPU,MaxSubmitJobsPU") or []:
        others = tuple(sorted(allowed - {name}))
        if name in used:
            limits += [Limit(int(count), f"QOS {name}", others) for count in (running, submitted) if count]
    return limits


def _ask_accounting(slurm: Slurm, what: str, where: str, columns: str) -> list[list[str]] | None:
    """Rows of `sacctmgr show`; None where it is absent, refuses or does not answer, which hides nothing that decides
    about a job: sbatch applies the rules again."""
    condition = ["where", where] if where else []
    words = ("--noheader", "--parsable2", "--readonly", "show", what, *condition, f"format={columns}")
    try:
        return [line.split("|") for line in slurm.run("sacctmgr", *words).splitlines() if line]
    except RaylabError:
        return None


def limit_seconds(partition: Mapping[str, str]) -> int | None:
    """The time limit of a partition's jobs in seconds; None if it has none."""
    limit = partition.get("MaxTime", "UNLIMITED")
    return None if limit in ("UNLIMITED", "INFINITE") else sites.seconds(limit)
