"""What a person is told when the workers of a run change."""

from jobs.common.progress import Silence, describe_group
from raylab.training.ledger import Regroup, Start

START = Start(attempt=0, start=0, workers=3, pids=(11, 12, 13), time=0.0)


def regroup(step: int, *pids: int, left: tuple[int, ...] = ()) -> Regroup:
    return Regroup(attempt=0, regroup=step, workers=len(pids), pids=pids, time=1.0, left=left)


def test_a_beginning_and_a_restart():
    assert describe_group(START, None, 0.0) == "started on 3 workers"
    again = Start(attempt=1, start=40, workers=1, pids=(14,), time=0.0)
    assert describe_group(again, START, 9.0) == "restarted from step 40 on 1 worker"


def test_lost_workers_are_named():
    one = describe_group(regroup(54, 11, 13), START, 0.84)
    assert one == "worker 12 lost at step 54; training went on after 0.8 s on 2 workers"
    two = describe_group(regroup(54, 13), START, 1.0)
    assert two == "workers 11, 12 lost at step 54; training went on after 1.0 s on 1 worker"
    replaced = describe_group(regroup(60, 11, 13, 14), START, 2.0)
    assert replaced == "worker 12 lost at step 60; training went on after 2.0 s on 3 workers"


def test_workers_that_left_are_not_lost():
    one = describe_group(regroup(54, 11, 13, left=(12,)), START, 0.1)
    assert one == "worker 12 left at step 54; training went on after 0.1 s on 2 workers"
    both = describe_group(regroup(54, 13, left=(12,)), START, 0.5)
    assert both == "worker 11 lost and worker 12 left at step 54; training went on after 0.5 s on 1 worker"


def test_growth():
    assert describe_group(regroup(70, 11, 12, 13, 14), START, 0.5) == "now on 4 workers from step 70"


def test_a_run_without_steps_is_said_once_per_doubling():
    silence = Silence(100.0)
    assert [silence.describe(100.0 + seconds) for seconds in (29, 31, 40, 61, 62, 100)] == [
        "", "no step for 31 s", "", "", "no step for 62 s", "",
    ]  # fmt: skip
    silence.step(200.0)  # steps may take long
    assert silence.describe(450.0) == ""
    assert silence.describe(501.0) == "no step for 301 s"
