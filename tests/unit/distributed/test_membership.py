"""Who forms the next group, and who is told what; time is a number that the tests set."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from raylab.distributed.membership import Delivery, Membership, Roster, Signal

SAME = {"raylab code": "abc"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(call)


async def joined(*members: str, minimum: int = 1, clock: Clock | None = None) -> Membership:
    membership = Membership(minimum, 10, clock or Clock())
    for member in members:
        assert await membership.join(member, SAME) is None
    return membership


async def form(membership: Membership, **positions: int) -> dict[str, Any]:
    """What each member gets when all of `positions` come together."""
    generation = membership.roster.generation
    answers = await asyncio.gather(*(membership.form(m, generation, at, 0.2) for m, at in positions.items()))
    return dict(zip(positions, answers, strict=True))


def test_an_attempt_begins_with_the_minimum():
    async def story() -> None:
        membership = await joined("a", minimum=2)
        assert await membership.form("a", 0, -1, 0.01) is None
        await membership.join("b", SAME)
        answers = await form(membership, a=-1, b=-1)
        assert answers["a"] == answers["b"] == Roster(1, ("a", "b"), (-1, -1))
        assert answers["a"].leader is None

    run(story())


def test_the_survivors_of_a_death_go_on_below_the_minimum():
    async def story() -> None:
        membership = await joined("a", "b", minimum=2)
        await form(membership, a=-1, b=-1)
        await membership.remove("b", "it has died")
        assert (await membership.watch("a", 1, Signal(), 0)).is_broken
        assert (await form(membership, a=7))["a"] == Roster(2, ("a",), (7,))

    run(story())


def test_the_state_comes_from_whoever_is_farthest():
    async def story() -> None:
        membership = await joined("a", "b", "c")
        await form(membership, a=-1, b=-1, c=-1)
        await membership.join("d", SAME)
        assert await membership.form("d", 0, -1, 0) is None
        await membership.report_failure(1)
        answers = await form(membership, a=7, b=8, c=8, d=-1)
        assert answers["d"].members == ("a", "b", "c", "d"), "those who stay keep their order, newcomers come last"
        assert answers["d"].leader == 1

    run(story())


def test_a_group_forms_when_everyone_who_is_left_has_come_and_no_earlier():
    async def story() -> None:
        membership = await joined("a", "b", "c")
        await form(membership, a=-1, b=-1, c=-1)
        await membership.report_failure(1)
        waiting = asyncio.ensure_future(form(membership, a=3, b=3))
        await asyncio.sleep(0)
        assert membership.roster.generation == 1
        await membership.remove("c", "it has died")
        assert (await waiting)["a"].members == ("a", "b")

    run(story())


def test_a_newcomer_waits_for_a_step_boundary_and_breaks_nothing():
    async def story() -> None:
        membership = await joined("a")
        await form(membership, a=-1)
        await membership.join("b", SAME)
        assert await membership.form("b", 0, -1, 0.01) is None
        assert await membership.watch("a", 1, Signal(), 0) == Signal(is_changing=True)
        answers = await form(membership, a=5, b=-1)
        assert answers["b"].leader == 0

    run(story())


def test_a_newcomer_that_hangs_before_it_comes_keeps_nobody_waiting():
    async def story() -> None:
        membership = await joined("a", "b")
        await form(membership, a=-1, b=-1)
        await membership.join("c", SAME)
        assert await membership.watch("a", 1, Signal(), 0) == Signal()
        await membership.report_failure(1)
        assert (await form(membership, a=5, b=5))["a"].members == ("a", "b")

    run(story())


def test_whoever_is_told_to_leave_before_it_trains_never_does():
    async def story() -> None:
        membership = await joined("a")
        await form(membership, a=-1)
        await membership.join("b", SAME)
        assert await membership.form("b", 0, -1, 0) is None
        await membership.leave("b")
        await membership.leave("c")
        assert await membership.join("c", SAME) is None
        assert await membership.form("b", 0, -1, 5) == "it has left"
        assert await membership.form("c", 0, -1, 5) == "it has left"
        assert await membership.watch("a", 1, Signal(), 0) == Signal()
        assert set(membership.heard) == {"a"}

    run(story())


def test_nobody_is_expelled_after_the_one_who_waited_has_died():
    async def story() -> None:
        clock = Clock()
        membership = await joined("a", "b", "c", clock=clock)
        await form(membership, a=-1, b=-1, c=-1)
        assert await membership.form("a", 1, 5, 0) is None
        await membership.remove("a", "it has died")
        for clock.now in (5.0, 10.0, 15.0):
            for member in ("b", "c"):
                await membership.watch(member, 1, Signal(), 0)
        assert set(membership.expelled) == {"a"}

    run(story())


def test_a_member_that_leaves_is_waited_for_until_it_has_handed_over():
    async def story() -> None:
        membership = await joined("a", "b")
        await form(membership, a=-1, b=-1)
        await membership.leave("b")
        assert await membership.watch("a", 1, Signal(), 0) == Signal(is_changing=True)
        assert await membership.watch("b", 1, Signal(), 0) == Signal(is_changing=True, is_leaving=True)
        assert await membership.form("a", 1, 5, 0.01) is None
        await membership.remove("b", "it has left")
        assert (await membership.form("a", 1, 5, 0.01)).members == ("a",)

    run(story())


def test_a_silent_member_is_expelled_and_stays_so():
    async def story() -> None:
        clock = Clock()
        membership = await joined("a", "b", clock=clock)
        await form(membership, a=-1, b=-1)
        for clock.now in (5.0, 9.0, 11.0):
            signal = await membership.watch("a", 1, Signal(), 0)
        assert signal.is_broken
        assert (await form(membership, a=2))["a"].members == ("a",)
        assert (await membership.watch("b", 1, Signal(), 0)).expelled == "it was silent for 10 s"
        assert await membership.form("b", 1, 2, 0.01) == "it was silent for 10 s"

    run(story())


def test_a_worker_that_falls_silent_before_it_joins_is_expelled():
    async def story() -> None:
        clock = Clock()
        membership = await joined("a", clock=clock)
        assert not await membership.greet("a")
        assert await membership.greet("b")
        for clock.now in (30.0, 59.0):
            assert await membership.greet("c")
            await membership.watch("a", 1, Signal(), 0)
        for clock.now in (61.0, 69.0):
            await membership.watch("a", 1, Signal(), 0)
            assert (await membership.receive(0)).gone == {"b": "it was silent for 60 s while it started"}
        assert not await membership.greet("b")
        await membership.join("b", SAME)
        assert await membership.form("b", 0, -1, 0.01) == "it was silent for 60 s while it started"
        assert await membership.join("c", SAME) is None
        assert not await membership.greet("c")

    run(story())


def test_a_worker_that_answers_but_does_not_load_its_data_is_expelled():
    async def story() -> None:
        clock = Clock()
        membership = Membership(2, 10, clock)
        for clock.now in range(0, 1000, 5):  # nobody knows how long the data takes
            assert await membership.greet("a") and await membership.greet("b")
        delivery = await membership.receive(0)
        assert delivery.gone == {} and delivery.starting == {"a": 995.0, "b": 995.0}
        assert await membership.greet("c")
        clock.now = 1037.0
        await membership.join("c", SAME)
        assert membership.quickest == 42.0
        gone = (await membership.receive(0)).gone
        assert gone == dict.fromkeys(("a", "b"), "it was not ready after 420 s, another worker after 42 s")
        assert not await membership.greet("b")
        await membership.join("b", SAME)
        assert await membership.form("b", 0, -1, 0.01) == gone["b"], "it comes too late"
        await membership.join("d", SAME)
        assert (await form(membership, c=-1, d=-1))["c"].members == ("c", "d")

    run(story())


def test_a_quick_start_of_one_leaves_the_others_minutes():
    async def story() -> None:
        clock = Clock()
        membership = Membership(1, 10, clock)
        for clock.now in (0.0, 1.0):
            assert await membership.greet("a") and await membership.greet("b")
        await membership.join("a", SAME)
        for clock.now in range(5, 300, 5):
            assert await membership.greet("b")
            await membership.watch("a", 0, Signal(), 0)
        assert (await membership.receive(0)).gone == {}
        for clock.now in range(300, 311, 5):
            await membership.greet("b")
            await membership.watch("a", 0, Signal(), 0)
        assert (await membership.receive(0)).gone == {"b": "it was not ready after 300 s, another worker after 1 s"}

    run(story())


def test_a_member_that_watches_but_does_not_come_is_expelled():
    async def story() -> None:
        clock = Clock()
        membership = await joined("a", "b", clock=clock)
        await form(membership, a=-1, b=-1)
        await membership.report_failure(1)
        waiting = asyncio.ensure_future(membership.form("a", 1, 2, 5))
        for clock.now in (0.0, 6.0, 11.0):
            await asyncio.sleep(0)
            await membership.watch("a", 1, Signal(), 0)
            await membership.watch("b", 1, Signal(), 0)
        assert (await waiting).members == ("a",)
        assert membership.expelled == {"b": "it kept the others waiting for 10 s"}

    run(story())


def test_nobody_is_expelled_while_a_newcomer_waits_for_a_long_step():
    async def story() -> None:
        clock = Clock()
        membership = await joined("a", clock=clock)
        await form(membership, a=-1)
        await membership.join("b", SAME)
        for clock.now in (5.0, 10.0, 15.0, 20.0):
            assert await membership.form("b", 0, -1, 0) is None
            await membership.watch("a", 1, Signal(), 0)
        assert membership.expelled == {}

    run(story())


def test_a_failure_of_an_earlier_group_does_not_break_this_one():
    async def story() -> None:
        membership = await joined("a", "b")
        await form(membership, a=-1, b=-1)
        await membership.report_failure(1)
        await form(membership, a=1, b=1)
        await membership.report_failure(1)
        assert await membership.watch("a", 2, Signal(), 0) == Signal()

    run(story())


def test_who_trains_on_other_data_or_code_is_refused():
    async def story() -> None:
        membership = await joined("a")
        why = await membership.join("b", {"raylab code": "def"})
        assert why == "its raylab code is def, that of the other workers abc"
        assert "b" not in membership.heard

    run(story())


def test_rows_wait_until_the_driver_has_them():
    async def story() -> None:
        membership = await joined("a")
        assert await membership.send([{"step": 1}, {"step": 2}]) == 0, "on their way, not arrived"
        assert [row["step"] for row in (await membership.receive(0)).rows] == [1, 2]
        assert await membership.receive(2) == Delivery([], [], {}, [], {})
        assert await membership.send([]) == 2

    run(story())


def test_rows_that_two_writers_send_reach_the_driver_once():
    async def story() -> None:
        membership = await joined("a", "b")
        await membership.send([{"step": 3}, {"step": 4}])
        await membership.send([{"step": 2}, {"step": 3}, {"step": 4}, {"step": 5}])
        assert [row["step"] for row in (await membership.receive(2)).rows] == [3, 4, 5]

    run(story())


def test_the_load_of_every_node_reaches_the_driver_once():
    async def story() -> None:
        membership = await joined("a", "b")
        for member in ("a", "b"):
            await membership.send_node_sample(member, {f"{member}/power": 80.0})
        assert (await membership.receive(0)).node_samples == [("a", {"a/power": 80.0}), ("b", {"b/power": 80.0})]
        assert (await membership.receive(0)).node_samples == []

    run(story())
