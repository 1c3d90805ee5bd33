"""Text that leaves the program: job scripts and Ray's autoscaling configuration. Pure functions, tested as text."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site
from cluster.slurm import SECRETS
from raylab.errors import UsageError

# Nothing of the submitting shell's own clusters may reach a node
VISIBLE = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")  # which GPUs, from Slurm
FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", *SECRETS, "RAY_JOB_ID", "CUDA_VISIBLE_DEVICES")


def script(
    site: Site,
    node: NodeType,
    tag: JobTag,
    job_name: str,
    time: str,
    log: Path,
    environment: Mapping[str, str],
    command: Sequence[str],
    nodes: int = 1,
    requeue: bool = True,
    door: Path | None = None,
) -> str:
    """A job that runs `command` once on each of `nodes` nodes, as a step that gets Slurm's signals.

    Slurm signals a step's own process, not that one's children: so the node agent is told of a limit (USR1) or a
    preemption (TERM) and Ray is not. The shell ignores both, or it would end the job before the agent has left.
    `door`: where cluster/slurm_proxy.py lies, for a command in an image that calls Slurm.
    """
    options = {
        **_options(site, node, tag, job_name, time, nodes),
        "signal": f"USR1@{site.lead_seconds}",
        "output": str(log).replace("%", "%%") + "/%x-%j.out",
        "open-mode": "append",
        "chdir": str(log),  # not where sbatch was called: that may exist on another node only
    }
    lines = [f"#SBATCH --{name}={quoted(value)}" for name, value in options.items()]
    lines += [f"#SBATCH {'--requeue' if requeue else '--no-requeue'}"]
    lines += [f"#SBATCH {option}" for option in (*site.sbatch, *node.sbatch)]
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "trap '' TERM USR1  # they are for the agent; this shell outlives it",
            f"unset {' '.join(FOREIGN)}",
            *_surroundings(site, environment),
            *_behind(site, door, shlex.join([*srun, *_inside(site, node, environment, command)])),
            "",
        ]
    )


def step(
    site: Site,
    node: NodeType,
    tag: JobTag,
    job_name: str,
    time: str,
    environment: Mapping[str, str],
    command: Sequence[str],
    nodes: int,
) -> list[str]:
    """The srun command that runs `command` on `nodes` nodes from here, in the surroundings that a job would give it.

    Its caller takes FOREIGN out of the environment: in the step, Slurm has set some of these anew.
    """
    options = _options(site, node, tag, job_name, time, nodes)
    further = [word for option in (*site.sbatch, *node.sbatch) for word in shlex.split(option)]
    named = [f"--{name}={value}" for name, value in options.items()]
    return ["srun", *named, "--chdir=/", *further, *shell(site, node, environment, command)]


def shell(site: Site, node: NodeType, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """`command` as a job of the site would run it, with its setup and in its image, as the words of a step."""
    lines = [*_surroundings(site, environment), "exec " + shlex.join(_inside(site, node, environment, command))]
    return ["bash", "-c", "\n".join(lines)]


def _options(site: Site, node: NodeType, tag: JobTag, job_name: str, time: str, nodes: int) -> dict[str, str]:
    """What Slurm is asked for, by the names of its options; what the site does not say is left out."""
    asked = {
        "job-name": job_name,
        "comment": str(tag),
        "partition": node.partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "time": time,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": node.cpus,
        "mem": f"{node.memory_mb}M",
        "gres": _gres(node),
        "constraint": node.features,
    }
    return {name: str(value) for name, value in asked.items() if value is not None}


def _surroundings(site: Site, environment: Mapping[str, str]) -> list[str]:
    """Shell lines before the command: the site's setup, and then our variables."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in {**site.environment, **environment}.items()]
    return ["umask 077", *site.setup, *exports]


def quoted(text: str) -> str:
    """`text` as one word of an #SBATCH line: in double quotes where sbatch would split or read on.

    Raises UsageError for a line break, which no quotes can hold there.
    """
    if "\n" in text or "\r" in text:
        raise UsageError(f"{text!r} has a line break", "a job's options are lines of its script", "take it out")
    if text and not set(text) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./,:@%"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _gres(node: NodeType) -> str | None:
    if not node.gpus:
        return None
    return ":".join(filter(None, ("gpu", node.gpu_type, str(node.gpus))))


