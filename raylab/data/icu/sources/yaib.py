"""YAIB (Yet Another ICU Benchmark, van de Water et al., ICLR 2024) hourly parquet: dyn.parquet and sta.parquet.

dyn: stay_id, time (a duration, or hours), one column per quantity; sta: stay_id, age, sex, height, weight. Column and
file names may have any letter case; columns that are not in the concept dictionary are ignored. FiO2 is in percent.
There is no patient id, so a stay counts as a patient. The tables have no ventilation and no PEEP, so labels do not
require ventilation here, and labels that need PEEP are rejected. The meta file records both.
"""

from pathlib import Path

import polars as pl

from raylab.data.icu.concepts import EVENTS, STATIC, SourceData, by_id, whole_stays
from raylab.data.icu.demographics import age, count_unread, sex
from raylab.data.icu.sources.schema import Column
from raylab.data.icu.sources.tables import SHOWN, Conversions, Findings, find
from raylab.data.identifiers import identifier, is_missing
from raylab.data.text import as_number
from raylab.errors import DataError

NOTES = (
    "no patient identifiers: a stay counts as a patient, so stays of one patient may be in two splits",
    "values are hourly: a value at hour h was measured at some time within an hour",
)
VENTILATION = ("mech_vent", "niv")
PARQUET = (".parquet",)


DYN = ("stay_id", "time")  # all other columns are numbers
STA = {"stay_id": Column(pl.String(), nullable=False, identifier="text", unique=True)}
"""Optional columns: age, sex, height, weight."""


def read(path: Path) -> SourceData:
    dyn_file, sta_file = find_files(path)
    names = by_id("yaib")
    dyn = scan_table(dyn_file, DYN)
    kinds = dyn.collect_schema()
    known = [name for name in kinds.names() if name in names and names[name] not in STATIC]
    if not known:
        raise DataError(
            f"{dyn_file} has no column of a known quantity",
            f"its columns: {', '.join(kinds.names()[:20])}",
            "give --path a directory in YAIB's form",
        )
    wrong = [name for name in known if kinds[name].is_temporal() or kinds[name].is_nested()]
    if wrong:
        raise DataError(
            f"{dyn_file}: column {', '.join(wrong)} holds {kinds[wrong[0]]}, not numbers",
            f"for example '{first_value(dyn, wrong[0])}'",
            "write numbers",
        )
    stay_id = identifier("stay_id", kinds["stay_id"])
    conversions = Conversions()
    times = hours(dyn_file, dyn, kinds["time"])
    dyn = dyn.select(stay_id, times, *(measured_values(name, kinds[name]) for name in known))
    check_complete(dyn_file, dyn)
    sta = read_statics(sta_file, conversions)
    measured = dyn.select("stay_id").unique().collect()["stay_id"]
    unknown = conversions.match(measured, sta["stay_id"], dyn_file.name, sta_file.name)
    conversions.note("stays without a row in {} (no age, no sex)", unknown, sta_file.name)
    conversions.note(
        "stays of {} without a row in {}",
        conversions.match(sta["stay_id"], measured, sta_file.name, dyn_file.name),
        sta_file.name,
        dyn_file.name,
    )
    ids = pl.concat([measured.to_frame(), sta.select("stay_id")]).unique().sort("stay_id")
    name = f"yaib {path.absolute().name}"
    stays = ids.with_columns(subject_id=pl.col("stay_id"), source=pl.lit(name))
    series = (
        dyn.unpivot(on=known, index=["stay_id", "time"], variable_name="concept")
        .drop_nulls("value")
        .with_columns(pl.col("concept").replace_strict({name: names[name] for name in known}, return_dtype=pl.String))
    )
    wide = sta.with_columns(time=pl.lit(0.0))
    fixed = wide.unpivot(index=["stay_id", "time"], variable_name="concept").drop_nulls("value")
    columns = [pl.col(name) if name != "subject_id" else pl.col("stay_id").alias(name) for name in EVENTS.names()]
    found = {names[name] for name in known}
    return SourceData(
        pl.concat([frame.select(columns) for frame in (series, fixed.lazy())]),
        whole_stays(stays),
        notes=(*NOTES, *conversions.close()),
        warnings=tuple(conversions.warnings),
        lacks=tuple(name for name in VENTILATION if name not in found),
        numbering=name,
    )


