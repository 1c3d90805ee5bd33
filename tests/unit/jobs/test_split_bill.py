"""A job's bill, split: nothing is missing and nothing is there twice, whatever happened in the job."""

from contextlib import nullcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bills import Bill
from jobs.common.split_bill import (
    HEAD,
    IDLE,
    LOST,
    PARTS,
    START_UP,
    WHOLE,
    WORK,
    Work,
    count_parts,
    find_lost,
    list_work,
    split_bill,
)
from raylab.config.overrides import override
from raylab.tasks.recipes import shipped_recipe
from raylab.training.ledger import Checkpoint, HandOver, Regroup, Start, Step, read_ledger
from raylab.training.run import execute, load_samples
from raylab.work import WorkMeter, WorkRecord, read_work, write_to


def bill(start=1000, end=1100, nodes=1, rate=Fraction(36), **more):
    return Bill("7", start, end, nodes, rate, "core-hours", **more)


def work(begin, end, share=1.0, run="a", kind=WORK, node="n1", job="7"):
    return Work(job, node, round(begin * 1000), round(end * 1000), round(share * WHOLE), run, kind)


def hours(lines):
    """{(run, kind): amount}; all of the tests below cost 1 unit per 100 s of the whole job."""
    return {(line.run, line.kind): Fraction(line.parts, PARTS) for line in lines}


def test_a_job_without_any_work_is_idle_and_a_head_is_a_head():
    assert hours(split_bill(bill(), [])) == {("", IDLE): 1}
    assert hours(split_bill(bill(is_head=True), [])) == {("", HEAD): 1}


def test_start_up_work_and_idle_follow_one_another():
    lines = split_bill(bill(), [work(1010, 1020, kind=START_UP), work(1020, 1070)])
    expected = {("", START_UP): 0.1, ("a", START_UP): 0.1, ("a", WORK): 0.5, ("", IDLE): 0.3}
    assert hours(lines) == {key: Fraction(str(amount)) for key, amount in expected.items()}


def test_workers_pay_for_the_part_of_the_node_that_they_hold():
    lines = split_bill(bill(), [work(1000, 1100, 0.25), work(1050, 1100, 0.5, run="b")])
    assert hours(lines) == {("a", WORK): Fraction(1, 4), ("b", WORK): Fraction(1, 4), ("", IDLE): Fraction(1, 2)}


def test_more_than_the_whole_node_is_shared_in_proportion():
    lines = split_bill(bill(), [work(1000, 1100, 1), work(1000, 1100, 0.5, run="b")])
    assert sum(line.parts for line in lines) == PARTS
    assert hours(lines)["a", WORK] - Fraction(2, 3) < Fraction(1, PARTS)


def test_each_node_of_a_job_costs_the_same():
    lines = split_bill(bill(nodes=4), [work(1000, 1100), work(1000, 1050, node="n2", run="b")])
    assert hours(lines) == {("a", WORK): Fraction(1, 4), ("b", WORK): Fraction(1, 8), ("", IDLE): Fraction(5, 8)}


def test_work_of_another_job_or_outside_of_its_time_is_not_on_the_bill():
    lines = split_bill(bill(), [work(900, 1050), work(1050, 1200, run="b"), work(1000, 1100, job="8", run="c")])
    assert hours(lines) == {("a", WORK): Fraction(1, 2), ("b", WORK): Fraction(1, 2)}


moments = st.integers(990_000, 1_110_000)
works = st.builds(
    lambda node, first, second, share, run, kind: Work("7", node, min(first, second), max(first, second), share, run,
                                                       kind),
    st.sampled_from(["n1", "n2", "n3"]), moments, moments, st.integers(1, WHOLE), st.sampled_from("abc"),
    st.sampled_from([WORK, START_UP, LOST]),
)  # fmt: skip


@given(
    st.lists(works, max_size=12), st.integers(1, 4), st.decimals(0, 500, places=3), st.integers(1, 120), st.booleans()
)
def test_the_lines_sum_to_the_bill_exactly_for_any_schedule(schedule, nodes, rate, seconds, is_head):
    whole = bill(1000, 1000 + seconds, nodes, Fraction(rate), is_head=is_head)
    lines = split_bill(whole, schedule)
    assert sum(line.parts for line in lines) == count_parts(whole)
    assert Fraction(count_parts(whole), PARTS) == whole.amount
    assert all(line.parts >= 0 for line in lines)
    assert len({(line.run, line.kind) for line in lines}) == len(lines)


