"""Raw tables of a directory: found by name in any letter case, read in portions of limited size, checked by schema.

Violations of a schema are collected over the entire table and reported in one error, with table, column and number of
rows.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import polars as pl

from raylab.data.icu.sources.schema import Column, Schema, empty_table
from raylab.data.identifiers import identifier, is_missing, not_among
from raylab.data.prefetch import read_ahead
from raylab.data.text import as_date, as_number, decode, has_zone, not_utf8, separator, usual_date, usual_number, utf8
from raylab.errors import DataError

if TYPE_CHECKING:  # imported on demand, because the import takes longer than reading a small text table
    import pyarrow.parquet as pq

CHUNK = 8 << 20  # bytes of text parsed at a time
LINE = 64 << 20  # bytes of the longest line, or of lines within quotes: a small gzip file may unpack to any size
PIECE = 1 << 30  # bytes of text per batch of patients
ROW = 100  # bytes of a row of charted values as text
ENDINGS = (".csv", ".csv.gz", ".parquet")
MANY_STRANGE = 0.1  # fraction of a table's identifiers missing from another table above which there is a warning
PLACES = 1 << 32
BATCH = 1 << 18  # rows that are checked at a time: every call costs as much as some thousand rows
SHOWN = 40  # characters of a value in a message


def find(path: Path, name: str, endings: Sequence[str] = ENDINGS) -> Path | None:
    """Return the file `name` with one of `endings` in directory `path`, in any letter case; None if there is none.

    Raises DataError if there are several (such as a table and its compressed copy), because the choice is ambiguous.
    """
    wanted = {name.lower() + ending for ending in endings}
    files = sorted(file for file in path.iterdir() if file.name.lower() in wanted) if path.is_dir() else []
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path} holds the table {name} more than once", names, "keep one of them")
    return files[0] if files else None


def find_required(path: Path, name: str, what: str, endings: Sequence[str] = ENDINGS) -> Path:
    file = find(path, name, endings)
    if file is None:
        raise DataError(
            f"{path} has no table {name} ({' or '.join(endings)})", f"it is part of {what}", f"give --path {what}"
        )
    return file


class Conversions:
    """Records what was converted while reading the tables of a data set, for the notes of a SourceData."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.zones: dict[bool, str] = {}  # with or without a time zone -> the first column with such dates

    def note(self, text: str, count: int, *words: str) -> None:
        """Add a note with the number of rows or stays that `text` describes, unless it is 0."""
        if count:
            self.notes.append(f"{text.format(*words)}: {count:,}")

    def match(self, ids: pl.Series, others: pl.Series, table: str, other: str) -> int:
        """Return the result of `not_among`, and add a warning if it is large."""
        strange, all_ids = not_among(ids, others, table, other), ids.drop_nulls().n_unique()
        if strange > MANY_STRANGE * all_ids:
            self.warnings.append(
                f"{strange:,} of {all_ids:,} identifiers of {table} are not in {other}: do they belong together?"
            )
        return strange

    def add_zones(self, place: str, zones: Iterable[bool | None]) -> None:
        for zone in zones:
            if zone is not None:
                self.zones.setdefault(zone, place)

    def close(self) -> tuple[str, ...]:
        """Return the notes; DataError if some dates have a time zone and others do not, so that they are not
        comparable."""
        if len(self.zones) == 2:
            raise DataError(
                f"dates with and without a time zone: with one in {self.zones[True]}, without in {self.zones[False]}",
                "the time between them is ambiguous",
                "write all dates with a time zone, or all in one local time without a zone",
            )
        zones = ("dates have time zones: hours are exact, and the time of day is UTC's",) if True in self.zones else ()
        return (*self.notes, *zones)


