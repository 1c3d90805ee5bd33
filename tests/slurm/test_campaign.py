"""Faults on real Slurm that `make test-faults` adds to those of test_cluster.py."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import Bed
from tests.slurm.lab import ENDLESS, INTERVAL, Lab, preemptible_cluster
from tests.slurm.test_cluster import LONG, check
from tests.verbs import Verbs
from tests.wait import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.campaign, pytest.mark.timeout(900)]
PARTITION_SECONDS = 12.0  # shorter than the 25 s after which Ray gives a node up


@pytest.fixture(scope="module")
def lab(testbed: Bed, ards_data: Path, verbs: Verbs) -> Iterator[Lab]:
    with preemptible_cluster(testbed, ards_data, verbs, "campaign") as lab:
        yield lab


@pytest.mark.fault(15)
def test_a_short_partition_is_waited_for(lab: Lab) -> None:
    lab.train("far", "2", *ENDLESS)
    lab.on_workers("far", 2, steps=INTERVAL)
    head = lab.status()["head"]["node"]
    victim = next(job for job in lab.workers() if job["node"] != head and lab.is_training("far", job))
    lab.bed.verb("netdown", victim["node"])
    try:
        time.sleep(PARTITION_SECONDS)  # the fault itself
    finally:
        lab.bed.verb("netup", victim["node"])
    step = lab.step("far")
    wait_for(lambda: lab.step("far") > step + INTERVAL, 120, "steps after the partition")
    assert lab.facts("far")["steps_repeated"] == 0 and lab.facts("far")["attempts"] == 1
    lab.stop("far")
    lab.start_undisturbed("far").compare()


@pytest.mark.fault(9)
def test_ray_s_control_store_is_killed(lab: Lab) -> None:
    """The head returns as a new generation and resumes the run from its newest checkpoint."""
    lab.train("headless", "2", *LONG)
    lab.on_workers("headless", 2, steps=INTERVAL)
    before = lab.status()["head"]
    own = f"tr '\\0' '\\n' </proc/$pid/environ | grep -qx SLURM_JOB_ID={before['job']}"
    lab.bed.run(f"for pid in $(pgrep -f gcs/gcs_server); do {own} && kill -9 $pid; done; true", before["node"])
    assert check(lab, "headless", LONG)["steps_repeated"] <= INTERVAL + 1
    assert lab.status()["head"]["generation"] > before["generation"]
