"""PhysioNet/Computing in Cardiology Challenge 2012: one text file a stay, `Time,Parameter,Value`, 48 h.

A directory holds `set-a.tar.gz` (read in memory, never unpacked to disk) or `set-a/`, with `Outcomes-a.txt`;
several sets may lie side by side. A patient has one stay. Descriptors stand at 00:00; -1 means that one is missing.
Silva et al., Computing in Cardiology 2012;39:245.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from raylab.data.concepts import EVENTS, STAYS, Extract, by_id
from raylab.errors import DataError

HEADER = "Time,Parameter,Value"
MISSING_AS_MINUS_1 = ("Age", "Gender", "Height", "ICUType", "Weight")


def read(path: Path) -> Extract:
    sets = find_sets(path)
    frames, stays = [], []
    for name, place in sets.items():
        died = read_outcomes(path / f"Outcomes-{name.removeprefix('set-')}.txt")
        rows, ids = parse(place)
        frames.append(rows)
        stays.append(pl.DataFrame({"stay_id": ids}).with_columns(source=pl.lit(name)).join(died, "stay_id", "left"))
    stay = pl.concat(stays).with_columns(subject_id=pl.col("stay_id")).select(STAYS.names()).cast(STAYS)
    if stay["stay_id"].is_duplicated().any():
        raise DataError(
            f"{path}: the same record is in two sets ({', '.join(sets)})", "a patient has one stay", "keep one copy"
        )
    rows = pl.concat(frames)
    names = by_id("physionet2012")
    known = rows.filter(pl.col("parameter").is_in([*names, "RecordID"]))
    events = known.filter(
        (pl.col("parameter") != "RecordID") & ~(pl.col("parameter").is_in(MISSING_AS_MINUS_1) & (pl.col("value") == -1))
    ).with_columns(concept=pl.col("parameter").replace_strict(names, return_dtype=pl.String))
    # the descriptor at 00:00 is both the admission weight and the first of the series
    admission = events.filter((pl.col("concept") == "weight") & (pl.col("time") == 0))
    events = pl.concat([events, admission.with_columns(concept=pl.lit("weight_admission"))])
    events = events.with_columns(subject_id=pl.col("stay_id")).select(EVENTS.names())
    return Extract(events.lazy(), stay, {"unknown parameter": rows.height - known.height})


def find_sets(path: Path) -> dict[str, Path]:
    """Set name -> its tar or directory."""
    if not path.is_dir():
        raise DataError(f"no directory at {path}", do="give --path the directory that holds set-a.tar.gz")
    sets: dict[str, Path] = {}
    for place in sorted(path.glob("set-*")):
        if place.is_dir() or place.name.endswith((".tar", ".tar.gz")):
            sets.setdefault(place.name.split(".")[0], place)
    if not sets:
        raise DataError(
            f"{path} holds no PhysioNet 2012 data",
            "expected set-*.tar.gz or set-*/ with one text file a patient, and Outcomes-*.txt",
            "download a set from physionet.org/content/challenge-2012 and give --path its directory",
        )
    return sets


def read_outcomes(file: Path) -> pl.DataFrame:
    """stay_id, died (in hospital)."""
    if not file.is_file():
        raise DataError(
            f"{file} is missing", "in-hospital deaths are counted from it", "download it beside the set it belongs to"
        )
    try:
        table = pl.read_csv(file, columns=["RecordID", "In-hospital_death"])
        return table.select(
            stay_id=pl.col("RecordID").cast(pl.String), died=pl.col("In-hospital_death").cast(pl.Int8).cast(pl.Boolean)
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{file} is not an outcome table", str(error).splitlines()[0], "download it again") from error


def members(place: Path) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of every patient in a tar or a directory."""
    if place.is_dir():
        for file in sorted(place.glob("*.txt")):
            yield file.name, file.read_bytes()
        return
    try:
        with gzip.open(place) if place.suffix == ".gz" else place.open("rb") as archive:
            data = archive.read()  # some 40 MB a set; tarfile alone would take a cut-off archive for a short one
        if data[-1024:].strip(b"\0"):
            raise tarfile.ReadError("no end-of-archive mark")
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                name = Path(member.name).name
                stream = tar.extractfile(member) if name.endswith(".txt") and not name.startswith(".") else None
                if stream is not None:
                    yield name, stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{place} is damaged or truncated", str(error), "download it again") from error


def parse(place: Path) -> tuple[pl.DataFrame, list[str]]:
    """stay_id, time (h), parameter, value of every row of one set, and all its stays (also those without a row)."""
    files: list[str] = []
    counts: list[int] = []
    lines: list[str] = []
    for name, data in members(place):
        head, *body = data.decode("utf-8", errors="replace").splitlines() or [HEADER]
        if head.strip() != HEADER:
            raise DataError(f"{place}: {name}, line 1 is not '{HEADER}'", do="replace this file by the published one")
        files.append(name)
        counts.append(len(body))
        lines += body
    if not files:
        raise DataError(f"{place} holds no patient files (*.txt)", do="download it again")
    part = pl.col("line").str.split_exact(",", 3).struct
    clock = part[0].str.strip_chars().str.split_exact(":", 2).struct
    hour, minute = clock[0].cast(pl.Int32, strict=False), clock[1].cast(pl.Int32, strict=False)
    stay_ids = [name.removesuffix(".txt") for name in files]
    rows = pl.DataFrame({"file": np.repeat(np.arange(len(files)), counts), "line": pl.Series(lines, dtype=pl.String)})
    table = rows.select(
        stay_id=pl.lit(pl.Series(stay_ids)).gather(pl.col("file")),
        # "-00:30" must stay negative
        time=pl.when(clock[2].is_null() & minute.is_between(0, 59))
        .then((hour.abs() + minute / 60) * pl.when(part[0].str.starts_with("-")).then(-1).otherwise(1))
        .cast(pl.Float64),
        parameter=part[1].str.strip_chars(),
        value=pl.when(part[3].is_null()).then(part[2].str.strip_chars().cast(pl.Float64, strict=False)),
    )
    blank = rows["line"].str.strip_chars() == ""
    wrong = (table["time"].is_null() | table["parameter"].is_null() | table["value"].is_null()) & ~blank
    at = wrong.arg_max() if wrong.any() else None
    if at is not None:
        file = rows["file"][at]
        number = at - sum(counts[:file]) + 2  # counted from 1, after the header
        raise DataError(
            f"{place}: {files[file]}, line {number} is not '{HEADER}' with a time hh:mm and a number",
            f"{wrong.sum()} malformed rows in this set",
            "replace this file by the published one",
        )
    return table.filter(~blank), stay_ids
