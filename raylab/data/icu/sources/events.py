"""Events in raylab's own form, for data of one's own: a table `events` and a table `stays`, as CSV, CSV.gz or parquet.

events: one row for each record, with the columns that `raylab.load(...).predict` takes: stay_id, time (hours since the
start of the stay), concept (a name of the concept dictionary), value (a number, or text such as `50%`), and optionally
unit and subject_id. Age, sex and height are concepts like all others. stays: one row for each stay; see STAY_COLUMNS.
Files are read in portions and written by patient, so that they do not have to fit in memory.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from raylab.data.icu.concepts import CONCEPTS, EVENTS, UNIT, SourceData, whole_stays
from raylab.data.icu.demographics import count_unread
from raylab.data.icu.sources.schema import TEXT, Column
from raylab.data.icu.sources.tables import (
    PIECE,
    SHOWN,
    Conversions,
    Findings,
    Pieces,
    column_names,
    find_required,
    rows_of,
)
from raylab.data.icu.text_values import read_text_values
from raylab.data.identifiers import is_missing
from raylab.errors import DataError, escape_unprintable

WHAT = "a directory with the tables events and stays"
IDENTIFIER = Column(pl.String(), nullable=False, identifier="text")
OPTIONAL_TEXT = Column(pl.String(), is_optional=True)
OPTIONAL_NUMBER = Column(pl.Float64(), is_optional=True)

EVENT_COLUMNS = {
    "stay_id": IDENTIFIER,
    "time": Column(pl.Float64(), nullable=False),
    "concept": TEXT,
    "value": TEXT,
    UNIT: OPTIONAL_TEXT,
    "subject_id": Column(pl.String(), identifier="text", is_optional=True),
}
STAY_COLUMNS = {
    "stay_id": Column(pl.String(), nullable=False, identifier="text", unique=True),
    "subject_id": IDENTIFIER,
    "source": OPTIONAL_TEXT,  # the hospital; the name of the directory unless given
    "died": OPTIONAL_TEXT,  # in hospital
    "end_h": OPTIONAL_NUMBER,  # h from the start of the stay to its end
    "end": OPTIONAL_TEXT,  # how it ended
    "period": OPTIONAL_TEXT,  # for a temporal split
    "clock_h": OPTIONAL_NUMBER,  # time of day (h) at which the stay started
}
DIED = dict.fromkeys(("1", "1.0", "true", "yes", "y"), True) | dict.fromkeys(("0", "0.0", "false", "no", "n"), False)
HOW = ("death", "discharge")
SYNTHETIC = "synthetic"
"""The `source` of stays that are not of patients."""


def read(path: Path, work: Path) -> SourceData:
    file = find_required(path, "events", WHAT)
    conversions = Conversions()
    stays = read_stays(find_required(path, "stays", WHAT), path.absolute().name, conversions)
    check_columns(file, EVENT_COLUMNS)
    names_units = UNIT in column_names(file)
    pieces = Pieces(work, "events", max(1, -(-file.stat().st_size // PIECE)))
    findings = Findings(file, conversions)
    patients = stays.select("stay_id", patient="subject_id")
    unknown: list[pl.DataFrame] = []
    seen: list[pl.Series] = []
    of_others = 0
    for part, lines in rows_of(findings, EVENT_COLUMNS, "events"):
        rows = findings.check(part, EVENT_COLUMNS, lines).join(patients, "stay_id", "left", maintain_order="left")
        seen.append(rows["stay_id"].unique())
        is_other = (pl.col("subject_id") != pl.col("patient")).fill_null(False)
        of_others += int(rows.select(is_other.sum()).item())
        is_known = pl.col("concept").is_in(list(CONCEPTS))
        unknown.append(rows.filter(~is_known)["concept"].value_counts())
        rows = rows.filter(is_known & ~is_other).with_columns(subject_id="patient")
        values = read_text_values(rows if names_units else rows.drop(UNIT))
        pieces.add(values.select(*EVENTS.names(), pl.col(UNIT).cast(pl.String)))
    findings.close()
    measured = pl.concat([pl.Series(dtype=pl.String), *seen]).unique()
    conversions.match(measured, stays["stay_id"], file.name, "the table stays")
    note_unknown(unknown, conversions)
    sources = sorted(stays["source"].unique())
    if SYNTHETIC in sources and len(sources) > 1:
        others = ", ".join(escape_unprintable(name) for name in sources if name != SYNTHETIC)
        raise DataError(
            f"{path}: stays of the source '{SYNTHETIC}' beside those of {others}",
            "synthetic patients and others would be scored as one",
            "prepare them in directories of their own",
        )
    counts = {"rows of another patient's stay": of_others} if of_others else {}
    parts = tuple(pieces.close(pl.Schema([*EVENTS.items(), (UNIT, pl.String())])))
    return SourceData(
        pl.concat(parts),
        stays,
        counts,
        parts,
        notes=conversions.close(),
        warnings=tuple(conversions.warnings),
        numbering=f"events {', '.join(sources)}",
        synthetic=sources == [SYNTHETIC],
    )


def read_stays(file: Path, folder: str, conversions: Conversions) -> pl.DataFrame:
    """Return the table of stays; their source is `folder` if it names none."""
    check_columns(file, STAY_COLUMNS)
    findings = Findings(file, conversions)
    parts = [findings.check(part, STAY_COLUMNS, lines) for part, lines in rows_of(findings, STAY_COLUMNS, "stays")]
    findings.close()
    stays = pl.concat(parts) if parts else pl.DataFrame()
    if stays.is_empty():
        raise DataError(f"{file} has no rows", do="write a row for each stay")
    # portions may have been read with different types, so uniqueness counts over all of them
    if twice := stays.height - stays["stay_id"].n_unique():
        raise DataError(f"{file}: column stay_id is not unique: {twice:,} of {stays.height:,} rows repeat one")
    words = {name: pl.col(name).str.strip_chars().str.to_lowercase() for name in ("died", "end")}
    read = stays.with_columns(
        source=pl.when(~is_missing("source", pl.String())).then(pl.col("source").str.strip_chars()).fill_null(folder),
        is_dead=words["died"].replace_strict(DIED, default=None, return_dtype=pl.Boolean),
        how=pl.when(words["end"].is_in(HOW)).then(words["end"]),
    )
    for name, into in (("died", "is_dead"), ("end", "how")):
        unread = count_unread(read, name, into)
        conversions.note("stays with an unreadable {}, set missing", unread, name)
    return whole_stays(read.drop("died", "end").rename({"is_dead": "died", "how": "end"}))


def check_columns(file: Path, allowed: Iterable[str]) -> None:
    """DataError for a column that is not used: a misspelt `units` would otherwise be ignored."""
    if wrong := [name for name in column_names(file) if name not in allowed]:
        raise DataError(
            f"{file} has columns that are not used: {', '.join(map(escape_unprintable, wrong[:10]))}",
            f"the columns are {', '.join(allowed)}",
            "rename or drop them",
        )


def note_unknown(counts: list[pl.DataFrame], conversions: Conversions) -> None:
    """Note the concepts that raylab does not know, with their rows; `counts` are concept and count of each portion."""
    totals: Counter[str | None] = Counter()
    for table in counts:
        totals.update(dict(table.iter_rows()))
    names = [f"'{escape_unprintable((name or '')[:SHOWN])}'" for name in sorted(totals, key=lambda name: name or "")]
    more = f" and {len(names) - 10:,} others" if len(names) > 10 else ""
    what = "rows of concepts that raylab does not know ({}), not used"
    conversions.note(what, totals.total(), ", ".join(names[:10]) + more)
