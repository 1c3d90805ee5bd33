"""Where the time of steps goes: the arithmetic, and what real workers measure."""

import time
from pathlib import Path

import pytest
from test_process_group import in_world

from raylab.config.overrides import override
from raylab.files import read_lines
from raylab.tasks.recipes import shipped_recipe
from raylab.training.process_group import ProcessGroup
from raylab.training.step_times import (
    REPEATS,
    StepStart,
    StepTimes,
    SumTime,
    WorkerPlace,
    WorkerTimes,
    median_sums,
    read_step_times,
    split_steps,
)

RECIPE = override(shipped_recipe("ards", smoke=True), {"loop.shards": 4})
PLACE = WorkerPlace(node="n", cores=2, load=0.0)


def start(step: int, time: float, collectives: float, input: float = 0.0, **joules: float) -> StepStart:
    return StepStart(step=step, time=time, collectives=collectives, input=input, cpu=time / 2, joules=joules)


def test_the_parts_of_a_step_add_up_and_the_last_worker_waits_for_nobody():
    """The clocks of the workers differ by 1000 s; the second one is slower by 0.3 s and waits for its inputs."""
    quick = WorkerTimes(PLACE, [], [start(0, 10.0, 0.0), start(1, 11.0, 0.4)])
    slow = WorkerTimes(PLACE, [], [start(0, 1010.0, 5.0, 2.0), start(1, 1011.0, 5.1, 2.2)])
    (parts,) = split_steps([quick, slow], [1])
    assert parts.seconds == pytest.approx(1.0)
    assert parts.communication == pytest.approx(0.1)
    assert parts.waiting == pytest.approx((0.3 + 0.0) / 2)
    assert parts.input == pytest.approx(0.1)
    assert parts.compute == pytest.approx((0.6 + 0.7) / 2)
    assert parts.cpu == pytest.approx(1.0)


def test_only_steps_that_all_workers_have_measured_from_start_to_end_count():
    one = WorkerTimes(PLACE, [], [start(k, float(k), 0.0) for k in range(4)])
    torn = WorkerTimes(PLACE, [], [start(k, float(k), 0.0) for k in (0, 1, 3)])
    assert len(split_steps([one], [1, 2, 3])) == 3
    assert len(split_steps([one, torn], [1, 2, 3])) == 1


def test_energy_counts_where_all_workers_measured_it():
    both = WorkerTimes(PLACE, [], [start(0, 0.0, 0.0, cpu=1.0, gpu=1.0), start(1, 1.0, 0.0, cpu=3.0, gpu=11.0)])
    only = WorkerTimes(PLACE, [], [start(0, 0.0, 0.0, gpu=5.0), start(1, 1.0, 0.0, gpu=6.0)])
    assert split_steps([both], [1])[0].joules == {"cpu": 2.0, "gpu": 10.0}
    assert split_steps([both, only], [1])[0].joules == {"gpu": 11.0}


def test_the_time_of_a_sum_is_that_of_the_worker_that_came_last():
    def times(*seconds: float) -> WorkerTimes:
        return WorkerTimes(PLACE, [SumTime(elements=8, workers=2, sum_seconds=one) for one in seconds], [])

    assert median_sums([times(0.3, 0.9, 0.2), times(0.5, 0.1, 0.4)]) == {8: 0.2}


def work(directory: Path, slow: float) -> float:
    group = ProcessGroup()
    times = StepTimes(directory, f"worker-{group.rank}", RECIPE, [8, 4096], lambda: {"cpu": 1.0})
    times.measure_sums(group)
    for step in range(4):
        times.start_step(step, group, 0.0)
        if group.rank == 1:
            time.sleep(slow)
        group.add_up([1])
    return group.seconds


@pytest.mark.parametrize("size", [2, 3])
def test_workers_measure_sums_and_who_waits_for_whom(tmp_path, size):
    seconds = in_world(size, tmp_path / "world", work, tmp_path, 0.5)
    workers = read_step_times(tmp_path)
    assert len(workers) == size and all(each > 0 for each in seconds)
    assert set(median_sums(workers)) == {8, 4096}
    assert all(len(worker.sums) == 2 * REPEATS for worker in workers)
    parts = split_steps(workers, [1, 2, 3])
    assert len(parts) == 3
    assert all(step.seconds >= 0.49 for step in parts)
    # all but the slow one wait for it; on a busy machine not in every step for as long
    assert max(step.waiting for step in parts) >= 0.3 * (size - 1) / size
    assert min(step.communication for step in parts) < 0.3


def test_a_worker_alone_sums_nothing(tmp_path):
    times = StepTimes(tmp_path, "worker-0", RECIPE, [8], dict)
    times.measure_sums(ProcessGroup())
    (path,) = (tmp_path / "times").iterdir()
    assert [set(line) for line in read_lines(path)] == [{"node", "cores", "load"}]
    assert ProcessGroup().seconds == 0.0