def find_files(path: Path) -> tuple[Path, Path]:
    """Return dyn.parquet and sta.parquet of `path`, or of the only directory below it that has them."""
    if not path.is_dir():
        raise DataError(f"no directory at {path}", do="give --path the directory with dyn.parquet and sta.parquet")
    folders = [path, *(folder for folder in sorted(path.rglob("*")) if folder.is_dir())]
    found = [(dyn, sta) for f in folders if (dyn := find(f, "dyn", PARQUET)) and (sta := find(f, "sta", PARQUET))]
    if len(found) != 1:
        what = "no" if not found else f"{len(found)} pairs of"
        raise DataError(
            f"{path} holds {what} dyn.parquet and sta.parquet",
            "a directory in YAIB's form has one of each",
            "give --path the directory that holds both",
        )
    return found[0]


def scan_table(file: Path, columns: tuple[str, ...]) -> pl.LazyFrame:
    """Scan the table with column names in lower case; DataError if it is damaged or lacks `columns`."""
    try:
        names = list(pl.read_parquet_schema(file))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file} is damaged or not parquet", str(error).splitlines()[0], "copy it again") from error
    lower = [name.lower() for name in names]
    if missing := [name for name in columns if name not in lower]:
        raise DataError(f"{file}: no column {', '.join(missing)}", f"its columns: {', '.join(names[:20])}")
    if len(set(lower)) < len(lower):
        raise DataError(f"{file}: two columns have the same name but for its letter case", do="rename one of them")
    return pl.scan_parquet(file).rename(dict(zip(names, lower, strict=True)))


def hours(file: Path, dyn: pl.LazyFrame, kind: pl.DataType) -> pl.Expr:
    """Return `time` in hours, from a duration or a number of hours; null if it is missing."""
    time = pl.col("time")
    if isinstance(kind, pl.Duration):
        return time.dt.total_seconds() / 3600
    unread = dyn.select("time").filter(~is_missing("time", kind) & as_number("time", kind).is_null())
    if (value := first_value(unread, "time")) is not None or kind.is_temporal():
        raise DataError(
            f"{file}: column time holds {kind}, not durations or hours",
            f"for example '{value or first_value(dyn, 'time')}'",
            "write hours as numbers, or durations",
        )
    return as_number("time", kind)


def measured_values(name: str, kind: pl.DataType) -> pl.Expr:
    """Return the column as Float64: null if nothing was measured, NaN if the entry is not a number."""
    return pl.when(~is_missing(name, kind)).then(as_number(name, kind).fill_null(float("nan"))).alias(name)


def first_value(table: pl.LazyFrame, column: str) -> str | None:
    """Return the first value of a column, shortened; None if it has none."""
    value = table.select(pl.col(column).drop_nulls().first()).collect().item()
    return None if value is None else str(value)[:SHOWN]


def check_complete(file: Path, dyn: pl.LazyFrame) -> None:
    """Raise DataError if rows lack an identifier that can be matched exactly, or a time."""
    rows, *lost = dyn.select(pl.len(), *(pl.col(name).null_count() for name in DYN)).collect().row(0)
    wrong = [
        f"column {name} is empty or cannot be read in {n:,} of {rows:,} rows"
        for name, n in zip(DYN, lost, strict=True)
        if n
    ]
    if wrong or not rows:
        raise DataError(f"{file}: {'; '.join(wrong) or 'no rows'}", do="correct this table")


def read_statics(file: Path, conversions: Conversions) -> pl.DataFrame:
    """Return stay_id and the static concepts of the table as numbers; unreadable values are noted."""
    names = by_id("yaib")
    table = scan_table(file, ("stay_id",)).with_row_index("row of the file", offset=1).collect()
    table = table.unique(pl.exclude("row of the file"), keep="first", maintain_order=True)
    findings = Findings(file, conversions)
    read = findings.check(table.select("stay_id"), STA, table["row of the file"])
    table = table.with_columns(stay_id=read["stay_id"])
    findings.close()
    known = [name for name in table.columns if names.get(name) in STATIC]
    read = table.select("stay_id", *(static(name, table.schema[name]) for name in known))
    for name in known:
        both = pl.DataFrame([table[name], read[name].alias("read")])
        conversions.note("stays with an unreadable {}, set missing", count_unread(both, name, "read"), name)
    return read.rename({name: names[name] for name in known})


def static(name: str, kind: pl.DataType) -> pl.Expr:
    if name in ("age", "sex"):
        return age(name, kind) if name == "age" else sex(name)
    return as_number(name, kind)
