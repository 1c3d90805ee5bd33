import os

import pytest

from cluster.node import allocation
from cluster.node.allocation import Allocation, count_usable_cpus, read_cpu_quotas
from cluster.sites import NodeType
from raylab.errors import SlurmError


@pytest.mark.parametrize(("affinity", "cpus"), [({0}, 1), ({0, 1, 2, 3}, 4), (set(range(8)), 4)])
def test_ray_counts_the_cpus_that_slurm_allocated_and_the_step_may_use(monkeypatch, affinity, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity)
    found = Allocation.read({"SLURM_CPUS_ON_NODE": "4", "SLURM_MEM_PER_CPU": "1000", "SLURM_GPUS_ON_NODE": "2"})
    assert (found.allocated_cpus, found.usable_cpus, found.cpus, found.gpus) == (4, len(affinity), cpus, 2)
    assert found.memory == 4000 << 20, "of the allocation, not of the CPUs that are usable"
    assert f"--num-cpus={cpus}" in found.options(shared_memory=10**9)


def test_the_head_leaves_the_rest_of_a_node_that_it_shares():
    node = Allocation(allocated_cpus=8, usable_cpus=4, gpus=2, memory=8000 << 20)
    left = node.without(NodeType(cpus=1, memory_mb=1500))
    assert (left.cpus, left.gpus, left.memory) == (3, 2, 6500 << 20)
    with pytest.raises(SlurmError, match="no CPU of this node for work: it takes 4 of 4"):
        node.without(NodeType(cpus=4, memory_mb=1500))


def test_a_quota_of_a_cgroup_counts_less(monkeypatch, tmp_path):
    version2, version1, none = (tmp_path / name for name in ("2", "1", "none"))
    for directory, files in {
        version2: {"cpu.max": "250000 100000"},
        version1: {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"},
        none: {"cpu.max": "max 100000", "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
    }.items():
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text + "\n")
    assert read_cpu_quotas([version2, version1, none, tmp_path / "absent"]) == [2.5, 1.5]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(allocation, "list_cgroups", lambda pid, controller: [version2, none])
    assert count_usable_cpus() == 2
    monkeypatch.setattr(allocation, "list_cgroups", lambda pid, controller: [none])
    assert count_usable_cpus() == 8
