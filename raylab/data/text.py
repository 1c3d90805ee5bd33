"""Reads text of other programs: encodings, separators, decimal commas. Only unambiguous forms are read."""

import codecs
from pathlib import Path

import polars as pl

from raylab.data.identifiers import is_missing, trimmed
from raylab.errors import DataError

SEPARATORS = (",", ";", "\t")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(data: bytes, place: str) -> tuple[str, int]:
    """`data` as text without a byte order mark, and how many of its lines are not UTF-8 and were read as Windows-1252
    (Latin-1 with printable quotes and dashes).

    Raises DataError for UTF-16 and for a byte that Windows-1252 does not have; `place` names the file.
    """
    if data.startswith(UTF16):
        raise DataError(f"{place} is UTF-16 text", do="save it as UTF-8")
    if b"\0" in data:
        raise DataError(f"{place} is not text: it contains zero bytes", do="save it as UTF-8 text")
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.isascii():
        return data.decode("ascii"), 0
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        lines, other = [], 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                lines.append(line.decode())
            except UnicodeDecodeError:
                try:
                    lines.append(line.decode("cp1252"))
                except UnicodeDecodeError as error:
                    wrong = f"byte 0x{line[error.start]:02x} in line {number}"
                    raise DataError(
                        f"{place} is neither UTF-8 nor Windows-1252 text: {wrong}", do="save it as UTF-8"
                    ) from error
                other += 1
        return "".join(lines), other


def utf8(data: bytes, place: str) -> tuple[bytes, int]:
    """`decode`, with the text as UTF-8; most tables are ASCII and stay as they are."""
    if data.isascii() and b"\0" not in data:
        return data, 0
    text, other = decode(data, place)
    return text.encode(), other


def read_text(path: Path) -> tuple[str, int]:
    """`decode` of a file. Raises DataError if it cannot be opened."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}", error.strerror or "", "check the path") from error


def not_utf8(place: str, lines: int) -> str:
    return f"lines of {place} that are not UTF-8, read as Windows-1252: {lines:,}"


def separator(header: str) -> str:
    """The separator of a header: comma, semicolon or tab, whichever is most frequent."""
    return max(SEPARATORS, key=header.count)


def as_number(name: str, kind: pl.DataType, comma_is_decimal: bool = False) -> pl.Expr:
    """The column `name` as Float64; null where it is empty or ambiguous.

    `36,6` is 36.6 and `1.234,5` is 1234.5. `1,234` is ambiguous, and is read as 1.234 only with
    `comma_is_decimal`, in tables with another separator.
    """
    column = pl.col(name)
    if kind.is_numeric():
        return column.cast(pl.Float64).fill_nan(None)
    if kind == pl.Boolean or not (kind == pl.String or kind in (pl.Categorical, pl.Binary)):
        return column.cast(pl.Float64, strict=False)
    text = trimmed(column)
    comma = text.str.contains(r"^[+-]?\d+,\d+$")
    either = text.str.contains(r"^[+-]?[1-9]\d{0,2},\d{3}$")
    if comma_is_decimal:
        either = pl.lit(False)
    plain = (
        pl.when(comma & ~either)
        .then(text.str.replace(",", ".", literal=True))
        .when(text.str.contains(r"^[+-]?\d{1,3}(?:\.\d{3})+,\d+$"))
        .then(text.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True))
        .when(text.str.contains(r"^[+-]?\d{1,3}(?:,\d{3})+\.\d+$"))
        .then(text.str.replace_all(",", "", literal=True))
        .otherwise(text)
    )
    number = plain.cast(pl.Float64, strict=False).fill_nan(None)
    return pl.when(~is_missing(name, kind)).then(number).alias(name)


def usual_number(name: str) -> pl.Expr:
    """Text such as `36.6` as `as_number` reads it, in a fraction of its time; null or NaN of any other."""
    return pl.col(name).cast(pl.Float64, strict=False)


DATE_FORMS = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ZONE = r"(?:\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?)\s*(Z|z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)$"


def as_date(name: str, kind: pl.DataType) -> pl.Expr:
    """The column `name` as Datetime("us"), in UTC where it has a zone; null where it is not a date.

    `2150-01-01 10:00:00`, `2150-01-01T10:00`, `2150/01/01`, `2150-01-01T10:00:00.5Z` and `...+01:00` are dates.
    `01/02/2150` is not: it may be January or February.
    """
    column = pl.col(name)
    if isinstance(kind, pl.Datetime):
        return (column.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if kind.time_zone else column).cast(
            pl.Datetime("us")
        )
    if kind == pl.Date:
        return column.cast(pl.Datetime("us"))
    if not (kind == pl.String or kind in (pl.Categorical, pl.Binary)):
        return pl.lit(None, pl.Datetime("us")).alias(name)
    text = trimmed(column)
    zone = text.str.extract(_ZONE, 1)
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    hours, minutes = (
        zone.str.extract(pattern, 1).cast(pl.Int64, strict=False).fill_null(0)
        for pattern in (r"^[+-](\d{2})", r"^[+-]\d{2}:?(\d{2})$")
    )
    local = (
        pl.when(zone.is_null()).then(text).otherwise(text.str.replace(r"\s*(?:Z|z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)$", ""))
    )
    local = local.str.replace(r"^(\d{4})/(\d{2})/(\d{2})", "${1}-${2}-${3}").str.replace(
        r"^(\d{4}-\d{2}-\d{2})[Tt]", "${1} "
    )
    moment = pl.coalesce(local.str.to_datetime(form, strict=False, time_unit="us") for form in DATE_FORMS)
    return (moment - pl.duration(minutes=sign * (60 * hours + minutes))).alias(name)


def usual_date(name: str) -> pl.Expr:
    """Text of the form `2150-01-01 10:00:00` as `as_date` reads it, in a fraction of its time; null of any other."""
    return pl.col(name).str.to_datetime(DATE_FORMS[0], strict=False, time_unit="us")


def has_zone(name: str, kind: pl.DataType) -> pl.Expr:
    """Whether the times of column `name` have a zone, Boolean; null where there is no time of day."""
    column = pl.col(name)
    if isinstance(kind, pl.Datetime):
        return pl.when(column.is_not_null()).then(pl.lit(kind.time_zone is not None))
    if not (kind == pl.String or kind in (pl.Categorical, pl.Binary)):
        return pl.lit(None, pl.Boolean)
    text = trimmed(column)
    return pl.when(text.str.contains(r"\d:\d{2}")).then(text.str.contains(_ZONE))
