"""The job scripts of one cluster: jobscript.py applied to the cluster's specification."""

from pathlib import Path

from cluster import jobscript
from cluster.directory import Directory
from cluster.job_tag import JobTag
from cluster.sites import NodeType
from cluster.spec import ClusterSpec
from raylab.files import atomic_write

LOGIN = "mlflow-login.json"  # in a cluster's directory, 0600: the login of the tracking server, if it needs one


def login(has_login: bool, directory: Path) -> dict[str, str]:
    """The variable that points `tracking` to the cluster's login file, if the cluster has one."""
    return {"RAYLAB_MLFLOW_LOGIN": str(directory / LOGIN)} if has_login else {}


def environment(spec: ClusterSpec, directory: Path) -> dict[str, str]:
    """The environment of every process on a node: where code, runs and token are."""
    return {
        "PYTHONPATH": spec.code,
        "RAYLAB_HOME": spec.home,
        **({"RAYLAB_HOME_GROUP": spec.group} if spec.group else {}),
        "RAYLAB_CLUSTER": spec.name,
        "RAYLAB_CODE_REVISION": spec.revision,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # nodes have no network from which to build environments
        "RAY_USAGE_STATS_ENABLED": "0",
        **({"RAYLAB_IMAGE_DIGEST": spec.image_digest} if spec.image_digest else {}),
        **({"MLFLOW_TRACKING_URI": spec.tracking} if spec.tracking else {}),
        **login(spec.login, directory),
    }


def agent(spec: ClusterSpec, directory: Path, role: str, generation: int, kind: str = "") -> list[str]:
    """The command of a node's agent."""
    words = [spec.python, "-m", "cluster.node.agent", str(directory), role, "--generation", str(generation)]
    return [*words, "--type", kind] if kind else words


def text(directory: Path, spec: ClusterSpec, tag: JobTag) -> str:
    """The script of the head (kind "head"), of a worker, or of a static cluster (spec.static nodes)."""
    site = spec.site
    node: NodeType = site.nodes[tag.type] if tag.type else site.head
    return jobscript.script(
        site=site,
        node=node,
        tag=tag,
        job_name=f"raylab-{spec.name}-{tag.type if tag.kind == 'worker' or spec.static else tag.kind}",
        time=spec.time,
        log=directory / "logs",
        environment=environment(spec, directory),
        command=agent(spec, directory, "static" if spec.static else tag.kind, tag.generation, tag.type),
        nodes=spec.static or 1,
        proxy=Path(spec.code) / "cluster" / "slurm_proxy.py" if tag.kind == "head" else None,
    )


def worker(directory: Directory, tag: JobTag) -> Path:
    """Write the script of a worker; its path."""
    path = directory.scripts / f"{tag.type}-{tag.generation}-{tag.request or 'static'}.sbatch"
    with atomic_write(path) as beside:
        beside.write_text(text(directory.path, directory.spec, tag))
    return path