class Findings:
    """The violations of a table's schema, counted over all portions."""

    def __init__(self, file: Path, conversions: Conversions | None = None) -> None:
        self.file, self.rows = file, 0
        self.conversions = conversions or Conversions()
        self.wrong: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # violation -> the first such value and its line
        self.separator = ","
        self.not_utf8 = 0  # lines
        self.marks: dict[str, set[str]] = {}  # column -> decimal marks of its numbers

    def check(
        self,
        rows: pl.DataFrame,
        schema: Schema,
        places: pl.Series | None = None,
        asked: pl.Series | None = None,
    ) -> pl.DataFrame:
        """Return `rows` (text, or already of the right type) in the types of the schema, and count violations.

        `places`: of each row in the file (`rows_of`), for the message. `asked`: the rows to check.
        """
        absent = [name for name, column in schema.items() if column.is_optional and name not in rows.columns]
        rows = rows.with_columns(pl.lit(None, pl.String).alias(name) for name in absent)
        kinds = rows.schema
        read = {name: self.read(rows, name, column) for name, column in schema.items()}
        whole = rows.with_columns(of["typed"].alias(name) for name, of in read.items())
        self.rows += rows.height
        if asked is not None:
            rows = rows.filter(asked)
            read = {name: of.filter(asked) for name, of in read.items()}
            places = None if places is None else places.filter(asked)
        for name, column in schema.items():
            typed, silent = read[name]["typed"], read[name]["silent"]
            lost = typed.is_null() & ~silent
            if lost.any():
                what = f"{name} is not {column.describe()}"
                self.wrong[what] += int(lost.sum())
                if what not in self.first:
                    self.first[what] = self.example(rows, name, lost, places, column.identifier is None)
            if not column.nullable:
                self.count(f"{name} is empty", typed.is_null() & silent)
            if column.is_in:
                self.count(f"{name} is none of {', '.join(map(str, column.is_in))}", ~typed.is_in(column.is_in))
            if column.unique:
                self.count(f"{name} is not unique", typed.is_duplicated() & typed.is_not_null())
            if isinstance(column.dtype, pl.Datetime):
                self.conversions.add_zones(f"{self.file.name}, column {name}", read[name]["zone"].unique().to_list())
            if column.dtype.is_float() and kinds[name] == pl.String:
                self.marks.setdefault(name, set()).update(
                    mark for mark in {",", "."} - self.marks.get(name, set()) if has_decimal_mark(rows[name], mark)
                )
        return whole

    def count(self, what: str, wrong: pl.Series) -> None:
        if n := int(wrong.sum()):
            self.wrong[what] += n

    def read(self, rows: pl.DataFrame, name: str, column: Column) -> pl.DataFrame:
        """Return typed, silent (the value is missing) and, for dates, zone of the column `name`."""
        kind = rows.schema[name]
        if kind == pl.String == column.dtype and not column.identifier:
            return rows.select(typed=name, silent=pl.col(name).is_null())
        if kind == pl.String and column.dtype.is_float():
            usual = rows.select(typed=usual_number(name), silent=pl.col(name).is_null())
            if (usual["typed"].is_null() == usual["silent"]).all() and not usual["typed"].is_nan().any():
                return usual
        if not isinstance(column.dtype, pl.Datetime):
            return by_value(rows, name, typed=self.as_type(name, kind, column), silent=is_missing(name, kind))
        if kind == pl.String:
            usual = rows.select(typed=usual_date(name), silent=pl.col(name).is_null())
            if (usual["typed"].is_null() == usual["silent"]).all():
                return usual.with_columns(zone=pl.when(~pl.col("silent")).then(False))
        zone = has_zone(name, kind)
        return by_value(rows, name, typed=as_date(name, kind), silent=is_missing(name, kind), zone=zone)

    def as_type(self, name: str, kind: pl.DataType, column: Column) -> pl.Expr:
        """Return the column `name`, of type `kind` in the file, in the schema's type; null if that is impossible."""
        if column.identifier:
            return identifier(name, kind, numeric=column.identifier == "number")
        if column.dtype.is_float():
            return as_number(name, kind, comma_is_decimal=self.separator != ",")
        if column.dtype.is_integer():
            number = pl.col(name) if kind.is_integer() else identifier(name, kind, numeric=True)
            return number.cast(pl.Int64, strict=False)
        return pl.col(name).cast(column.dtype, strict=False)

    def example(self, rows: pl.DataFrame, name: str, lost: pl.Series, places: pl.Series | None, is_shown: bool) -> str:
        """Describe the first lost value and its line; the value of an identifier is not shown."""
        at = lost.arg_max() or 0
        value = f" '{str(rows[name][at])[:SHOWN]}'" if is_shown else ""
        place = "" if places is None else f" in line {self.line(places[at]):,}"
        return f" (first:{value}{place})" if value or place else ""

    def line(self, place: int) -> int:
        """Return the line of the file (for parquet: the row) at `place` (`rows_of`)."""
        portion, line = divmod(place, PLACES)
        if portion:
            with _open(self.file) as stream:
                _read_line(stream)
                line += sum(body.count(b"\n") for body in islice(_portions(stream), portion))
        return line

    def close(self) -> None:
        """Raise DataError if any portion violated the schema; add notes on conversions."""
        if self.wrong:
            shown = "; ".join(
                f"column {what} in {n:,} of {self.rows:,} rows{self.first.get(what, '')}"
                for what, n in self.wrong.most_common()
            )
            raise DataError(f"{self.file}: {shown}", do="correct these rows, or copy the table again")
        for name, marks in self.marks.items():
            if len(marks) == 2:
                raise DataError(
                    f"{self.file}: column {name} has numbers with decimal commas and with decimal points",
                    "a comma or a point may also separate thousands",
                    "write all numbers with a decimal point",
                )
            if "," in marks:
                self.conversions.notes.append(f"{self.file.name}: column {name} has decimal commas")
        if self.not_utf8:
            self.conversions.notes.append(not_utf8(self.file.name, self.not_utf8))