def _behind(site: Site, door: Path | None, line: str) -> list[str]:
    """`line`, while the door to Slurm's commands is open on this node, where the site has an image."""
    if site.image is None or door is None:
        return [line]
    return [
        f"door=$(mktemp -d {shlex.quote(site.scratch)}/rdXXXXXX) || exit 1",
        f'python3 {shlex.quote(str(door))} "$door" & server=$!',
        'until [ -S "$door/door" ]; do kill -0 $server 2>/dev/null || exit 1; sleep 0.1; done',
        'export RAYLAB_DOOR="$door/door"',
        line,
        "code=$?",
        'kill -9 $server; rm -rf "$door"; exit $code  # as it, too, ignores TERM: the head calls Slurm to the last',
    ]


# What a step does on each node of a site with an image. Its own environment is what Slurm set and this file exported;
# apptainer hands on what is named APPTAINERENV_*. /tmp and scratch inside are a directory of this step's own, in which
# Ray's socket paths stay short. bash hands on Slurm's signals, and removes that directory.
CONTAINER = """\
scratch=$1 image=$2; shift 2
private=$(mktemp -d "$scratch/rlXXXXXX") || exit 1
mount() { printf 'type=bind,"source=%s","destination=%s"' "${1//\\"/\\"\\"}" "${2//\\"/\\"\\"}"; }
options=(--mount "$(mount "$private" /tmp)")
[ "$scratch" = /tmp ] || options+=(--mount "$(mount "$private" "$scratch")")
while IFS= read -r -d '' pair; do
  case ${pair%%=*} in PATTERN) export "APPTAINERENV_$pair" ;; esac
done < <(env -0)
if [ -S "${RAYLAB_DOOR:-}" ]; then
  mkdir "$private/door"
  options+=(--mount "$(mount "${RAYLAB_DOOR%/*}" /tmp/door)")
  export APPTAINERENV_RAYLAB_DOOR=/tmp/door/door
fi
while [ "$1" != -- ]; do options+=("$1"); shift; done
shift
apptainer run --cleanenv --containall --pid "${options[@]}" "$image" "$@" <&0 & child=$!
trap 'kill -USR1 $child' USR1
trap 'kill -TERM $child' TERM
code=127
while wait $child; got=$?; [ $got != 127 ]; do code=$got; [ $got -gt 128 ] || break; done
rm -rf "$private"
exit $code
"""


def _inside(site: Site, node: NodeType, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """`command`, in the site's image where it has one: clean environment, explicit binds, an init that reaps."""
    if site.image is None:
        return list(command)
    seen = [site.shared, environment.get("RAYLAB_HOME"), environment.get("PYTHONPATH"), *site.bind]
    options = ["--nv"] if node.gpus else []
    for path in dict.fromkeys(filter(None, seen)):
        options += ["--mount", _mount(path)]
    pattern = "|".join(["SLURM_*", *VISIBLE, *site.environment, *environment])
    return [
        "bash",
        "-c",
        CONTAINER.replace("PATTERN", pattern),
        "raylab",
        site.scratch,
        site.image,
        *options,
        "--",
        *command,
    ]


def _mount(path: str) -> str:
    """A directory at its own path, in the CSV of apptainer's --mount, which holds any name."""
    quoted = path.replace('"', '""')
    return f'type=bind,"source={quoted}","destination={quoted}"'


def resources(node: NodeType) -> dict[str, int]:
    """What Ray is told of a node before it is there. Memory is left out: no task of ours asks for it."""
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})


def capacity(nodes: Mapping[str, NodeType], limit: int) -> list[dict[str, Any]]:
    """The largest this cluster can be, a node type a row: [{"count", "resources"}], for clamping requests."""
    return [{"count": min(limit, node.max or limit), "resources": resources(node)} for node in nodes.values()]


def autoscaling(
    name: str, directory: Path, generation: int, nodes: Mapping[str, NodeType], low: int, high: int, idle_seconds: float
) -> str:
    """Ray's autoscaling configuration (JSON, which is YAML): our node provider, and every key Ray insists on.

    `low` nodes of the first type are kept, `high` is the most of all types together.
    """
    types: dict[str, Any] = {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
    }
    for at, (kind, node) in enumerate(nodes.items()):
        types[kind] = {
            "resources": resources(node),
            "node_config": {"type": kind},
            "min_workers": low if at == 0 else 0,
            "max_workers": min(high, node.max or high),
            "idle_timeout_s": idle_seconds,
        }
    return json.dumps(
        {
            "cluster_name": name,
            "max_workers": high,
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": max(1, round(idle_seconds / 60)),
            "provider": {
                "type": "external",
                "module": "cluster.provider.SlurmProvider",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "directory": str(directory),
                "generation": generation,
            },
            "available_node_types": types,
            "head_node_type": "head",
            "auth": {},
            "docker": {},
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
        },
        indent=1,
    )
