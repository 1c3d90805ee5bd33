"""Raw tables in portions, checked by schema."""

from pathlib import Path

import polars as pl
import pytest

from raylab.data.icu.sources import tables
from raylab.data.icu.sources.schema import DATE, NUMBER, TEXT, Column
from raylab.data.icu.sources.tables import Conversions, Findings, Pieces, rows_of
from raylab.errors import DataError

SCHEMA = {"id": Column(pl.String(), nullable=False, identifier="number"), "at": DATE, "value": NUMBER, "note": TEXT}
ROWS = ["7,2150-01-01 10:00:00,1.5,ok", '8,2150-01-01 11:00:00,2.5,"two\nlines"', "9,2150-01-02 00:00:00,,"]


def read(file: Path) -> tuple[pl.DataFrame, Findings]:
    findings = Findings(file, Conversions())
    parts = [findings.check(part, SCHEMA, lines) for part, lines in rows_of(findings, SCHEMA, "EVENTS")]
    findings.close()
    return pl.concat(parts), findings


def table(folder: Path, rows: list[str]) -> Path:
    file = folder / "EVENTS.csv"
    file.write_text("\n".join(["ID,AT,VALUE,NOTE", *rows]) + "\n")
    return file


@pytest.mark.parametrize("chunk", [1, 7, 40, 1 << 20])
def test_portions_of_any_size_are_one_table(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tables, "CHUNK", chunk)
    rows, findings = read(table(tmp_path, ROWS))
    assert rows["id"].to_list() == ["7", "8", "9"]
    assert rows["at"].dt.hour().to_list() == [10, 11, 0]
    assert rows["note"].to_list() == ["ok", "two\nlines", None]
    assert findings.rows == 3


@pytest.mark.parametrize("identifier", ["7.0", "007", " 7 ", "7"])
@pytest.mark.parametrize("date", ["2150-01-01 10:00:00", "2150-01-01T10:00", "2150-01-01T11:00+01:00"])
def test_a_value_in_another_form_changes_no_other_row(tmp_path, monkeypatch, identifier, date):
    monkeypatch.setattr(tables, "CHUNK", 1)  # a portion a row
    zoned = date.endswith("+01:00")
    others = [row.replace("00,", "00Z,") if zoned else row for row in ROWS[:1] + ROWS[2:]]
    rows, _ = read(table(tmp_path, [others[0], f"{identifier},{date},3,", others[1]]))
    assert rows["id"].to_list() == ["7", "7", "9"]
    assert rows["at"].dt.hour().to_list() == [10, 10, 0]


def test_dates_with_and_without_a_zone_are_refused_across_portions(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 1)
    _, findings = read(table(tmp_path, [ROWS[0], "8,2150-01-01T11:00+01:00,1,"]))
    with pytest.raises(DataError, match="with and without a time zone"):
        findings.conversions.close()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("x,2150-01-01 10:00:00,1,", "id is not a whole number in 1 of 4 rows .first: in line 6"),
        (",2150-01-01 10:00:00,1,", "id is empty in 1 of 4 rows"),
        ("7,01/02/2150,1,", "at is not a date in 1 of 4 rows .first: '01/02/2150' in line 6"),
        ("7,2150-01-01 10:00:00,many,", "value is not a number in 1 of 4 rows .first: 'many' in line 6"),
    ],
)
def test_what_is_wrong_is_said_by_column_and_line(tmp_path, monkeypatch, row, why):
    monkeypatch.setattr(tables, "CHUNK", 1)  # the line of a row follows from the portions before it
    with pytest.raises(DataError, match=why):
        read(table(tmp_path, [*ROWS, row]))


@pytest.mark.parametrize("end", ['"', '9,2150-01-02 00:00:00,1,"'], ids=["of numbers", "of text"])
def test_a_lone_quote_at_the_end_is_refused(tmp_path, end):
    file = table(tmp_path, ROWS)
    with file.open("a") as out:
        out.write(end)
    with pytest.raises(DataError, match=r"EVENTS\.csv is not a table of commas[\s\S]*could not parse"):
        read(file)


def test_a_quoted_number_at_the_end_is_read(tmp_path):
    file = tmp_path / "EVENTS.csv"
    file.write_text('NOTE,VALUE,AT,ID\nok,1.5,2150-01-01 10:00:00,"7"\nok,2.5,2150-01-01 11:00:00,"8"')
    assert read(file)[0]["id"].to_list() == ["7", "8"]


@pytest.mark.parametrize("count", [1, 3])
def test_pieces_keep_every_row_and_each_patient_in_one(tmp_path, count):
    pieces = Pieces(tmp_path, "events", count)
    kinds = pl.Schema({"subject_id": pl.String, "value": pl.Int64})
    for k in range(4):
        pieces.add(pl.DataFrame({"subject_id": [str(n) for n in range(9)], "value": [k] * 9}, schema=kinds))
    parts = [piece.collect() for piece in pieces.close(kinds)]
    assert len(parts) == count
    assert pl.concat(parts).sort("subject_id", "value")["value"].to_list() == [0, 1, 2, 3] * 9
    assert sum(part["subject_id"].n_unique() for part in parts) == 9


def test_pieces_without_a_row_are_empty_tables(tmp_path):
    kinds = pl.Schema({"subject_id": pl.String, "value": pl.Int64})
    assert [piece.collect().shape for piece in Pieces(tmp_path, "none", 2).close(kinds)] == [(0, 2), (0, 2)]


def test_tables_of_parquet_are_cut_by_their_rows(tmp_path, monkeypatch):
    """Their files are small where values repeat: by their size, one batch would hold everybody."""
    monkeypatch.setattr(tables, "PIECE", 10_000)
    rows = pl.DataFrame({"subject_id": ["1"] * 1000, "value": ["7"] * 1000})
    rows.write_parquet(tmp_path / "charts.parquet")
    assert (tmp_path / "charts.parquet").stat().st_size < tables.PIECE
    assert tables.piece_count(tmp_path / "charts.parquet") == 1000 * tables.ROW / tables.PIECE
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"torn\.parquet is damaged or not parquet"):
        tables.piece_count(tmp_path / "torn.parquet")
