"""The configuration files of Slurm and of a testbed's machines, rendered by pure functions from one dataclass."""

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.testbed.faults import Fault

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun", "salloc", "sacct", "sacctmgr")
LONGEST = 60  # bytes of the root's path: Slurm puts sockets below it, whose paths may have 107
FULL_MB, SMALL_MB = 1, 64  # of a home directory that is full, and of a small /tmp
LONG_SCRATCH = "/run/node-local-scratch/of-this-cluster/jobs"
ACCOUNT = "lungs"  # the only one, where a job must name its account
QOS = "large"  # without the limit on jobs of the default one
MAINTENANCE_MINUTES = 10  # until the maintenance begins
SKEW_SECONDS = 90  # munge refuses credentials only after 300 s


@dataclass(frozen=True)
class Plan:
    """A login node `ctl`, which is also the controller, and equal nodes n1, n2, ...

    Memory is in MB and limits a node's cgroup if `cgroups` is true. More CPUs may be declared than the host has.
    `shares` are directories and `links` symbolic links below the private /tmp that the nodes can also see.
    """

    root: Path
    nodes: int = 3
    cpus: int = 4
    memory: int = 8000
    gpus: int = 2
    cgroups: bool = True
    shares: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()
    accounting: bool = False  # accounting.py
    network: str = "10.77.0"  # exists in the testbed's own network namespaces only: two testbeds may share it
    fast_network: str = "10.78.0"  # of ib0, which nodes have with WRONG_INTERFACE
    faults: frozenset[Fault] = frozenset()
    python: Path | None = None  # with TWO_PYTHONS: a path that is `other_python` on the nodes
    other_python: Path | None = None

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def cgroup(self) -> str:
        """The name of the testbed's cgroup, derived from the root's path."""
        return "raylab-testbed-" + hashlib.sha256(bytes(self.root)).hexdigest()[:12]


def slurm_conf(plan: Plan) -> str:
    """slurm.conf. Timeouts are short, because tests wait for them: a dead node is noticed after 10 s instead of 5
    minutes, a job has 15 s between TERM and KILL, a requeued job starts once its old credential has expired (5 s)."""
    every = f"n[1-{plan.nodes}]"
    gres = ",".join(f"gpu:{kind}:{count}" for kind, count in gpu_types(plan).items())
    size = f"CPUs={plan.cpus} RealMemory={plan.memory} Gres={gres}"
    one_core = Fault.ONE_CORE_AFFINITY in plan.faults
    plugins = [*(["task/affinity"] if one_core else []), *(["task/cgroup"] if plan.cgroups else [])]
    # proctrack/cgroup also finds daemons, such as Ray's; without cgroups the epilog does that
    tracking = (
        "ProctrackType=proctrack/cgroup\nJobAcctGatherType=jobacct_gather/linux"
        if plan.cgroups
        else "ProctrackType=proctrack/linuxproc\nJobAcctGatherType=jobacct_gather/linux\n"
        f"JobAcctGatherParams=OverMemoryKill\nEpilog={plan.root}/lib/epilog.sh"
    )
    tracking += f"\nTaskPlugin={','.join(plugins) or 'task/none'}"
    if one_core:
        tracking += "\nTaskPluginParam=autobind=cores"
    if job_submit(plan):
        tracking += "\nJobSubmitPlugins=lua"
    shared = " OverSubscribe=EXCLUSIVE" if Fault.WHOLE_NODES in plan.faults else ""
    return f"""\
ClusterName=testbed
SlurmctldHost=ctl({plan.network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
StateSaveLocation={plan.root}/state
SlurmdSpoolDir={plan.root}/nodes/%n/spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={plan.root}/log/slurmctld.log
SlurmdLogFile={plan.root}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
{tracking}
JobAcctGatherFrequency=task=2
TaskProlog={plan.root}/lib/task-prolog.sh
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory,CR_LLN
DefMemPerCPU={plan.memory // plan.cpus}
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=2,requeue_setup_env_fail
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue={int(Fault.NO_REQUEUE not in plan.faults)}
ReturnToService=2
KillWait=15
WaitTime=0
SlurmctldTimeout=10
SlurmdTimeout=10
MinJobAge=3600
JobCompType=jobcomp/filetxt
JobCompLoc={plan.root}/log/jobs.txt
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName={every} NodeAddr={plan.network}.[1-{plan.nodes}] {size}
PartitionName=batch Nodes={every} Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF{shared}
PartitionName=debug Nodes={every} MaxTime=30 PriorityTier=20 PreemptMode=OFF{shared}
PartitionName=preempt Nodes={every} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0{shared}
"""