@given(st.lists(works, max_size=8), st.integers(1001, 1099))
def test_a_requeue_in_the_middle_changes_nobodys_part(schedule, cut):
    """Two starts of a job, of which one ends as the other begins, cost each run what one start does."""

    def sums(*bills):
        total = {}
        for line in (line for one in bills for line in split_bill(one, schedule)):
            if line.run:
                total[line.run, line.kind] = total.get((line.run, line.kind), 0) + line.parts
        return total

    nodes = max(1, len({one.node for one in schedule}))
    once, twice = sums(bill(nodes=nodes)), sums(bill(1000, cut, nodes), bill(cut, 1100, nodes))
    for key in once.keys() | twice.keys():
        assert abs(once.get(key, 0) - twice.get(key, 0)) <= 2, "each start is rounded to a part of its own"


# what is lost


def start(attempt, step, time):
    return Start(attempt=attempt, start=step, workers=1, time=time)


def steps(attempt, *numbers):
    return [Step(attempt=attempt, step=number, loss=1.0) for number in numbers]


def test_what_is_trained_again_is_lost_from_the_state_that_it_starts_from():
    saved = Checkpoint(attempt=0, checkpoint=2, time=20.0)
    entries = [start(0, 0, 0.0), *steps(0, 1, 2, 3), saved, *steps(0, 4), start(1, 2, 60.0), *steps(1, 3, 4)]
    assert find_lost(entries) == [(20.0, 60.0)]


def test_without_a_checkpoint_the_whole_attempt_is_lost():
    assert find_lost([start(0, 0, 5.0), *steps(0, 1), start(1, 0, 60.0), start(2, 0, 70.0)]) == [(5.0, 60.0)]


def test_a_handover_and_a_change_of_workers_lose_nothing():
    saved, moved = Checkpoint(attempt=0, checkpoint=2, time=20.0), HandOver(attempt=0, moved=2, why="")
    changed = Regroup(attempt=0, regroup=1, workers=2, pids=(1, 2), time=10.0)
    assert find_lost([start(0, 0, 0.0), *steps(0, 1), changed, *steps(0, 2), saved, moved, start(1, 2, 60.0)]) == []


def test_a_worker_starts_works_and_loses():
    record = WorkRecord(
        id="x", worker="w", job="7", node="n1.site", cpus=1, share=0.5, begin=1.0, training=5.0, end=50.0
    )
    saved = Checkpoint(attempt=0, checkpoint=2, time=20.0)
    entries = [start(0, 0, 5.0), *steps(0, 1, 2), saved, *steps(0, 3), start(1, 2, 60.0)]
    found = list_work("a", [record], entries)
    assert [(one.kind, one.begin, one.end) for one in found] == [
        (START_UP, 1000, 5000), (WORK, 5000, 20000), (LOST, 20000, 50000)
    ]  # fmt: skip
    assert {(one.node, one.share, one.run) for one in found} == {("n1", WHOLE // 2, "a")}


def test_a_worker_that_never_trained_only_started():
    record = WorkRecord(id="x", worker="w", job="7", node="n1", cpus=1, share=1, begin=1.0, end=4.0)
    assert [one.kind for one in list_work("a", [record], [])] == [START_UP]


def test_what_a_real_run_lost_is_measured(ards_data, tmp_path):
    """It ends in the middle, three steps after a checkpoint, and starts again from there."""
    recipe = override(shipped_recipe("ards", True), {"loop.checkpoint_steps": 5, "loop.epochs": 4})

    class Crash(Exception):
        pass

    def send(rows):
        if rows and rows[-1]["step"] == 8:
            raise Crash
        return rows[-1]["step"] if rows else 0

    for ending, arrive in ((pytest.raises(Crash), send), (nullcontext(), lambda rows: 0)):
        with ending, WorkMeter("worker-0", 1.0, 1.0, False, write_to(tmp_path)) as meter:
            execute(
                recipe,
                *load_samples(recipe, ards_data),
                tmp_path,
                arrive,
                flush_seconds=0,
                on_training=meter.note_training,
            )
    first, second = read_work(tmp_path)
    found = list_work("a", [first, second], read_ledger(tmp_path / "ledger.jsonl"))
    kinds = [one.kind for one in found]
    assert kinds[:3] == [START_UP, WORK, LOST] and LOST not in kinds[4:]
    assert found[2].end == round(first.end * 1000) and found[2].begin < found[2].end
