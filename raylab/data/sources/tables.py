"""Raw tables as they lie in a directory: found whatever the letter case, read in bounded portions, checked by schema.

A schema is a dataframely class whose columns carry the names in lower case. What does not hold is collected over the
whole table and refused once, by table, column and number of rows.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import dataframely as dy
import polars as pl
import pyarrow.parquet as pq

from raylab.errors import DataError

CHUNK = 32 << 20  # bytes of text parsed at a time
PIECE = 256 << 20  # bytes of text whose patients make up one piece
ENDINGS = (".csv", ".csv.gz", ".parquet")
NAMES = {pl.Datetime: "a date", pl.Float64: "a number", pl.Int64: "a whole number"}


def find(path: Path, name: str, endings: Sequence[str] = ENDINGS) -> Path | None:
    """The file `name` with one of `endings` in directory `path`, whatever the letter case; None where there is none.

    Raises DataError when there are several (a table beside its compressed copy): which one counts is not ours to say.
    """
    wanted = {name.lower() + ending for ending in endings}
    found = sorted(file for file in path.iterdir() if file.name.lower() in wanted) if path.is_dir() else []
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{path} holds the table {name} more than once", names, "keep one of them")
    return found[0] if found else None


def needed(path: Path, name: str, what: str, endings: Sequence[str] = ENDINGS) -> Path:
    file = find(path, name, endings)
    if file is None:
        raise DataError(
            f"{path} has no table {name} ({' or '.join(endings)})", f"it is part of {what}", f"give --path {what}"
        )
    return file


class Findings:
    """What is wrong with a table, counted over all its portions."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, 0
        self.wrong: Counter[str] = Counter()

    def check(self, rows: pl.DataFrame, schema: type[dy.Schema]) -> pl.DataFrame:
        """`rows` (text, or of the right type already) as the schema's types; what does not hold is counted."""
        self.rows += rows.height
        typed = rows.with_columns(as_type(name, column.dtype) for name, column in schema.columns().items())
        for name, column in schema.columns().items():
            lost = typed[name].null_count() - rows[name].null_count()
            if lost:
                self.wrong[f"{name} is not {NAMES.get(type(column.dtype), column.dtype)}"] += lost
        for rule, n in schema.filter(typed.select(schema.column_names())).failure.counts().items():
            name, _, kind = rule.partition("|")
            lost = typed[name].null_count() - rows[name].null_count() if kind == "nullability" else 0
            if n > lost:
                self.wrong[f"{name} is empty" if kind == "nullability" else f"{rule.replace('|', ': ')}"] += n - lost
        return typed

    def close(self) -> None:
        """DataError when any portion did not hold."""
        if self.wrong:
            shown = "; ".join(f"column {what} in {n:,} of {self.rows:,} rows" for what, n in self.wrong.most_common())
            raise DataError(f"{self.file}: {shown}", do="correct these rows, or copy the table again")


def as_type(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column of text as `dtype`; null where that is not possible. `2150-01-01 10:00:00` and `2150-01-01T10:00` are
    dates."""
    column = pl.col(name)
    if not isinstance(dtype, pl.Datetime):
        return column.cast(dtype, strict=False)
    text = column.cast(pl.String).str.replace("T", " ", literal=True)
    forms = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
    return pl.coalesce(text.str.to_datetime(form, strict=False, time_unit="us") for form in forms).alias(name)


def rows_of(file: Path, schema: type[dy.Schema], table: str) -> Iterator[pl.DataFrame]:
    """The table's columns of `schema` in portions, names in lower case, all text where the file is text.

    Raises DataError when a column is missing or the file is damaged.
    """
    if file.suffix.lower() == ".parquet":
        yield from _parquet(file, schema, table)
        return
    with _opened(file) as stream:
        try:
            header = stream.readline()
            names = [name.strip().strip('"') for name in header.decode("utf-8-sig").strip().split(",")]
            columns = _columns(file, names, schema, table)
            clean = ",".join(names).encode() + b"\n"
            for body in _portions(stream):
                part = pl.read_csv(clean + body, columns=list(columns), infer_schema=False)
                yield part.rename(columns)
        except (EOFError, zlib.error, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is damaged or truncated", str(error), "copy it again") from error
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{file} is not a table of commas", str(error).splitlines()[0], "copy it again") from error


def whole(path: Path, table: str, schema: type[dy.Schema], what: str) -> pl.DataFrame:
    """A small table as a whole, checked, with exact duplicates gone."""
    file = needed(path, table, what)
    findings = Findings(file)
    parts = [findings.check(part, schema) for part in rows_of(file, schema, table)]
    findings.close()
    return pl.concat([schema.create_empty(), *parts]).unique(maintain_order=True)


def _opened(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _portions(stream: BinaryIO) -> Iterator[bytes]:
    """Whole lines, about CHUNK bytes at a time; a line break within quotes ends no line."""
    rest = b""
    while block := stream.read(CHUNK):
        data = rest + block
        end = data.rfind(b"\n")
        while end >= 0 and data.count(b'"', 0, end) % 2:
            end = data.rfind(b"\n", 0, end)
        rest = data[end + 1 :]
        if end >= 0:
            yield data[: end + 1]
    if rest.strip():
        yield rest


def _columns(file: Path, names: Sequence[str], schema: type[dy.Schema], table: str) -> dict[str, str]:
    """Name in the file -> name in the schema."""
    by_lower = {name.lower(): name for name in names}
    missing = [name for name in schema.column_names() if name not in by_lower]
    if missing:
        raise DataError(
            f"{file} is not the table {table}: no column {', '.join(missing)}",
            f"its columns: {', '.join(names[:20])}",
            "give --path the tables as they were published",
        )
    return {by_lower[name]: name for name in schema.column_names()}


def _parquet(file: Path, schema: type[dy.Schema], table: str) -> Iterator[pl.DataFrame]:
    try:
        columns = _columns(file, list(pl.read_parquet_schema(file)), schema, table)
        for batch in pq.ParquetFile(file).iter_batches(batch_size=500_000, columns=list(columns)):
            part = pl.from_arrow(batch)
            assert isinstance(part, pl.DataFrame)
            yield part.rename(columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file} is damaged or not parquet", str(error).splitlines()[0], "copy it again") from error


class Pieces:
    """Rows of many patients, written to disk by patient, so that one piece with all of its patients fits in memory."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{name}-{k:03d}.parquet" for k in range(count)]
        self.writers: dict[int, pq.ParquetWriter] = {}

    def add(self, rows: pl.DataFrame) -> None:
        """Rows with a column subject_id; every call with the same columns."""
        part = pl.col("subject_id").cast(pl.String).hash(seed=0) % len(self.files)
        for (k,), group in rows.with_columns(part=part.cast(pl.Int64)).partition_by("part", as_dict=True).items():
            table = group.drop("part").to_arrow()
            if k not in self.writers:
                self.writers[k] = pq.ParquetWriter(self.files[k], table.schema)
            self.writers[k].write_table(table)

    def close(self, schema: pl.Schema) -> list[Path]:
        """The files, one a piece; a piece without rows is there too."""
        for writer in self.writers.values():
            writer.close()
        for k, file in enumerate(self.files):
            if k not in self.writers:
                pl.DataFrame(schema=schema).write_parquet(file)
        return self.files


def piece_count(*files: Path) -> int:
    """How many pieces to cut tables into: by their bytes, of which compression keeps about a tenth."""
    size = sum(file.stat().st_size * (10 if file.suffix.lower() == ".gz" else 1) for file in files)
    return max(1, -(-size // PIECE))
