"""What Ray may use on this node: the part of Slurm's allocation that this step can run on."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cluster.sites import NodeType
from raylab.errors import SlurmError
from raylab.memory import list_cgroups

OBJECT_STORE_SHARE, OBJECT_STORE_MOST, OBJECT_STORE_LEAST = 0.1, 2 * 10**9, 80 * 10**6  # data is read from files


@dataclass(frozen=True)
class Allocation:
    """The resources of this job on this node that Ray may use."""

    allocated_cpus: int  # by Slurm
    usable_cpus: int  # of this process: fewer where the step is bound to some of them
    gpus: int
    memory: int  # bytes

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Allocation":
        """From the variables of a step; Ray itself would count the whole machine (ray#13607)."""
        usable = count_usable_cpus()
        allocated = int(environment.get("SLURM_CPUS_ON_NODE") or usable)
        per_node, per_cpu = environment.get("SLURM_MEM_PER_NODE"), environment.get("SLURM_MEM_PER_CPU")
        if per_node:
            memory = int(per_node) << 20
        elif per_cpu:
            memory = (int(per_cpu) << 20) * allocated
        else:
            memory = psutil.virtual_memory().total
        return cls(allocated, usable, int(environment.get("SLURM_GPUS_ON_NODE") or 0), memory)

    def without(self, share: NodeType) -> "Allocation":
        """What is left beside the head's share. Raises SlurmError if nothing is."""
        if self.cpus <= share.cpus:
            raise SlurmError(
                f"the head leaves no CPU of this node for work: it takes {share.cpus} of {self.cpus}",
                do="give the node type all CPUs of its nodes, or start the cluster with --dedicated-head",
            )
        return replace(
            self,
            allocated_cpus=self.allocated_cpus - share.cpus,
            usable_cpus=self.usable_cpus - share.cpus,
            memory=max(0, self.memory - (share.memory_mb << 20)),
        )

    @property
    def cpus(self) -> int:
        """The CPUs that Ray counts: those that Slurm allocated and this process may use."""
        return min(self.allocated_cpus, self.usable_cpus)

    def options(self, shared_memory: int) -> list[str]:
        """`ray start` options; `shared_memory`: bytes free in /dev/shm."""
        most = min(OBJECT_STORE_MOST, int(0.8 * shared_memory))
        store = max(OBJECT_STORE_LEAST, min(most, int(OBJECT_STORE_SHARE * self.memory)))
        return [
            f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}",
            f"--memory={max(0, self.memory - store)}", f"--object-store-memory={store}",
        ]  # fmt: skip


def count_usable_cpus() -> int:
    """The CPUs on which this process may run: its affinity mask, and the quotas of its cgroups, rounded down."""
    mask = len(os.sched_getaffinity(0))
    return max(1, min([mask, *map(int, read_cpu_quotas(list_cgroups(os.getpid(), "cpu")))]))


def read_cpu_quotas(cgroups: Iterable[Path]) -> list[float]:
    """The CPUs' worth of time that each of `cgroups` allows, of those that limit it."""
    quotas = []
    for directory in cgroups:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, (directory / "cpu.max").read_text().split())  # version 2
            quotas.append(quota / period)
        with contextlib.suppress(OSError):
            quota = int((directory / "cpu.cfs_quota_us").read_text())  # version 1; -1: no limit
            if quota > 0:
                quotas.append(quota / int((directory / "cpu.cfs_period_us").read_text()))
    return quotas
