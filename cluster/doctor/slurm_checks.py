"""The checks of `raylab doctor` on what Slurm says about a site: its settings, partitions, limits and reservations."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from cluster import inventory, sites
from cluster.doctor.node_checks import Finding
from cluster.inventory import Limit, Maintenance, Node
from cluster.sites import NodeType, Site
from cluster.slurm import Slurm
from raylab.errors import RaylabError

SAVE_SECONDS = 10.0  # minimum time to write a checkpoint
BINDING = r"autobind=(\w+)"  # of TaskPluginParam


def settings(config: Mapping[str, str], site: Site) -> Iterator[Finding]:
    """Findings on the settings of Slurm that decide how nodes and jobs start and end."""
    kill = _number(config.get("KillWait", ""))
    if kill < SAVE_SECONDS:
        lead = "a cancelled or preempted node loses the steps since its last checkpoint: lower `loop.checkpoint_steps`"
        yield Finding(f"Slurm kills a job {kill:.0f} s after it asks it to end (KillWait)", False, lead)
    else:
        yield Finding(f"a cancelled or preempted job has {kill:.0f} s to save (KillWait)")
    track, epilog = config.get("ProctrackType", ""), config.get("Epilog", "(null)")
    if "cgroup" in track or "pgid" in track:
        yield Finding(f"{track} ends all processes of a job")
    elif epilog not in ("(null)", ""):
        yield Finding(f"{track} lets daemons survive their job; the site's epilog must end them")
    else:
        ask = "raylab's agent ends Ray's daemons unless it is killed itself: ask for proctrack/cgroup"
        yield Finding(f"{track} lets daemons survive their job", False, ask)
    if _number(config.get("JobRequeue", "1")) == 0:
        yield Finding("the site does not requeue jobs by default (JobRequeue=0); raylab's jobs request it (--requeue)")
    if bound := re.search(BINDING, config.get("TaskPluginParam", ""), re.IGNORECASE):
        alone = f"Slurm binds a step to single {bound[1]} by default (TaskPluginParam=autobind)"
        yield Finding(f"{alone}; raylab's steps request all CPUs of their job (SRUN_CPUS_PER_TASK)")


def partitions(slurm: Slurm, site: Site, config: Mapping[str, str], now: datetime) -> Iterator[Finding]:
    """Findings on each partition of the site: whether it exists and is up, its limits, nodes and reservations."""
    try:
        known = inventory.read_partitions(slurm)
        maintenances = inventory.read_maintenances(slurm)
    except RaylabError as error:
        yield Finding.of(error)
        return
    named = {kind: node.partition or site.partition for kind, node in sites.node_types(site).items()}
    default = next((name for name, fields in known.items() if fields.get("Default") == "YES"), None)
    kinds: dict[str, list[str]] = {}
    for kind, names in named.items():
        for name in filter(None, (names or default or "").split(",")):
            kinds.setdefault(name, []).append(kind)
    for name, used in kinds.items():
        if name not in known:
            yield Finding(
                f"Slurm does not know the partition '{name}'", False,
                f"correct `partition` of the site: {', '.join(sorted(known))}",
            )  # fmt: skip
            continue
        yield from partition(name, known[name], site)
        if known[name].get("State") != "UP":
            continue
        try:
            nodes = inventory.read_nodes(slurm, name)
        except RaylabError as error:
            yield Finding.of(error)
            continue
        types = {kind: sites.node_types(site)[kind] for kind in used}
        yield from gpu_types(name, nodes, types)
        if inventory.allocates_whole_nodes(known[name], config):
            yield from whole_nodes(name, nodes, types, site.whole_nodes)
        yield from maintenance(name, nodes, maintenances, site, now)


def partition(name: str, fields: Mapping[str, str], site: Site) -> Iterator[Finding]:
    """Findings on one partition, from `scontrol show partition`."""
    if fields.get("State") != "UP":
        yield Finding(f"partition {name} is {fields.get('State', 'unknown')}", False, "`sinfo` shows which are up")
        return
    limit = inventory.limit_seconds(fields)
    if limit is not None and sites.seconds(site.time) > limit:
        shown = fields["MaxTime"]
        yield Finding(f"partition {name} has a time limit of {shown}", False, f"set `time` of the site to {shown}")
    mode, grace = fields.get("PreemptMode", "OFF").split(",")[-1], _number(fields.get("GraceTime", "0"))
    if mode in ("SUSPEND", "GANG"):
        stop = "Ray treats a suspended node as dead: choose a partition whose jobs are not suspended"
        yield Finding(f"jobs in partition {name} can be suspended by other jobs", False, stop)
    elif mode in ("REQUEUE", "CANCEL"):
        yield Finding(f"partition {name} is up; its jobs may be preempted after a grace time of {grace:.0f} s")
    else:
        yield Finding(f"partition {name} is up; its jobs are not preempted")
    oversubscribed = fields.get("OverSubscribe", "NO")
    if oversubscribed.startswith("FORCE"):
        yield Finding(f"partition {name} runs several jobs on the same cores", False, "choose another partition")


def gpu_types(name: str, nodes: Sequence[Node], types: Mapping[str, NodeType]) -> Iterator[Finding]:
    """Findings on node types that name no type of GPU where there are several, or one that no node has."""
    here = sorted({kind for node in nodes for kind in node.gpus if kind})
    for kind, node in types.items():
        if not node.gpus or not here:
            continue
        right = f"set `gpu_type` of node type {kind} to one of: {', '.join(here)}"
        if node.gpu_type is None and len(here) > 1:
            several = f"partition {name} has GPUs of several types ({', '.join(here)}), and node type {kind} names none"
            yield Finding(several, False, right)
        elif node.gpu_type is not None and node.gpu_type not in here:
            yield Finding(f"no node of partition {name} has GPUs of type '{node.gpu_type}'", False, right)


def whole_nodes(name: str, nodes: Sequence[Node], types: Mapping[str, NodeType], is_known: bool) -> Iterator[Finding]:
    """Findings on jobs that use a part of the whole nodes which they get, and are billed for: the head's, unless the
    site says so (`is_known`), and those of node types."""
    if not nodes:
        return
    cpus, memory_mb = min(node.cpus for node in nodes), min(node.memory_mb for node in nodes)
    gpus = min(sum(node.gpus.values()) for node in nodes)
    size = f"{cpus} CPUs, {memory_mb} MB, {gpus} GPUs"
    whole = f"partition {name} allocates whole nodes, of at least {size}"
    if is_known or "head" not in types:
        yield Finding(whole)
    else:
        head = "set `whole_nodes = true` of the site: the head then shares the first worker's node"
        yield Finding(f"{whole}, and a head would be billed one of its own", False, head)
    for kind, node in types.items():
        if kind == "head" or (node.cpus >= cpus and node.gpus >= gpus):
            continue
        part = f"{node.cpus} CPUs, {node.memory_mb} MB, {node.gpus} GPUs"
        yield Finding(
            f"node type {kind} uses {part} of a whole node of partition {name}, which is billed in full",
            False,
            f"describe the whole node: cpus = {cpus}, memory_mb = {memory_mb}, gpus = {gpus}",
        )


def maintenance(
    name: str, nodes: Sequence[Node], maintenances: Sequence[Maintenance], site: Site, now: datetime
) -> Iterator[Finding]:
    """Findings on maintenances of all nodes of a partition that begin before a job submitted now would end."""
    names = {node.name for node in nodes}
    for one in maintenances:
        left = (one.start - now).total_seconds()
        if not names or not names <= one.nodes or left > sites.seconds(site.time):
            continue
        span = f"from {one.start:%Y-%m-%d %H:%M} to {one.end:%Y-%m-%d %H:%M}"
        what = f"all nodes of partition {name} are reserved for maintenance ({one.name}) {span}"
        later = f"start after {one.end:%Y-%m-%d %H:%M}"
        if left < 2 * site.lead_seconds:
            yield Finding(f"{what}; jobs wait until then", False, later)
            continue
        limit = f"{int(left // 3600):02d}:{int(left % 3600 // 60):02d}:00"
        wait = f"{what}; jobs of {site.time} would wait for its end"
        yield Finding(wait, False, f"raylab cluster up --time {limit} ends before it, or {later}")


def accounting(slurm: Slurm, config: Mapping[str, str], site: Site) -> Iterator[Finding]:
    """Findings on the user's accounts and numbers of jobs, where Slurm keeps accounts and shows them to its users."""
    if config.get("AccountingStorageType", "").endswith("/none"):
        return
    accounts = inventory.read_accounts(slurm)
    if accounts is None:
        return
    if site.account is not None and site.account not in accounts:
        right = f"set `account` of the site to one of: {', '.join(accounts)}" if accounts else "ask for an account"
        yield Finding(f"you have no account '{site.account}' in Slurm", False, right)
        return
    yield from job_limits(inventory.read_limits(slurm, site.account, site.qos))


def job_limits(limits: Sequence[Limit]) -> Iterator[Finding]:
    """A finding on the smallest number of jobs of this user that may run at a time: a cluster is a head and workers."""
    if not limits:
        return
    limit = min(limits, key=lambda limit: limit.jobs)
    jobs = f"{limit.rule} lets you run {limit.jobs} job(s) at a time"
    if limit.jobs < 2:
        other = f"set `qos` of the site to one of: {', '.join(limit.others)}" if limit.others else "ask for more"
        few = "and a cluster has one for its head and one for each worker"
        yield Finding(f"{jobs}, {few}", False, f"{other}; raylab cluster up --static N is a single job")
    else:
        yield Finding(f"{jobs}: a cluster of a head and at most {limit.jobs - 1} workers (--max {limit.jobs - 1})")


def _number(text: str) -> float:
    match = re.match(r"\d+", text)
    return float(match[0]) if match else 0.0