def by_value(rows: pl.DataFrame, name: str, **made: pl.Expr) -> pl.DataFrame:
    """Return expressions of the column `name`, row by row. Each distinct text is parsed once, because most repeat."""
    column = rows.select(name)
    if column.schema[name] != pl.String:
        return column.select(**made)
    values = column.unique().select(name, **made)
    return column.join(values, name, "left", nulls_equal=True, maintain_order="left").drop(name)


def has_decimal_mark(texts: pl.Series, mark: str) -> bool:
    """Return whether one of the numbers in text has decimals after `mark`."""
    marked = texts.filter(texts.str.contains(mark, literal=True).fill_null(False))
    return bool(marked.str.contains(rf"[{mark}]\d+\s*$").any())


def rows_of(findings: Findings, schema: Schema, table: str) -> Iterator[tuple[pl.DataFrame, pl.Series]]:
    """Yield portions of the table's columns of `schema`, with names in lower case, and the place of each row. The
    columns of a text file are text, or whole numbers.

    A place is the number of the portion, times PLACES, plus the line after the portions before it; the lines of a text
    file are only counted for a message (`Findings.line`). Raises DataError if a column is missing or the file is
    damaged.
    """
    if findings.file.suffix.lower() == ".parquet":
        first = 1
        for part in _parquet(findings.file, schema, table):
            yield part, pl.int_range(first, first + part.height, eager=True)
            first += part.height
        return
    for portion, part in enumerate(read_ahead(_text(findings, schema, table))):
        first = portion * PLACES + 2  # the first line is the header
        yield part, pl.int_range(first, first + part.height, eager=True)


