"""Which workers a run may have, from numbers alone; Ray itself is in tests/ray and tests/slurm."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylab.distributed.allocation import EXPIRE_SECONDS, Allocator, Claim, allocate, apportion, clamp
from tests.conftest import ROOT

CPU, BIG, GPU = {"CPU": 1}, {"CPU": 4}, {"CPU": 1, "GPU": 1}


def capacity(most, *types):
    return {"max": most, "types": [{"count": count, "resources": resources} for count, resources in types]}


def claim(minimum, maximum, bundle=CPU, **placed):
    return Claim("membership", minimum, maximum, bundle, placed)


def test_a_wish_is_cut_to_the_largest_cluster():
    assert clamp([CPU] * 9, capacity(8, (8, {"CPU": 1}))) == [CPU] * 8
    assert clamp([CPU] * 9, capacity(2, (8, {"CPU": 4}))) == [CPU] * 8
    assert clamp([GPU] * 3, capacity(4, (4, {"CPU": 2}))) == [], "no node has a GPU"


def test_what_does_not_fit_does_not_keep_out_what_does():
    assert clamp([GPU, BIG, CPU], capacity(3, (3, {"CPU": 2}))) == [CPU]
    mixed = capacity(2, (1, {"CPU": 4}), (1, {"CPU": 1, "GPU": 1}))
    assert clamp([GPU, GPU, CPU], mixed) == [GPU, CPU]


@given(st.lists(st.sampled_from([CPU, BIG, GPU]), max_size=12), st.integers(1, 5), st.integers(1, 5))
def test_what_is_left_is_a_part_of_the_wish_in_its_order_and_fits(bundles, most, count):
    fitting = clamp(bundles, capacity(most, (count, {"CPU": 4, "GPU": 1})))
    rest = iter(bundles)
    assert all(any(bundle is wished for wished in rest) for bundle in fitting)
    nodes = min(most, count)
    assert sum(bundle["CPU"] for bundle in fitting) <= 4 * nodes
    assert sum(bundle.get("GPU", 0) for bundle in fitting) <= nodes
    if len(bundles) <= nodes:
        assert fitting == bundles, "each could have a node of its own"


def test_every_runs_minimum_comes_before_anybodys_growth():
    nodes = {"n1": {"CPU": 1}, "n2": {"CPU": 1}, "n3": {"CPU": 1}}
    assert allocate([claim(1, 3)], nodes) == [Counter(n1=1, n2=1, n3=1)]
    first, second = allocate([claim(1, 3, n1=1, n2=1, n3=1), claim(1, 1)], nodes)
    assert first.total() == 2 and second.total() == 1


def test_workers_stay_where_they_are():
    nodes = {"n1": {"CPU": 2}, "n2": {"CPU": 2}}
    assert allocate([claim(1, 1, n2=1)], nodes) == [Counter(n2=1)]
    assert allocate([claim(1, 1, n1=1), claim(1, 2, n2=2)], nodes) == [Counter(n1=1), Counter(n2=2)]


def test_a_node_that_leaves_has_no_place():
    assert allocate([claim(1, 2, n1=1, n2=1)], {"n2": {"CPU": 1}}) == [Counter(n2=1)]


claims = st.lists(
    st.builds(
        lambda low, more, bundle, priority: Claim("membership", low, low + more, bundle, {}, priority),
        st.integers(1, 3), st.integers(0, 4), st.sampled_from([CPU, BIG, GPU]), st.sampled_from([0.1, 1.0, 3.0]),
    ),
    max_size=4,
)  # fmt: skip
machines = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.sampled_from([{"CPU": 1}, {"CPU": 5}, {"CPU": 4, "GPU": 2}])
)


@given(claims, machines)
def test_no_node_is_given_away_twice(claims, machines):
    places = allocate(claims, machines)
    for node, resources in machines.items():
        for name, amount in resources.items():
            assert sum(own[node] * c.bundle.get(name, 0) for c, own in zip(claims, places, strict=True)) <= amount
    assert all(own.total() <= c.maximum for c, own in zip(claims, places, strict=True))


@pytest.mark.parametrize(
    ("spare", "weights", "limits", "given"),
    [
        (3, [1, 1, 1], [9, 9, 9], [1, 1, 1]),
        (4, [1, 1, 1], [9, 9, 9], [2, 1, 1]),  # of equal remainders the first
        (4, [2, 1, 1], [9, 9, 9], [2, 1, 1]),
        (5, [2, 2, 4], [9, 9, 9], [1, 1, 3]),  # 1.25, 1.25 and 2.5: the largest remainder
        (6, [6, 3, 1], [9, 9, 9], [4, 2, 0]),  # 3.6, 1.8, 0.6: two of three are rounded up
        (6, [9, 1, 1], [2, 9, 9], [2, 2, 2]),  # what the first cannot use goes to the others
        (9, [1, 2], [2, 3], [2, 3]),
        (0, [1, 2], [2, 3], [0, 0]),
        (2, [0, 1], [0, 3], [0, 2]),
        (2, [], [], []),
    ],
)
def test_spare_workers_by_largest_remainders(spare, weights, limits, given):
    assert apportion(spare, [Fraction(weight) for weight in weights], limits) == given


sharers = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.1, 1.0, 1.5, 4.0])), max_size=6)


@given(sharers, st.integers(0, 40))
def test_a_share_is_a_runs_part_rounded(runs, spare):
    """All spare workers are given away, in proportion, but for what limits forbid; and each is rounded up or down."""
    limits = [growth for growth, _ in runs]
    weights = [growth * Fraction(priority) for growth, priority in runs]
    given = apportion(spare, weights, limits)
    assert sum(given) == min(spare, sum(limits))
    assert all(0 <= own <= limit for own, limit in zip(given, limits, strict=True))
    sharing = [run for run in range(len(runs)) if given[run] < limits[run]]
    for one in sharing:
        for other in range(len(runs)):  # who is at its limit has no more for its weight than who is not, but a worker
            assert (given[other] - 1) * weights[one] < (given[one] + 1) * weights[other] or not given[other]


@given(claims, machines)
def test_no_room_is_left_that_somebody_could_use(claims, machines):
    places = allocate(claims, machines)
    for node, resources in machines.items():
        free = {
            name: amount - sum(own[node] * c.bundle.get(name, 0) for c, own in zip(claims, places, strict=True))
            for name, amount in resources.items()
        }
        for claim, own in zip(claims, places, strict=True):
            fits = all(free.get(name, 0) >= amount for name, amount in claim.bundle.items())
            assert own.total() == claim.maximum or not fits


THREE = {"n1": {"CPU": 2}, "n2": {"CPU": 2}, "n3": {"CPU": 2}}


def totals(claims, nodes):
    return [own.total() for own in allocate(claims, nodes)]


def test_growth_is_shared_and_who_has_more_gives_it_back():
    first, second, third = claim(1, 6), claim(1, 6), claim(1, 6)
    assert totals([first], THREE) == [6]
    assert totals([claim(1, 6, n1=2, n2=2, n3=2), second], THREE) == [3, 3]
    assert totals([first, second, third], THREE) == [2, 2, 2]
    urgent = Claim("membership", 1, 6, CPU, {}, priority=3)
    assert totals([first, second, urgent], THREE) == [2, 1, 3], "3 spare workers by 1 : 1 : 3"
    assert totals([first, claim(1, 2), third], THREE) == [3, 1, 2], "3 spare workers by 5 : 1 : 5"


def test_the_table_of_the_documentation():
    """Three runs on three nodes over time: docs/slurm.md."""
    page = (ROOT / "docs" / "slurm.md").read_text()
    urgent = Claim("membership", 1, 6, CPU, {}, priority=3)
    for event, runs, nodes in (
        ("`first` starts", {0: claim(1, 6)}, 3),
        ("`second` starts", {0: claim(1, 6), 1: claim(1, 6)}, 3),
        ("`urgent` starts", {0: claim(1, 6), 1: claim(1, 6), 2: urgent}, 3),
        ("a node leaves", {0: claim(1, 6), 1: claim(1, 6), 2: urgent}, 2),
        ("`urgent` ends", {0: claim(1, 6), 1: claim(1, 6)}, 2),
        ("a node comes", {0: claim(1, 6), 1: claim(1, 6)}, 3),
        ("`first` ends", {1: claim(1, 6)}, 3),
    ):
        shares = dict(zip(runs, totals(list(runs.values()), dict(list(THREE.items())[:nodes])), strict=True))
        cells = [f" {shares[run]} " if run in shares else " " for run in range(3)]
        assert f"| {event} |{'|'.join(cells)}|\n" in page, f"{event}: {shares}"


def test_a_run_that_can_use_gpus_alone_does_not_hold_back_the_others():
    nodes = {"g": {"CPU": 1, "GPU": 1}, "n1": {"CPU": 4}}
    assert totals([claim(1, 4, GPU), claim(1, 4)], nodes) == [1, 4]
    waiting = claim(1, 4, {"CPU": 1, "TPU": 1})
    assert totals([waiting, claim(1, 3), claim(1, 3)], {"n1": {"CPU": 4}}) == [0, 2, 2]


def test_the_share_does_not_depend_on_what_runs_have():
    """Or two runs could ask in turn and never agree."""
    for placed in ({}, {"n1": 2}, {"n1": 2, "n2": 2, "n3": 1}):
        assert totals([claim(1, 6, **placed), claim(1, 6, n3=1)], THREE) == [3, 3]


@pytest.fixture
def asked() -> list[list[dict[str, float]]]:
    return []


def test_a_claim_asks_for_nodes_until_it_is_released_or_expires(asked):
    now = 0.0
    allocator = Allocator(lambda: {"n1": {"CPU": 1}}, asked.append, lambda actor: True, lambda: now)
    assert allocator.claim("first", "a", 1, 2, CPU, {}) == {"n1": 1}
    allocator.claim("first", "a", 1, 2, CPU, {"n1": 1})
    assert asked == [[CPU, CPU]], "asked for again only when it changes"
    assert allocator.claim("second", "b", 1, 1, BIG, {}) == {}
    assert asked[-1] == [CPU, BIG, CPU], "both minimums first"
    allocator.claim("second", "b", 1, 3, BIG, {}, priority=2)
    assert asked[-1] == [CPU, BIG, BIG, BIG, CPU], "then growth, in an order of which every beginning is fair"
    allocator.release("second")
    assert asked[-1] == [CPU, CPU]
    now = EXPIRE_SECONDS + 1
    allocator.drop_expired()
    assert asked[-1] == []


def test_a_run_does_not_wait_for_the_claim_of_a_killed_one(asked):
    alive = {"before", "after"}
    allocator = Allocator(lambda: {"n1": {"CPU": 3}}, asked.append, alive.__contains__)
    assert allocator.claim("before", "before", 2, 2, CPU, {}) == {"n1": 2}
    assert allocator.claim("after", "after", 2, 2, CPU, {}) == {"n1": 1}
    alive.remove("before")
    assert allocator.claim("after", "after", 2, 2, CPU, {}) == {"n1": 2}
    assert asked[-1] == [CPU, CPU]


def test_no_more_is_asked_for_than_the_cluster_can_be(asked, monkeypatch):
    monkeypatch.setenv("RAYLAB_CLUSTER_CAPACITY", '{"max": 1, "types": [{"count": 1, "resources": {"CPU": 1}}]}')
    Allocator(dict, asked.append, lambda actor: True).claim("first", "a", 1, 5, CPU, {})
    assert asked == [[CPU]]


def test_a_claim_that_changes_nothing_decides_nothing_anew(monkeypatch, asked):
    nodes, calls = {"n1": {"CPU": 2}}, []
    decide = allocate
    monkeypatch.setattr("raylab.distributed.allocation.allocate", lambda *words: calls.append(words) or decide(*words))
    allocator = Allocator(lambda: dict(nodes), asked.append, lambda actor: True)
    for expected, change in ((1, dict), (1, dict), (2, lambda: nodes.update(n2={"CPU": 1})), (2, dict)):
        change()
        allocator.claim("first", "a", 1, 5, CPU, {})
        assert len(calls) == expected
    assert allocator.claim("first", "a", 1, 5, CPU, {"n1": 2}) == {"n1": 2, "n2": 1} and len(calls) == 3
