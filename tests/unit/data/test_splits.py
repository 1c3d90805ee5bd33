import random

import pytest

from raylab.data.splits import assign
from raylab.errors import UsageError

FRACTIONS = {"train": 0.65, "val": 0.15, "test": 0.20}


def test_rows_of_a_patient_stay_together_and_classes_are_shared_alike():
    groups = [f"p{i // 2}" for i in range(800)]  # two stays each
    labels = [int(i % 8 == 0) for i in range(800)]  # every fourth patient has one positive stay
    split = assign(groups, labels, FRACTIONS, seed=1)
    by_patient: dict[str, set[str]] = {}
    for group, part in zip(groups, split, strict=True):
        by_patient.setdefault(group, set()).add(part)
    assert all(len(parts) == 1 for parts in by_patient.values())
    positive = {group for group, label in zip(groups, labels, strict=True) if label}
    for patients, total in ((positive, 100), (set(groups) - positive, 300)):
        parts = [next(iter(by_patient[group])) for group in patients]
        assert {name: parts.count(name) for name in FRACTIONS} == {
            name: round(total * share) for name, share in FRACTIONS.items()
        }


def test_order_of_the_rows_does_not_matter_and_the_seed_does():
    groups, labels = [f"p{i}" for i in range(200)], [i % 3 // 2 for i in range(200)]
    first = dict(zip(groups, assign(groups, labels, FRACTIONS, 0), strict=True))
    order = list(range(200))
    random.Random(3).shuffle(order)
    shuffled = [groups[i] for i in order]
    assert dict(zip(shuffled, assign(shuffled, [labels[i] for i in order], FRACTIONS, 0), strict=True)) == first
    assert dict(zip(groups, assign(groups, labels, FRACTIONS, 1), strict=True)) != first


def test_carve_one_split_out_of_another():
    split = assign([str(i) for i in range(10)], [0] * 10, {"train": 0.8, "val": 0.2}, 0)
    assert (split.count("train"), split.count("val")) == (8, 2)


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.2, "val": -0.2}])
def test_fractions_that_do_not_add_up(fractions):
    with pytest.raises(UsageError, match="add up"):
        assign(["a"], [0], fractions, 0)
