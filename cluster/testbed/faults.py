"""Faults of foreign sites that a testbed can be started with: what a centre does differently from the testbed."""

from collections.abc import Iterable
from enum import StrEnum

from raylab.errors import unknown


class Fault(StrEnum):
    """The value is the name on the command line."""

    ONE_CORE_AFFINITY = "one-core-affinity"
    WRONG_INTERFACE = "wrong-interface"
    WHOLE_NODES = "whole-nodes"
    TYPED_GRES = "typed-gres"
    MISSING_ACCOUNT = "missing-account"
    JOB_LIMIT = "job-limit"
    NO_REQUEUE = "no-requeue"
    QUOTA_FULL = "quota-full"
    MAINTENANCE = "maintenance"
    TWO_PYTHONS = "two-pythons"
    CLOCK_SKEW = "clock-skew"
    LONG_SCRATCH = "long-scratch"


ABOUT = {
    Fault.ONE_CORE_AFFINITY: "a step is bound to one core unless it asks for more (TaskPluginParam=autobind=cores)",
    Fault.WRONG_INTERFACE: "between nodes only ib0 is open; at the addresses of their names, only Slurm's port is",
    Fault.WHOLE_NODES: "a job gets whole nodes, whatever it asks for (OverSubscribe=EXCLUSIVE)",
    Fault.TYPED_GRES: "nodes have GPUs of two types, and a job must name one",
    Fault.MISSING_ACCOUNT: "a job must name an account",
    Fault.JOB_LIMIT: "the default QOS lets a user run one job at a time; another one has no limit",
    Fault.NO_REQUEUE: "jobs are not requeued unless they ask for it (JobRequeue=0)",
    Fault.QUOTA_FULL: "the home directory has no space left",
    Fault.MAINTENANCE: "all nodes are reserved for maintenance in ten minutes",
    Fault.TWO_PYTHONS: "the same path is another Python on the nodes than on the login node",
    Fault.CLOCK_SKEW: "the clocks of programs on the nodes are 90 s ahead",
    Fault.LONG_SCRATCH: "/tmp of a node is small, and its scratch (TMPDIR) has a long path",
}


def parse(names: Iterable[str]) -> frozenset[Fault]:
    """The faults of these names. Raises UsageError, with the right names, for any other."""
    known = {fault.value: fault for fault in Fault}
    for name in names:
        if name not in known:
            raise unknown("fault", name, known)
    return frozenset(known[name] for name in names)
