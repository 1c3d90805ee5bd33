"""Renders job scripts: pure functions, tested as text."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site
from cluster.slurm import SECRETS
from raylab.errors import UsageError

# Variables of the submitting shell's own clusters, which must not reach a node
VISIBLE = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")  # which GPUs, from Slurm
FOREIGN = (
    "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", *SECRETS, "RAY_JOB_ID", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)  # fmt: skip

# Since Slurm 22.05 a step does not inherit its job's CPUs per task: where Slurm binds tasks to cores, it would get one
# core. It gets all CPUs of the job on the node that has the fewest, as many as a partition of whole nodes allocates.
CPU_LINES = (
    r"""cpus=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sort -n | head -n 1)  # of a list such as 4(x2),8""",
    'export SRUN_CPUS_PER_TASK="${cpus%(*}"',
    "unset SLURM_TRES_PER_TASK  # srun 23.11 and newer ends if it names another number of CPUs",
)


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
    proxy: Path | None = None,
) -> str:
    """A job that runs `command` once on each of `nodes` nodes, as a step that gets Slurm's signals.

    Slurm signals a step's own process, not its children: the node agent receives the warning of a limit (USR1) or a
    preemption (TERM), and Ray does not. The shell ignores both; otherwise it would end the job before the agent has
    drained. `proxy`: the path of cluster/slurm_proxy.py, for a command in an image that calls Slurm.
    """
    options = {
        **_options(site, node, tag, job_name, time, nodes),
        "signal": f"USR1@{site.lead_seconds}",
        "output": str(log).replace("%", "%%") + "/%x-%j.out",
        "open-mode": "append",
        "chdir": str(log),  # not the directory of sbatch, which may not exist on this node
    }
    lines = [f"#SBATCH --{name}={quoted(value)}" for name, value in options.items()]
    lines += [f"#SBATCH {'--requeue' if requeue else '--no-requeue'}"]
    lines += [f"#SBATCH {option}" for option in (*site.sbatch, *node.sbatch)]
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    srun = [*srun, '--cpus-per-task="$SRUN_CPUS_PER_TASK"', shlex.join(_in_image(site, node, environment, command))]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "trap '' TERM USR1  # these signals are for the agent; this shell outlives it",
            f"unset {' '.join(FOREIGN)}",
            *_setup_lines(site, environment),
            *CPU_LINES,
            *_with_proxy(site, proxy, " ".join(srun)),
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
    """The srun command that runs `command` on `nodes` nodes from here, with the setup and the image of a job.

    The caller removes FOREIGN from the environment; Slurm sets some of these variables again in the step.
    """
    options = _options(site, node, tag, job_name, time, nodes)
    further = [word for option in (*site.sbatch, *node.sbatch) for word in shlex.split(option)]
    named = [f"--{name}={value}" for name, value in options.items()]
    return ["srun", *named, "--chdir=/", *further, *shell(site, node, environment, command)]


