from datetime import UTC, datetime, timedelta, timezone

import polars as pl
import pytest

from raylab.data.text import as_date, as_number, decode, has_zone, separator
from raylab.errors import DataError

TEN = datetime(2150, 1, 1, 10)


def test_lines_of_two_encodings():
    text = "a;°F;é\n"
    assert decode(text.encode() + text.encode("cp1252"), "f") == (text * 2, 1)
    assert decode(b"\xef\xbb\xbf" + text.encode(), "f") == (text, 0)
    for data, what in ((text.encode("utf-16"), "UTF-16"), (b"a\0", "zero bytes"), (b"a\nb \x81\n", "0x81 in line 2")):
        with pytest.raises(DataError, match=what):
            decode(data, "f")


@pytest.mark.parametrize(("header", "mark"), [("a,b", ","), ("a;b;c,d", ";"), ("a\tb", "\t"), ("a", ",")])
def test_separators(header, mark):
    assert separator(header) == mark


@pytest.mark.parametrize(
    ("text", "number", "beside_semicolons"),
    [
        ("36.6", 36.6, 36.6),
        ("36,6", 36.6, 36.6),
        ("-0,5", -0.5, -0.5),
        ("1.234,5", 1234.5, 1234.5),
        ("1,234.5", 1234.5, 1234.5),
        ("1,234", None, 1.234),  # 1.234 or 1234
        ("0,234", 0.234, 0.234),
        ("1,2,3", None, None),
        ("high", None, None),
        ("NaN", None, None),
        ("", None, None),
    ],
)
def test_numbers(text, number, beside_semicolons):
    table = pl.DataFrame({"a": [text]})
    assert table.select(as_number("a", pl.String()))["a"][0] == number
    assert table.select(as_number("a", pl.String(), comma_is_decimal=True))["a"][0] == beside_semicolons


@pytest.mark.parametrize(
    ("text", "moment", "zone"),
    [
        *((text, TEN, False) for text in ("2150-01-01 10:00:00", "2150-01-01T10:00", "2150/01/01 10:00:00.0")),
        *((text, TEN, True) for text in ("2150-01-01T10:00:00Z", "2150-01-01 10:00 UTC", "2150-01-01T12:00:00.0+02:00",
                                         "2150-01-01 04:30:00-0530", "2150-01-01T11:00:00+01")),
        ("2150-01-01", datetime(2150, 1, 1), None),
        *((text, None, None) for text in ("01/02/2150", "soon", "")),
        ("2150-01-01 10:00 PM", None, False),
    ],
)  # fmt: skip
def test_dates(text, moment, zone):
    table = pl.DataFrame({"a": [text]})
    assert table.select(as_date("a", pl.String()))["a"][0] == moment
    assert table.select(has_zone("a", pl.String())).item() is zone


@pytest.mark.parametrize("unit", ["ns", "us", "ms"])
def test_dates_of_typed_columns(unit):
    here = pl.Series([TEN], dtype=pl.Datetime(unit))
    there = pl.Series([TEN.replace(tzinfo=UTC).astimezone(timezone(timedelta(hours=1)))])
    for column, zone in ((here, False), (there.dt.convert_time_zone("Europe/Berlin"), True)):
        table = pl.DataFrame({"a": column})
        assert table.select(as_date("a", column.dtype)).to_series().to_list() == [TEN]
        assert table.select(as_date("a", column.dtype)).schema["a"] == pl.Datetime("us")
        assert table.select(has_zone("a", column.dtype)).item() is zone
    assert pl.DataFrame({"a": [TEN.date()]}).select(as_date("a", pl.Date()))["a"][0] == datetime(2150, 1, 1)
    assert pl.DataFrame({"a": [5]}).select(as_date("a", pl.Int64()))["a"][0] is None
