"""The configuration files of Slurm and of a testbed's machines, rendered by pure functions from one dataclass."""

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun", "salloc", "sacct")
LONGEST = 60  # bytes of the root's path: Slurm puts sockets below it, whose paths may have 107


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
    network: str = "10.77.0"  # exists in the testbed's own network namespaces only: two testbeds may share it

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
    size = f"CPUs={plan.cpus} RealMemory={plan.memory} Gres=gpu:fake:{plan.gpus}"
    # proctrack/cgroup also finds daemons, such as Ray's; without cgroups the epilog does that
    tracking = (
        "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nJobAcctGatherType=jobacct_gather/linux"
        if plan.cgroups
        else "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/linux\n"
        f"JobAcctGatherParams=OverMemoryKill\nEpilog={plan.root}/lib/epilog.sh"
    )
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
JobRequeue=1
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
PartitionName=batch Nodes={every} Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=debug Nodes={every} MaxTime=30 PriorityTier=20 PreemptMode=OFF
PartitionName=preempt Nodes={every} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
"""


def gres_conf(plan: Plan) -> str:
    return f"NodeName=n[1-{plan.nodes}] Name=gpu Type=fake File={plan.root}/etc/gpu[0-{plan.gpus - 1}]\n"


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
    return "\n".join(lines + [f"{plan.network}.{number} n{number}" for number in range(1, plan.nodes + 1)]) + "\n"


def settings(plan: Plan) -> str:
    """The settings that machine.sh reads."""

    def array(paths: tuple[Path, ...]) -> str:
        return "(" + " ".join(shlex.quote(str(path)) for path in paths) + ")"

    return f"""\
nodes={shlex.quote(" ".join(plan.names))}
network={plan.network}
memory={plan.memory}
cgroup={plan.cgroup if plan.cgroups else ""}
shares={array(plan.shares)}
links={array(plan.links)}
"""


def task_prolog(plan: Plan) -> str:
    """The task prolog: Slurm runs it before every task and adds its output to the task's environment. It sets HOME to
    the shared disk, whatever HOME was at submission."""
    return f"#!/bin/sh\necho export HOME={shlex.quote(f'{plan.root}/shared/home')}\n"


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