def gpu_types(plan: Plan) -> dict[str, int]:
    """GPUs of a node by type."""
    if Fault.TYPED_GRES not in plan.faults:
        return {"fake": plan.gpus}
    return {"old": plan.gpus - plan.gpus // 2, "new": plan.gpus // 2}


def gres_conf(plan: Plan) -> str:
    lines, first = [], 0
    for kind, count in gpu_types(plan).items():
        files = f"{plan.root}/etc/gpu[{first}-{first + count - 1}]"
        lines.append(f"NodeName=n[1-{plan.nodes}] Name=gpu Type={kind} File={files}\n")
        first += count
    return "".join(lines)


def job_submit(plan: Plan) -> str:
    """job_submit.lua: the rules of a site for the options of a job; empty if it has none."""
    rules = ""
    if Fault.MISSING_ACCOUNT in plan.faults:
        rules += f"""\
  if job.account ~= "{ACCOUNT}" then
    slurm.log_user("every job needs the account of a project with compute time")
    return slurm.ESLURM_INVALID_ACCOUNT
  end
"""
    if Fault.TYPED_GRES in plan.faults:
        kinds = ", ".join(f"gpu:{kind}" for kind in gpu_types(plan))
        rules += f"""\
  local gres = tostring(job.tres_per_node or "")
  if gres:find("gpu") and not gres:find("gpu:%a") then
    slurm.log_user("the GPUs here are of several types, name one: {kinds}")
    return slurm.ERROR
  end
"""
    if not rules:
        return ""
    return f"""\
function slurm_job_submit(job, partitions, uid)
{rules}  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid)
  return slurm.SUCCESS
end
"""


def commands(plan: Plan) -> list[list[str]]:
    """The commands that the login node runs once all nodes are idle."""
    lists = []
    if Fault.JOB_LIMIT in plan.faults:
        lists.append(["add", "qos", QOS])
        lists.append(["modify", "user", "root", "set", f"qos=normal,{QOS}", "defaultqos=normal"])
        lists.append(["modify", "qos", "normal", "set", "MaxJobsPerUser=1"])
        lists = [["sacctmgr", "--immediate", *words] for words in lists]
    if Fault.MAINTENANCE in plan.faults:
        span = [f"StartTime=now+{MAINTENANCE_MINUTES}minutes", "Duration=120"]
        words = ["ReservationName=upgrade", *span, "Nodes=ALL", "Users=daemon", "Flags=MAINT,IGNORE_JOBS"]
        lists.append(["scontrol", "create", "reservation", *words])
    return lists


def cgroup_conf() -> str:
    """cgroup.conf. Memory limits are enforced, core limits are not, because more cores are declared than exist."""
    return """\
CgroupPlugin=cgroup/v1
CgroupAutomount=no
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
AllowedRAMSpace=100
"""


def hosts(plan: Plan) -> str:
    lines = ["127.0.0.1 localhost", f"{plan.network}.254 ctl"]
    lines += [f"{plan.network}.{number} n{number}" for number in range(1, plan.nodes + 1)]
    if Fault.WRONG_INTERFACE in plan.faults:  # the name in the fast network has a suffix, as at some centres
        lines += [f"{plan.fast_network}.{number} n{number}i" for number in range(1, plan.nodes + 1)]
    return "\n".join(lines) + "\n"


def settings(plan: Plan) -> str:
    """The settings that machine.sh reads; empty where a testbed does without."""

    def only(fault: Fault, value: object) -> str:
        return shlex.quote(str(value)) if fault in plan.faults else ""

    def array(paths: tuple[Path, ...]) -> str:
        return "(" + " ".join(shlex.quote(str(path)) for path in paths) + ")"

    return f"""\
nodes={shlex.quote(" ".join(plan.names))}
network={plan.network}
memory={plan.memory}
cgroup={plan.cgroup if plan.cgroups else ""}
fast_network={only(Fault.WRONG_INTERFACE, plan.fast_network)}
home_mb={only(Fault.QUOTA_FULL, FULL_MB)}
tmp_mb={only(Fault.LONG_SCRATCH, SMALL_MB)}
scratch={only(Fault.LONG_SCRATCH, LONG_SCRATCH)}
python={only(Fault.TWO_PYTHONS, plan.python)}
other_python={only(Fault.TWO_PYTHONS, plan.other_python)}
shares={array(plan.shares)}
links={array(plan.links)}
"""


def task_prolog(plan: Plan) -> str:
    """The task prolog: Slurm runs it before every task and adds its output to the task's environment. It sets HOME to
    the shared disk, whatever HOME was at submission."""
    variables = {"HOME": f"{plan.root}/shared/home"}
    if Fault.LONG_SCRATCH in plan.faults:
        variables["TMPDIR"] = LONG_SCRATCH
    if Fault.CLOCK_SKEW in plan.faults:
        variables["LD_PRELOAD"] = f"{plan.root}/lib/clock.so"
    lines = [f"echo export {shlex.quote(f'{name}={value}')}" for name, value in variables.items()]
    return "\n".join(["#!/bin/sh", *lines, ""])


def epilog() -> str:
    """The epilog for a host without cgroups: it kills all remaining processes of a job on its node, daemons too."""
    return """\
#!/bin/sh
for process in /proc/[0-9]*; do
  tr '\\0' '\\n' 2>/dev/null <"$process/environ" | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID" || continue
  [ "${process#/proc/}" = $$ ] || kill -9 "${process#/proc/}" 2>/dev/null
done
exit 0
"""


def shim(plan: Plan, command: Path) -> str:
    """A wrapper of a Slurm command for the host, which runs it on the login node. Jobs inherit the shell's PATH, so on
    a machine of the testbed the wrapper runs the command directly."""
    machine, root = shlex.quote(f"{plan.root}/lib/machine.sh"), shlex.quote(str(plan.root))
    return f'#!/bin/sh\nexec bash {machine} enter {root} here {shlex.quote(str(command))} "$@"\n'
