import polars as pl
import pytest

from raylab.data.icu.cohorts import CONTROLS, Framing, attrition, matched, summed
from raylab.data.icu.labels import label
from raylab.errors import DataError

STAYS = pl.DataFrame(
    {
        "subject_id": list("abcdef"),
        "stay_id": list("abcdef"),
        "onset_h": [14.0, 20.0, 40.0, None, None, None],
        "last": [47.0, 47.0, 47.0, 20.0, 21.0, 47.0],
        "end_h": [60.0, 60.0, 60.0, 21.0, 22.0, None],
        "end": ["discharge", "death", "discharge", "death", "discharge", None],
        "age": [60.0, 60.0, 18.0, None, 60.0, 60.0],
    }
)


def test_a_landmark_with_a_gap():
    kept, steps = attrition(STAYS, Framing(12, 24, gap=4), label("ahrf"))
    assert kept["stay_id"].to_list() == list("bcdef")  # a's onset lies in the gap
    assert steps[-1] == ("no onset in the gap of 4 h", 5, 5)
    rows = label("ahrf").rows(kept, Framing(12, 24, gap=4))
    assert rows.select("stay_id", "label", "outcome").rows() == [
        ("b", 1, "onset"),
        ("c", 1, "onset"),  # 40 h is the last that counts
        ("d", 0, "death before onset"),
        ("e", 0, "discharge before onset"),
        ("f", 0, "no onset within the horizon"),
    ]
    rows = label("ahrf").rows(STAYS, Framing(12, 24, gap=8))
    assert rows["stay_id"].to_list() == list("cdef")  # 20 h lies in it too


def test_rolling_goes_on_until_onset_or_the_last_record():
    rows = label("ahrf").rows(STAYS, Framing(12, 6, kind="rolling", until=24))
    times = {stay: group["at_h"].to_list() for (stay,), group in rows.group_by("stay_id", maintain_order=True)}
    assert times == {
        "a": [12, 13],
        "b": list(range(12, 20)),
        "c": list(range(12, 25)),
        "d": list(range(12, 20)),
        "e": list(range(12, 21)),
        "f": list(range(12, 25)),
    }
    labels = rows.filter(pl.col("stay_id") == "b").select("at_h", "label").rows()
    assert labels == [(at, int(at >= 14)) for at in range(12, 20)]


def test_an_early_onset_is_prevalent():
    stays = STAYS.with_columns(onset_h=pl.Series([5.9, 6.0, 13.0, None, None, None]))
    kept, steps = attrition(stays, Framing(2), label("berlin-oxygenation"))
    assert kept["stay_id"].to_list() == list("bcdef")
    assert [step for step, _, _ in steps][4].startswith("no onset before 6 h")


def test_a_label_is_defined_for_adults_and_who_may_be_one():
    stays = STAYS.with_columns(age=pl.Series([17.9, 18.0, 60.0, None, 0.0, 91.4]))
    kept, steps = attrition(stays, Framing(2), label("ahrf"))
    assert kept["stay_id"].to_list() == list("bcdf")
    assert steps[1] == ("18 years and older, or of unknown age", 4, 4)
    every_age, steps = attrition(stays, Framing(2), label("ahrf", {"min_age": 0}))
    assert every_age.height == 6 and steps[1][0] == "at least one record"


def test_the_exclusion_that_empties_a_cohort_is_named():
    _, steps = attrition(STAYS, Framing(48), label("ahrf"))
    with pytest.raises(DataError, match="empty after 'at least one record beyond 48 h'"):
        summed([steps])
    _, others = attrition(STAYS, Framing(12), label("ahrf"))
    assert summed([others, others])[0] == {"step": "all stays", "patients": 12, "stays": 12}


def rows(*table: tuple[str, str, int, float, float]) -> pl.DataFrame:
    frame = pl.DataFrame(table, schema=["stay_id", "split", "label", "age", "sex"], orient="row")
    return frame.with_columns(ventilated=pl.lit(True), at_h=pl.lit(12.0), icu_type=pl.lit(3.0))


def test_controls_are_like_their_case():
    table = rows(
        ("case", "train", 1, 61, 1),
        ("like", "train", 0, 69, 1),
        ("older", "train", 0, 70, 1),
        ("other sex", "train", 0, 65, 0),
        ("other split", "test", 0, 65, 1),
        ("alone", "train", 1, 30, 0),
    )
    chosen = table.filter(matched(table))["stay_id"].to_list()
    assert chosen == ["case", "like"]


def test_controls_are_few_and_do_not_depend_on_the_order():
    table = rows(("case", "train", 1, 61, 1), *((f"c{i}", "train", 0, 60 + i % 10, 1) for i in range(30)))
    chosen = set(table.filter(matched(table))["stay_id"])
    assert len(chosen) == 1 + CONTROLS and "case" in chosen
    turned = table.reverse()
    assert set(turned.filter(matched(turned))["stay_id"]) == chosen