def shell(site: Site, node: NodeType, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """The words of a step that runs `command` as a job of the site would: with its setup and in its image."""
    lines = [*_setup_lines(site, environment), "exec " + shlex.join(_in_image(site, node, environment, command))]
    return ["bash", "-c", "\n".join(lines)]


def _options(site: Site, node: NodeType, tag: JobTag, job_name: str, time: str, nodes: int) -> dict[str, str]:
    """Slurm's options by name; those that the site does not set are left out."""
    options = {
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
    return {name: str(value) for name, value in options.items() if value is not None}


def _setup_lines(site: Site, environment: Mapping[str, str]) -> list[str]:
    """Shell lines before the command: the site's setup, then raylab's variables."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in {**site.environment, **environment}.items()]
    return ["umask 077", *site.setup, *exports]


def quoted(text: str) -> str:
    """`text` as one word of an #SBATCH line: in double quotes where sbatch would split it.

    Raises UsageError for a line break, which cannot be quoted there.
    """
    if "\n" in text or "\r" in text:
        raise UsageError(f"{text!r} has a line break", "each option of a job is one line of its script", "remove it")
    if text and not set(text) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./,:@%"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _gres(node: NodeType) -> str | None:
    if not node.gpus:
        return None
    return ":".join(filter(None, ("gpu", node.gpu_type, str(node.gpus))))


def _with_proxy(site: Site, proxy: Path | None, line: str) -> list[str]:
    """`line`, with the proxy of Slurm's commands running beside it if the site has an image."""
    if site.image is None or proxy is None:
        return [line]
    return [
        f"proxy=$(mktemp -d {shlex.quote(site.scratch)}/rdXXXXXX) || exit 1",
        f'python3 {shlex.quote(str(proxy))} "$proxy" & server=$!',
        'until [ -S "$proxy/socket" ]; do kill -0 $server 2>/dev/null || exit 1; sleep 0.1; done',
        'export RAYLAB_SLURM_PROXY="$proxy/socket"',
        line,
        "code=$?",
        'kill -9 $server; rm -rf "$proxy"; exit $code  # it ignores TERM too: the head calls Slurm until its end',
    ]


# Runs a step on each node of a site with an image. Its environment consists of Slurm's variables and those exported
# above; apptainer passes on variables named APPTAINERENV_*. /tmp and scratch inside are a directory of this step, in
# which Ray's socket paths stay short; a path below them is mounted into it. bash forwards Slurm's signals and removes
# that directory.
CONTAINER = """\
scratch=$1 image=$2; shift 2
private=$(mktemp -d "$scratch/rlXXXXXX") || exit 1
mount() { printf 'type=bind,"source=%s","destination=%s"' "${1//\\"/\\"\\"}" "${2//\\"/\\"\\"}"; }
options=(--mount "$(mount "$private" /tmp)")
[ "$scratch" = /tmp ] || options+=(--mount "$(mount "$private" "$scratch")")
while IFS= read -r -d '' pair; do
  case ${pair%%=*} in PATTERN) export "APPTAINERENV_$pair" ;; esac
done < <(env -0)
if [ -S "${RAYLAB_SLURM_PROXY:-}" ]; then
  mkdir "$private/slurm-proxy"
  options+=(--mount "$(mount "${RAYLAB_SLURM_PROXY%/*}" /tmp/slurm-proxy)")
  export APPTAINERENV_RAYLAB_SLURM_PROXY=/tmp/slurm-proxy/socket
fi
while [ "$1" != -- ]; do
  for place in /tmp "$scratch"; do case $1 in "$place"/*) mkdir -p "$private/${1#"$place"/}" ;; esac; done
  case $1 in -*) options+=("$1") ;; *) options+=(--mount "$(mount "$1" "$1")") ;; esac
  shift
done
shift
apptainer run --cleanenv --containall --pid "${options[@]}" "$image" "$@" <&0 & child=$!
trap 'kill -USR1 $child' USR1
trap 'kill -TERM $child' TERM
code=127
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done  # a signal ends `wait`, too
wait $child; got=$?; [ $got = 127 ] || code=$got
rm -rf "$private"
exit $code
"""


def _in_image(site: Site, node: NodeType, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """`command`, in the site's image if it has one: clean environment, explicit binds, an init that reaps processes."""
    if site.image is None:
        return list(command)
    paths = [site.shared, environment.get("RAYLAB_HOME"), environment.get("PYTHONPATH"), *site.bind]
    options = ["--nv"] if node.gpus else []
    pattern = "|".join(["SLURM_*", *VISIBLE, *site.environment, *environment])
    return [
        "bash",
        "-c",
        CONTAINER.replace("PATTERN", pattern),
        "raylab",
        site.scratch,
        site.image,
        *options,
        *dict.fromkeys(filter(None, paths)),
        "--",
        *command,
    ]
