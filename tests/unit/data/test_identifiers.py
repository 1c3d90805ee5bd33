import math

import hypothesis
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylab.data.identifiers import (
    MISSING,
    People,
    Person,
    form,
    identifier,
    is_missing,
    look_alike,
    not_among,
    one_identifier,
)
from raylab.errors import DataError


def read(values, kind=None, numeric=False):
    table = pl.DataFrame({"id": pl.Series(values, dtype=kind)})
    return table.select(identifier("id", table.schema["id"], numeric))["id"].to_list()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        *(([7], kind) for kind in (pl.Int8, pl.Int32, pl.Int64, pl.UInt64, pl.Float32, pl.Float64)),
        (["7"], pl.Categorical),
        (["7"], pl.Enum(["7"])),
        ([b"7"], pl.Binary),
        (["7.00"], pl.Decimal(10, 2)),
        *(([text], pl.String) for text in ("7", " 7", "7 ", "7\t", "7\u00a0", "\ufeff7", "7.0", "7.", "7.000 ")),
    ],
)
def test_seven_is_seven_whoever_wrote_it(values, kind):
    column = pl.Series(values).cast(kind)
    assert read(column) == ["7"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([7.5, math.nan, math.inf, None, 2.0**53, -(2.0**53)], pl.Float64),
        ([2.0**24], pl.Float32),  # 16,777,217 is written as 16,777,216
        (["7.5", ".5", "1.2E+17", "1e+05", "9007199254740993.0"], pl.String),
        (["", " ", "NaN", "none", "NULL", "n/a", None], pl.String),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_no_identifier(values, kind):
    assert set(read(values, kind)) == {None}


def test_text_stays_what_it_is():
    texts = ["007", "P-7", "p-7", "12345678901234567890", "9007199254740993", "1e5", "1.2.840.10008", "7a", "-3"]
    assert read(texts) == texts
    assert read(["e\u0301"]) == ["\u00e9"]


def test_leading_zeros_mean_nothing_where_identifiers_are_numbers():
    assert read(["007", "7", "-07", "0", "00", "ICU-7", "7.0"], numeric=True) == ["7", "7", "-7", "0", "0", None, "7"]


@pytest.mark.parametrize("values", [[True], [[7]]])
def test_types_that_hold_no_identifiers(values):
    with pytest.raises(DataError, match="column id contains"):
        read(values)


WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=6)
NUMBERS = st.from_regex(r"[ ]?-?[0-9]{0,3}\.?[0-9]{0,2}(e\+1)?", fullmatch=True)


@hypothesis.settings(max_examples=20)
@given(st.lists(st.one_of(WORDS, NUMBERS), min_size=20))
def test_one_text_is_read_as_a_column_is(texts):
    assert read(texts, pl.String) == [one_identifier(text) for text in texts]


@given(st.integers(-(2**53) + 1, 2**53 - 1))
def test_whole_numbers_match_their_floats(number):
    assert read([number], pl.Int64) == read([float(number)], pl.Float64) == read([f"{number}.0"]) == [str(number)]


def test_missing_is_told_from_what_cannot_be_read():
    table = pl.DataFrame({"a": [math.nan, None, 7.5], "b": ["NA", None, "7.5"]})
    assert [table.select(is_missing(c, table.schema[c])).to_series().to_list() for c in "ab"] == 2 * [
        [True, True, False]
    ]
    assert all(one_identifier(word) is None for word in MISSING)


def test_a_number_means_a_person_within_its_source():
    one, other = Person.of("Hospital 1", "7"), Person.of("hospital 2", "7")
    assert one != other and one == Person.of(" hospital 1 ", "7")
    assert one not in People([other]) and other in People([one, other])
    unnamed = Person.of("", "7")
    assert unnamed in People([one]) and one in People([unnamed]) and Person.of("x", "8") not in People([unnamed])


@given(st.text(), st.text(), st.text(), st.text())
def test_two_persons_have_two_names(a, b, c, d):
    one, other = Person.of(a, b), Person.of(c, d)
    assert (str(one) == str(other)) == (one == other)
    assert Person.parse(str(one)) == one


def test_tables_whose_identifiers_do_not_meet():
    numbers, texts = pl.Series(["1", "22", "333"]), pl.Series([f"ICU-{n}" for n in range(9)])
    with pytest.raises(DataError) as caught:
        not_among(numbers, texts, "CHARTEVENTS", "ICUSTAYS")
    assert str(caught.value).startswith(
        "no identifier of CHARTEVENTS is in ICUSTAYS: 0 of 3 are among its 9\n"
        "  why:  in CHARTEVENTS they are whole numbers of 1 to 3 digits, in ICUSTAYS text that begins with 'ICU-'"
    )
    assert not_among(numbers, pl.Series(["22", "4"]), "a", "b") == 2
    assert not_among(numbers.clear(), texts, "a", "b") == 0


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["007", "012"], "whole numbers of 3 digits with leading zeros"),
        (["Meier-7", "Meier-8"], "text such as 'aaaaa-0' (a for letters, 0 for digits)"),  # two: may be a name
        (["\u738b7"], "text such as 'a0' (a for letters, 0 for digits)"),
        (["7", "a"], "partly whole numbers (1) and partly text (1)"),
        ([], "none"),
    ],
)
def test_the_form_of_identifiers_names_nobody(ids, words):
    assert form(pl.Series(ids, dtype=pl.String)) == words


def test_identifiers_that_look_alike_are_counted():
    assert look_alike(["7", "007", "8", "P1", "p1", "p2"]) == 4