def _text(findings: Findings, schema: Schema, table: str) -> Iterator[pl.DataFrame]:
    file = findings.file
    with _open(file) as stream:
        try:
            findings.separator, names = _header(stream, file)
            mark = findings.separator
            columns = _columns(file, names, schema, table)
            numbers = {here: pl.Int64 for here, name in columns.items() if schema[name].holds_whole_numbers()}
            for body in _portions(stream, (mark.join(names) + "\n").encode()):
                text, other = utf8(body, str(file))
                findings.not_utf8 += other
                try:
                    part = _parse(text, columns, mark, numbers)
                except pl.exceptions.PolarsError:
                    numbers = {}  # 7.0, NA, ...: from here on, read all columns as text, which Findings.check parses
                    part = _parse(text, columns, mark, numbers)
                yield part.rename(columns)
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(f"{file} is damaged or truncated", str(error), "copy it again") from error
        except pl.exceptions.PolarsError as error:
            names_of = {",": "commas", ";": "semicolons", "\t": "tabs"}
            what = f"{file} is not a table of {names_of[findings.separator]}"
            raise DataError(what, str(error).splitlines()[0], "copy it again") from error


def _parse(
    text: bytes, columns: Mapping[str, str], mark: str, numbers: Mapping[str, type[pl.DataType]]
) -> pl.DataFrame:
    # A lone quote at the very end is an error in a column of text, and a panic of polars in one of numbers
    types = {} if text.endswith(b'"') else numbers
    return pl.read_csv(text, columns=list(columns), infer_schema=False, separator=mark, schema_overrides=types)


def read_table(path: Path, table: str, schema: Schema, what: str, conversions: Conversions) -> pl.DataFrame:
    """Read a small table at once: checked, and without exact duplicates."""
    findings = Findings(find_required(path, table, what), conversions)
    parts = [findings.check(part, schema, places) for part, places in rows_of(findings, schema, table)]
    findings.close()
    return pl.concat([empty_table(schema), *parts]).unique(maintain_order=True)


