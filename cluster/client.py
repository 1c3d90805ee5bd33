"""Start a cluster from the login node, show its status, end it."""

import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster import autoscaling, image, scripts, sites
from cluster.bills import JobBook
from cluster.directory import Directory
from cluster.job_tag import JobTag
from cluster.sites import Site
from cluster.slurm import Job, Slurm
from cluster.spec import ClusterSpec, Hooks
from raylab.errors import SlurmError, UsageError, unknown
from raylab.files import locked

DOWN_SECONDS = 30.0
STALE_SECONDS = 30.0  # an older status.json is ignored


def make_spec(
    site: Site,
    home: Path,
    code: Path,
    name: str,
    low: int,
    high: int,
    types: list[str],
    time: str | None,
    static: int | None,
    revision: str,
    tracking: str,
    hooks: Hooks,
    python: str,
    login: bool = False,
    group: str = "",
    dedicated_head: bool = False,
) -> ClusterSpec:
    """The checked specification of a cluster. Raises UsageError if there cannot be such a cluster.

    `tracking`: an address without credentials; `login`: whether the cluster's directory holds credentials
    (scripts.LOGIN); `group`: the Unix group that may read runs of the home, if any; `dedicated_head`: the head has a
    node of its own even where nodes are allocated whole.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"'{name}' is not a valid cluster name", do="use letters, digits, '-' and '_'")
    if not 0 <= low <= high or high < 1:
        raise UsageError(f"--min {low} --max {high} is not a valid range of nodes", do="for example --min 0 --max 8")
    for kind in types:
        if kind not in site.nodes:
            raise unknown(f"node type of site '{site.name}':", kind, site.nodes)
    if static is not None and static < 1:
        raise UsageError(f"--static {static}: a cluster has at least one node", do="--static 2")
    limit = time or site.time
    sites.check(site, home, limit)
    types = types or list(site.nodes)[:1]
    shares_node = site.whole_nodes and not dedicated_head and not static
    if shares_node:
        check_shared_node(site, types[0])
    return ClusterSpec(
        name=name,
        id=secrets.token_hex(4),
        site=site,
        types=types,
        head_type=types[0] if shares_node or static else "",
        min=low,
        max=high,
        static=static or 0,
        time=limit,
        home=str(home),
        code=str(code),
        revision=revision,
        python=python_of(site, python),
        tracking=tracking,
        login=login,
        group=group,
        versions=image.node_versions(site),
        hooks=hooks,
    )


def check_shared_node(site: Site, kind: str) -> None:
    """Raise UsageError if a node of this type has no room for work beside the head."""
    node, head = site.nodes[kind], site.head
    if node.cpus <= head.cpus or node.memory_mb <= head.memory_mb:
        raise UsageError(
            f"node type '{kind}' of site '{site.name}' has no room for the head and a worker",
            f"it has {node.cpus} CPUs and {node.memory_mb} MB, of which the head takes {head.cpus} CPUs and "
            f"{head.memory_mb} MB (`head` of the site)",
            "give the type all that its nodes have, or start the cluster with --dedicated-head",
        )


def python_of(site: Site, here: str) -> str:
    """The Python of a site's nodes; `here`: the Python that runs this process."""
    return site.python or ("python" if site.image else here)


def dry_run(spec: ClusterSpec, directory: Path) -> dict[str, str]:
    """Every text that `up` would submit: {"head.sbatch", "TYPE.sbatch"..., "autoscaling.json"}."""
    texts = {"head.sbatch": scripts.text(directory, spec, head_tag(spec))}
    if not spec.static:
        for kind in spec.types:
            worker = JobTag(spec.id, 0, "worker", kind, "REQUEST")
            texts[f"{kind}.sbatch"] = scripts.text(directory, spec, worker)
        texts["autoscaling.json"] = autoscaling.configuration(spec, directory, 0)
    return texts


def head_tag(spec: ClusterSpec) -> JobTag:
    """The tag of the job that `up` submits."""
    return JobTag(spec.id, 0, "head", spec.head_type)


def up(
    spec: ClusterSpec, home: Path, slurm: Slurm, files: Mapping[str, str] = MappingProxyType({})
) -> tuple[Directory, str]:
    """Submit the head of a new cluster and return (its directory, the job's id).

    `files`: {name: text}, secrets that are written into its directory with mode 0600. Raises UsageError if a cluster of
    this name exists.
    """
    directory = Directory(home / "clusters" / spec.name)
    with locked(home / "clusters" / f".{spec.name}.lock"):
        if (directory.path / "cluster.json").is_file() and (alive := jobs(directory, slurm)):
            there = next(iter(alive))
            raise UsageError(
                f"cluster '{spec.name}' already exists (job {there.id}, {there.state.lower()})",
                do=f"raylab cluster status --name {spec.name}, or choose another --name",
            )
        limit = slurm.config().get("KillWait", "30 sec").split()[0]
        digest = ""
        if (file := spec.site.image) is not None:
            image.check_lock(file, image.read_lock(file), Path(spec.code))
            digest = image.hash_image(file)
        spec = spec.model_copy(update={"kill_seconds": int(limit), "image_digest": digest})
        directory.create(spec, files)
        script = directory.scripts / "head.sbatch"
        script.write_text(scripts.text(directory.path, spec, head_tag(spec)))
        try:
            job = slurm.submit(script)
        except (SlurmError, UsageError):
            shutil.rmtree(directory.path)
            raise
        directory.write_spec(spec.model_copy(update={"job": job}))
    return directory, job


