"""A worker's side of the membership, which answers when the tests say."""

import threading
from typing import Any

import pytest

from raylab.distributed.member import Expelled, Member
from raylab.distributed.membership import Roster, Signal
from tests.wait import wait_for


class Desk:
    """A membership with one member; a watch is answered when there is an answer for it."""

    def __init__(self) -> None:
        self.watches = threading.Semaphore(0)  # that have come
        self.answers: list[Signal] = []
        self.can_answer = threading.Semaphore(0)

    def call(self, method: str, *values: Any) -> Any:
        if method == "form":
            return Roster(values[1] + 1, ("a",), (values[2],))
        if method == "watch":
            self.watches.release()
            assert self.can_answer.acquire(timeout=60)
            return self.answers.pop(0)
        return None

    def answer(self, signal: Signal) -> None:
        self.answers.append(signal)
        self.can_answer.release()


def test_an_old_answer_is_no_sign_of_life():
    """A watch is answered, and the process hangs before it reads that: when it wakes, it may have been expelled."""
    desk = Desk()
    member = Member("a", desk.call, 0.3, {})
    group, _ = member.form_group(-1)
    assert desk.watches.acquire(timeout=60) and not group.is_broken()
    wait_for(group.is_broken, 60, "the end of the lease")
    desk.answer(Signal())
    assert desk.watches.acquire(timeout=60), "it has read the answer, and asks again"
    assert group.is_broken()
    desk.answer(Signal(expelled="it was silent"))
    wait_for(lambda: member.signal.expelled, 60, "the answer")
    with pytest.raises(Expelled, match="it was silent"):
        member.form_group(3)


def test_an_answer_about_an_earlier_group_is_not_about_this_one():
    desk = Desk()
    member = Member("a", desk.call, 60.0, {})
    member.form_group(-1)
    assert desk.watches.acquire(timeout=60)
    group, _ = member.form_group(1)
    desk.answer(Signal(is_broken=True))
    assert desk.watches.acquire(timeout=60)
    assert not group.is_broken() and member.signal == Signal()
    desk.answer(Signal(expelled="the test is over"))
