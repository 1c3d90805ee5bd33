import math

import polars as pl
import pytest

from raylab.data.icu.demographics import OLDEST_AGE, age, count_unread, sex


def years(value, kind=pl.String):
    return pl.DataFrame({"a": pl.Series([value], dtype=kind)}).select(age("a", kind()))["a"][0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, 63) for text in ("63", " 63 ", "63.0", "063Y", "63 years", "63 yrs old", "63y")),
        ("63,5", 63.5),
        *((text, OLDEST_AGE) for text in ("> 89", ">89", ">= 90", "89+", "90 or older", "over 89", "300")),
        ("85+", 85),
        ("< 18", 17),
        ("006M", 0.5),
        ("365 days", 365 / 365.25),
        *((text, None) for text in ("", "unknown", "60-69", "adult", "1e2", "6 3")),
    ],
)  # fmt: skip
def test_ages_in_words(text, expected):
    assert years(text) == (expected if expected is None else pytest.approx(expected))


def test_ages_as_numbers():
    assert [years(v, pl.Float64) for v in (63.5, 300.2, math.nan, None)] == [63.5, OLDEST_AGE, None, None]
    assert years(150, pl.Int64) == 150  # an error, which the plausible range shows


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["M", "Male", " male ", "1", "1.0", "8507"], 1.0),
        (["F", "F ", "female", "0", "0.0", "8532"], 0.0),
        (["2", "X", "", "other", "mf", None], None),
        ([1, 1], 1.0),
        ([0.0, 0.0], 0.0),
        ([2, 3], None),
        ([True], None),
    ],
)
def test_sexes(values, expected):
    table = pl.DataFrame({"s": values})
    read = table.select(sex("s"))["s"]
    assert set(read) == {expected}
    said = sum(value not in (None, "") for value in values)
    assert count_unread(table.with_columns(r=read), "s", "r") == (said if expected is None else 0)
