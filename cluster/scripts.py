"""The job scripts of one cluster: text of jobscript.py with what its directory says, where `status` finds it."""

from pathlib import Path
from typing import Any

from cluster import jobscript
from cluster.directory import Comment, Directory
from cluster.sites import NodeType, Site
from raylab.files import whole

LOGIN = "mlflow-login.json"  # of a cluster's directory, 0600: what the tracking server wants to see, if anything


def login(asked: dict[str, Any], directory: Path) -> dict[str, str]:
    """The variable that tells `tracking` of the cluster's login file, where there is one."""
    return {"RAYLAB_MLFLOW_LOGIN": str(directory / LOGIN)} if asked.get("login") else {}


def environment(asked: dict[str, Any], directory: Path) -> dict[str, str]:
    """What every process on a node finds: where the code, the runs and the token are."""
    return {
        "PYTHONPATH": asked["code"],
        "RAYLAB_HOME": asked["home"],
        **({"RAYLAB_HOME_GROUP": asked["group"]} if asked.get("group") else {}),
        "RAYLAB_CLUSTER": asked["name"],
        "RAYLAB_CODE_REVISION": asked["revision"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # nodes have no network to make environments from
        "RAY_USAGE_STATS_ENABLED": "0",
        **({"RAYLAB_IMAGE_DIGEST": asked["image_digest"]} if asked.get("image_digest") else {}),
        **({"MLFLOW_TRACKING_URI": asked["tracking"]} if asked["tracking"] else {}),
        **login(asked, directory),
    }


def agent(asked: dict[str, Any], directory: Path, role: str, epoch: int, kind: str = "") -> list[str]:
    """The command of a node's agent."""
    words = [asked["python"], "-m", "cluster.node.agent", str(directory), role, "--epoch", str(epoch)]
    return [*words, "--type", kind] if kind else words


def text(directory: Path, asked: dict[str, Any], comment: Comment) -> str:
    """The script of the head (kind "head"), of a worker, or of a static cluster (asked["static"] nodes)."""
    site = Site.model_validate(asked["site"])
    node: NodeType = site.head if comment.kind == "head" else site.nodes[comment.type]
    role = comment.kind
    if static := asked["static"]:
        node, role = site.nodes[comment.type], "static"
    return jobscript.script(
        site=site,
        node=node,
        comment=comment,
        job_name=f"raylab-{asked['name']}-{comment.type or comment.kind}",
        time=asked["time"],
        log=directory / "logs",
        environment=environment(asked, directory),
        command=agent(asked, directory, role, comment.epoch, comment.type),
        nodes=static or 1,
        door=Path(asked["code"]) / "cluster" / "slurm_proxy.py" if comment.kind == "head" else None,
    )


def worker(directory: Directory, comment: Comment) -> Path:
    """Write the script of a worker; its path."""
    path = directory.scripts / f"{comment.type}-{comment.epoch}-{comment.request or 'static'}.sbatch"
    with whole(path) as beside:
        beside.write_text(text(directory.path, directory.asked, comment))
    return path
