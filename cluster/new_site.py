"""A section for the user's own sites file, from what Slurm says about a partition and its nodes."""

import json
import re
import stat
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import inventory, sites
from cluster.inventory import Node
from cluster.slurm import Slurm
from raylab.errors import UsageError, unknown
from raylab.files import atomic_write, locked

TIME = "02:00:00"  # of a job, where the partition allows as much
SHARED_CPUS = 16  # of a worker on a node that other jobs share, and that has no GPUs
SHARED = "<fill in: a directory of your project that login and compute nodes share, with RAYLAB_HOME below it>"


@dataclass(frozen=True)
class PartitionFacts:
    """What Slurm says: `accounts` are those of this user, None where Slurm keeps none or does not tell."""

    fields: Mapping[str, str]
    others: Sequence[str]
    nodes: Sequence[Node]
    has_whole_nodes: bool
    needs_account: bool
    accounts: Sequence[str] | None

    @property
    def name(self) -> str:
        return self.fields["PartitionName"]


def ask(slurm: Slurm, partition: str | None) -> PartitionFacts:
    """Facts about `partition`, else Slurm's default one. Raises UsageError for one that is unknown, down or empty."""
    config, known = slurm.config(), inventory.read_partitions(slurm)
    name = partition or next((name for name, fields in known.items() if fields.get("Default") == "YES"), None)
    if name is None:
        names = ", ".join(sorted(known))
        raise UsageError("Slurm has no default partition", do=f"choose one with --partition: {names}")
    if name not in known:
        raise unknown("partition", name, known)
    up = sorted(other for other, fields in known.items() if fields.get("State") == "UP")
    if name not in up:
        state = known[name].get("State", "unknown")
        choice = f"choose another one with --partition: {', '.join(up)}" if up else "wait until a partition is up"
        raise UsageError(f"partition {name} is {state}", do=choice)
    nodes = inventory.read_nodes(slurm, name)
    if not nodes:
        raise UsageError(f"partition {name} has no nodes", do=f"choose another one with --partition: {', '.join(up)}")
    keeps_accounts = not config.get("AccountingStorageType", "").endswith("/none")
    return PartitionFacts(
        fields=known[name],
        others=[other for other in up if other != name],
        nodes=nodes,
        has_whole_nodes=inventory.allocates_whole_nodes(known[name], config),
        needs_account=keeps_accounts,
        accounts=inventory.read_accounts(slurm) if keeps_accounts else None,
    )


def node_types(nodes: Sequence[Node], has_whole_nodes: bool) -> dict[str, dict[str, Any]]:
    """The keys of a node type for each kind of node, the most frequent first.

    A job gets the whole node where Slurm allocates whole nodes. Elsewhere it gets one GPU with its share of CPUs and
    memory, or up to SHARED_CPUS of a node without GPUs.
    """
    alike: dict[tuple[int, str, int], list[Node]] = defaultdict(list)
    for node in nodes:
        for kind, gpus in (node.gpus or {"": 0}).items():
            alike[node.cpus, kind, gpus].append(node)
    frequent = sorted(alike.items(), key=lambda item: -len(item[1]))
    types: dict[str, dict[str, Any]] = {}
    for (cpus, kind, gpus), group in frequent:
        parts = 1 if has_whole_nodes else gpus or max(1, cpus // SHARED_CPUS)
        values: dict[str, Any] = {"cpus": cpus // parts or 1}
        values["memory_mb"] = min(node.memory_mb for node in group) // parts
        if gpus:
            values |= {"gpus": gpus // parts, **({"gpu_type": kind} if kind else {})}
        base = "gpu" if gpus else "cpu"
        names = [base, re.sub(r"[^A-Za-z0-9_-]", "-", f"{base}-{kind or cpus}"), f"{base}-{cpus}-{gpus}"]
        if sum(bool(other_gpus) == bool(gpus) for _, _, other_gpus in alike) > 1:
            names.remove(base)
        name = next(name for name in (*names, f"{base}-{len(types)}") if name not in types)
        types[name] = {**values, "max": len(group) * parts}
    return types


def render_section(name: str, facts: PartitionFacts, modules: str, date: str) -> str:
    """The section [name] in TOML. `modules`: the modules that are loaded now (LOADEDMODULES)."""
    limit = inventory.limit_seconds(facts.fields)
    shorter = limit is not None and limit < sites.seconds(TIME)
    time = facts.fields["MaxTime"] if shorter else TIME
    others = f"  # others that are up: {', '.join(facts.others)}" if facts.others else ""
    lines = [
        f"# `raylab site new` wrote this on {date} from scontrol, sinfo and sacctmgr",
        f"[{name}]",
        f"partition = {_quote(facts.name)}{others}",
        *([f"account = {_quote(_account(facts.accounts))}"] if facts.needs_account else []),
        f"time = {_quote(time)}" + ("  # the partition's limit" if shorter else ""),
        f"shared = {_quote(SHARED)}",
        *(["whole_nodes = true"] if facts.has_whole_nodes else []),
    ]
    if modules:
        load = "module load " + " ".join(modules.split(":"))
        lines += [f"# setup = [{_quote(load)}]  # loaded here; needed if your Python is of a module"]
    for kind, values in node_types(facts.nodes, facts.has_whole_nodes).items():
        lines.append(f"[{name}.nodes.{kind}]")
        lines += [f"{key} = {_quote(value) if isinstance(value, str) else value}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _account(accounts: Sequence[str] | None) -> str:
    if accounts is not None and len(accounts) == 1:
        return accounts[0]
    choice = f"one of {', '.join(accounts)}" if accounts else "your compute project"
    return f"{sites.BLANK} {choice}>"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML string


def check_name(path: Path, name: str) -> None:
    """Raise UsageError if `name` cannot be a section, or is one in the file already."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"'{name}' is not a valid site name", do="use letters, digits, '-' and '_'")
    if name in sites.read_file(path):
        raise UsageError(f"{path} already has a section [{name}]", do="choose another name, or remove that section")


def add_section(path: Path, name: str, section: str) -> None:
    """Append a section to the file, which is created with mode 0600 if there is none.

    What is in the file stays as it is, with comments; it is replaced as a whole or not at all.
    """
    path = path.resolve()  # of a link, the file that it leads to
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        check_name(path, name)
        before = path.read_text() if path.exists() else ""
        gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
        text = before + gap + section
        tomllib.loads(text)
        with atomic_write(path) as beside:
            beside.write_text(text)
            if path.exists():
                beside.chmod(stat.S_IMODE(path.stat().st_mode))