def jobs(directory: Directory, slurm: Slurm) -> dict[Job, JobTag]:
    """The cluster's jobs that have not ended, with their tags, the head first."""
    id = directory.spec.id
    ours = [(c, job) for job in slurm.jobs() if (c := JobTag.parse(job.comment)) is not None and c.cluster == id]
    return {
        job: c
        for c, job in sorted(ours, key=lambda pair: pair[0].kind != "head")
        if job.alive or job.state == "COMPLETING"
    }


def status(directory: Directory, slurm: Slurm) -> dict[str, Any]:
    """{"name", "state", "head", "jobs", "nodes", "demand", "ray_jobs", "problems"} of a cluster now."""
    spec = directory.spec
    here = jobs(directory, slurm)
    by_id = {job.id: job for job in here}
    head, seen = directory.read("head"), directory.read("status") or {}
    leader = next((job for job, tag in here.items() if tag.kind == "head"), None)
    ready = (
        leader is not None and leader.running and head is not None
        and head["job"] == leader.id and head["generation"] == leader.restarts
    )  # fmt: skip
    fresh = ready and time.time() - seen.get("time", 0) < STALE_SECONDS
    if leader is None:
        state = "down"
    elif ready:
        state = "ready"
    else:
        state = "starting" if leader.running else "waiting"
    nodes = seen.get("nodes", []) if fresh else []
    return {
        "name": spec.name,
        "site": spec.site.name,
        "state": state,
        "head": head if ready else None,
        "jobs": [
            {
                "job": job.id,
                "kind": tag.kind,
                "type": tag.type,
                "state": job.state.lower(),
                "node": job.node,
                "seconds_left": job.left if job.running else None,
                "why": "" if job.running else job.why(),
            }
            for job, tag in here.items()
        ],
        "nodes": [{**node, "seconds_left": _left(node["instance"], by_id)} for node in nodes],
        "demand": seen.get("demand", []) if fresh else [],
        "ray_jobs": seen.get("jobs", []) if fresh else [],
        "problems": directory.problems(),
    }


def _left(instance: str, by_id: dict[str, Job]) -> float | None:
    job = by_id.get(instance.split(".")[0])
    return None if job is None else job.left


def wait(directory: Directory, slurm: Slurm, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Wait until the head is ready and report why it waits. Raises SlurmError if the head ends or the time is up."""
    deadline = time.monotonic() + seconds
    reported, silent = "", 0
    while time.monotonic() < deadline:
        try:
            now = status(directory, slurm)
        except SlurmError as error:  # unreachable for a moment; the head keeps running
            now, text = {"state": "unknown", "jobs": []}, error.what
        else:
            why = next((job["why"] for job in now["jobs"] if job["kind"] == "head"), "")
            text = {"waiting": f"the head waits in the queue: {why}", "starting": "the head is starting"}.get(
                now["state"], ""
            )
        if now["state"] == "ready":
            return now
        if now["state"] == "down":
            silent += 1
            if silent > 2:
                raise SlurmError(
                    f"the head of cluster '{directory.path.name}' has ended",
                    _why(directory, now),
                    f"read {directory.logs}",
                )  # fmt: skip
        if text and text != reported:
            tell(text)
            reported = text
        time.sleep(1.0)
    raise SlurmError(
        f"cluster '{directory.path.name}' is not ready after {seconds:.0f} s", reported,
        f"raylab cluster status --name {directory.path.name}",
    )  # fmt: skip


def _why(directory: Directory, now: dict[str, Any]) -> str:
    if now["problems"]:
        return str(now["problems"][0]["text"])
    outputs = sorted(directory.logs.glob("*.out"), key=lambda p: p.stat().st_mtime)
    if not outputs:
        return f"it left no output in {directory.logs}: is that directory shared with the compute nodes?"
    return " / ".join(outputs[-1].read_text(errors="replace").strip().splitlines()[-3:])


def down(directory: Directory, slurm: Slurm) -> dict[str, Any]:
    """Cancel all jobs of this cluster and no others; {"ended": jobs}. Raises SlurmError if a job remains after 30 s."""
    (directory.path / "down").touch()  # so that the head does not requeue itself
    ended: list[str] = []
    deadline = time.monotonic() + DOWN_SECONDS
    while True:
        here = jobs(directory, slurm)
        if not here:
            break
        if time.monotonic() > deadline:
            raise SlurmError(
                f"jobs {', '.join(job.id for job in here)} are still running after {DOWN_SECONDS:.0f} s",
                "Slurm has cancelled them; a node may not answer", f"squeue --jobs={','.join(job.id for job in here)}",
            )  # fmt: skip
        slurm.cancel([job.id for job in here if job.alive])
        ended += [job.id for job in here if job.id not in ended]
        time.sleep(0.5)
    JobBook(directory.path, directory.spec, slurm).note()
    for file in ("head.json", "status.json", "token", scripts.LOGIN, "cluster.json"):
        (directory.path / file).unlink(missing_ok=True)
    return {"name": directory.path.name, "ended": ended}