def _open(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def column_names(file: Path) -> list[str]:
    """Return the names of the columns of a table in lower case; DataError if the file is damaged."""
    try:
        if file.suffix.lower() == ".parquet":
            names = list(pl.read_parquet_schema(file))
        else:
            with _open(file) as stream:
                _, names = _header(stream, file)
    except (pl.exceptions.PolarsError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{file} is damaged", str(error).partition("\n")[0], "copy it again") from error
    return [name.lower() for name in names]


def _header(stream: BinaryIO, file: Path) -> tuple[str, list[str]]:
    """Return the separator and the names of the columns in the first line."""
    header, _ = decode(_read_line(stream), str(file))
    mark = separator(header)
    return mark, [name.strip().strip('"') for name in header.strip().split(mark)]


def _portions(stream: BinaryIO, header: bytes = b"") -> Iterator[bytes]:
    """Yield complete lines below `header`, about CHUNK bytes at a time; a line break within quotes does not end a
    line."""
    while block := stream.read(CHUNK):
        # `in` is several times as fast as `count`, and most blocks have no quote
        parts, quotes, line = [header, block], block.count(b'"') if b'"' in block else 0, block[-1:]
        while line and not (line.endswith(b"\n") and quotes % 2 == 0):
            line = _read_line(stream)
            parts.append(line)
            if sum(map(len, parts)) > CHUNK + LINE:
                raise OSError(f"a quote that is not closed within {LINE >> 20} MiB")
            quotes += line.count(b'"')
        if not all(part.isspace() for part in parts[1:]):
            yield b"".join(parts)


def _read_line(stream: BinaryIO) -> bytes:
    line = stream.readline(LINE)
    if len(line) == LINE:
        raise OSError(f"a line of more than {LINE >> 20} MiB")
    return line


def _columns(file: Path, names: Sequence[str], schema: Schema, table: str) -> dict[str, str]:
    """Return {name in the file: name in the schema}."""
    by_lower = {name.lower(): name for name in names}
    aliases = {name: (name, *column.names) for name, column in schema.items()}
    in_file = {name: next((by_lower[n] for n in others if n in by_lower), None) for name, others in aliases.items()}
    missing = [name for name, here in in_file.items() if here is None and not schema[name].is_optional]
    if missing:
        raise DataError(
            f"{file} is not the table {table}: no column {', '.join(missing)}",
            f"its columns: {', '.join(names[:20])}",
            "give --path the tables as they were published",
        )
    return {here: name for name, here in in_file.items() if here is not None}


def _parquet(file: Path, schema: Schema, table: str) -> Iterator[pl.DataFrame]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = _columns(file, list(pl.read_parquet_schema(file)), schema, table)
        for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH, columns=list(columns)):
            part = pl.from_arrow(batch)
            assert isinstance(part, pl.DataFrame)
            yield part.rename(columns)
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        raise _damaged_parquet(file, error) from error


def _damaged_parquet(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is damaged or not parquet", str(error).splitlines()[0], "copy it again")


def in_batches(parts: Iterable[pl.DataFrame], rows: int = BATCH) -> Iterator[pl.DataFrame]:
    """Yield the rows of `parts` in frames of at least `rows` rows, the last of each run of equal column types less."""
    waiting: list[pl.DataFrame] = []
    for part in parts:
        if waiting and (part.schema != waiting[0].schema or sum(each.height for each in waiting) >= rows):
            yield pl.concat(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield pl.concat(waiting)


class Pieces:
    """Rows of many patients in `count` batches by patient: on disk, so that only one is in memory at a time, or in
    memory if there is only one."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.count, self.folder, self.name = count, folder, name
        self.writers: dict[int, pq.ParquetWriter] = {}
        self.alone: list[pl.DataFrame] = []

    def add(self, rows: pl.DataFrame) -> None:
        """Add rows with a column subject_id; every call must have the same columns."""
        if self.count == 1:
            self.alone.append(rows)
            return
        import pyarrow.parquet as pq

        part = pl.col("subject_id").cast(pl.String).hash(seed=0) % self.count
        codes = [name for name, kind in rows.schema.items() if isinstance(kind, pl.Enum)]
        rows = rows.with_columns(pl.col(codes).to_physical(), part=part.cast(pl.Int64))
        for (k,), group in rows.partition_by("part", as_dict=True, include_key=False).items():
            table = group.to_arrow()
            if k not in self.writers:
                self.folder.mkdir(parents=True, exist_ok=True)
                texts = [name for name, kind in group.schema.items() if kind == pl.String]
                self.writers[k] = pq.ParquetWriter(
                    self.file(k), table.schema, compression="lz4", use_dictionary=texts, write_statistics=False
                )  # a quarter less CPU time than the defaults, for files that are read once
            self.writers[k].write_table(table)

    def close(self, schema: pl.Schema) -> list[pl.LazyFrame]:
        """Return all batches, including empty ones, with the types of `schema`."""
        nothing = pl.DataFrame(schema=schema)
        if self.count == 1:
            return [pl.concat([nothing, *self.alone]).lazy()]
        for writer in self.writers.values():
            writer.close()
        codes = [pl.col(name).cat.to(kind) for name, kind in schema.items() if isinstance(kind, pl.Enum)]
        return [
            pl.scan_parquet(self.file(k)).with_columns(codes) if k in self.writers else nothing.lazy()
            for k in range(self.count)
        ]

    def file(self, k: int) -> Path:
        return self.folder / f"{self.name}-{k:03d}.parquet"


def piece_count(*files: Path) -> int:
    """Return the number of batches for these tables, by the size that they have as text."""
    return max(1, -(-sum(map(_text_bytes, files)) // PIECE))


def _text_bytes(file: Path) -> int:
    """About how many bytes a table has as text. Parquet takes a tenth of them, or a hundredth where values repeat."""
    if file.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(file).num_rows) * ROW
        except (pa.ArrowException, OSError) as error:
            raise _damaged_parquet(file, error) from error
    return file.stat().st_size * (10 if file.suffix.lower() == ".gz" else 1)
