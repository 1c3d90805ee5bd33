"""PhysioNet/Computing in Cardiology Challenge 2012: one text file per stay, `Time,Parameter,Value`, 48 h.

A directory has `set-a.tar.gz` (read in memory, never unpacked to disk) or `set-a/`, with `Outcomes-a.txt`; it may have
several sets, which share one numbering of patients. A patient has one stay. Descriptors are at 00:00; -1 means missing.
Silva et al., Computing in Cardiology 2012;39:245.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from raylab.data.archives import read_tar
from raylab.data.icu.concepts import EVENTS, SourceData, by_id, whole_stays
from raylab.data.icu.demographics import age, count_unread, sex
from raylab.data.icu.sources.schema import Column
from raylab.data.icu.sources.tables import Conversions, Findings, find
from raylab.data.identifiers import form, identifier
from raylab.data.text import as_number, decode, read_text, separator
from raylab.errors import DataError

HEADER = "Time,Parameter,Value"
MISSING_AS_MINUS_1 = ("age", "gender", "height", "icutype", "weight")


def read(path: Path) -> SourceData:
    sets = find_sets(path)
    frames, stays = [], []
    conversions = Conversions()
    for name, place in sets.items():
        died = read_outcomes(path, name.removeprefix("set-"), conversions)
        rows, ids = parse(place, conversions)
        unknown = conversions.match(pl.Series(ids, dtype=pl.String), died["stay_id"], name, f"Outcomes-{name[4:]}.txt")
        conversions.note("stays of {} without a row in its outcomes", unknown, name)
        frames.append(rows)
        stays.append(pl.DataFrame({"stay_id": ids}).with_columns(source=pl.lit(name)).join(died, "stay_id", "left"))
    stay = whole_stays(pl.concat(stays, how="diagonal").with_columns(subject_id=pl.col("stay_id")))
    if stay["stay_id"].is_duplicated().any():
        raise DataError(
            f"{path}: the same record is in two sets ({', '.join(sets)})", "a patient has one stay", "keep one copy"
        )
    rows = pl.concat(frames)
    names = {name.lower(): concept for name, concept in by_id("physionet2012").items()}
    rows = rows.with_columns(pl.col("parameter").str.to_lowercase())
    known = rows.filter(pl.col("parameter").is_in([*names, "recordid"]))
    events = known.filter(
        (pl.col("parameter") != "recordid") & ~(pl.col("parameter").is_in(MISSING_AS_MINUS_1) & (pl.col("value") == -1))
    ).with_columns(concept=pl.col("parameter").replace_strict(names, return_dtype=pl.String))
    # the weight at 00:00 is both the admission weight and the first value of the series
    admission = events.filter((pl.col("concept") == "weight") & (pl.col("time") == 0))
    events = pl.concat([events, admission.with_columns(concept=pl.lit("weight_admission"))])
    events = events.with_columns(subject_id=pl.col("stay_id")).select(EVENTS.names())
    return SourceData(
        events.lazy(),
        stay,
        {"unknown parameter": rows.height - known.height},
        notes=conversions.close(),
        numbering="physionet2012",
    )


OUTCOMES = {  # optional: survival (days from admission to death) and length_of_stay (days)
    "recordid": Column(pl.String(), nullable=False, identifier="number", unique=True),
    "hospital_death": Column(pl.Int64(), nullable=False, is_in=(0, 1)),
}


def find_sets(path: Path) -> dict[str, Path]:
    """Return {name of a set: its tar file or directory}."""
    if not path.is_dir():
        raise DataError(f"no directory at {path}", do="give --path the directory that holds set-a.tar.gz")
    sets: dict[str, Path] = {}
    for place in sorted(path.iterdir()):
        name = place.name.lower()
        if name.startswith("set-") and (place.is_dir() or name.endswith((".tar", ".tar.gz"))):
            sets.setdefault(name.split(".")[0], place)
    if not sets:
        raise DataError(
            f"{path} holds no PhysioNet 2012 data",
            "expected set-*.tar.gz or set-*/ with one text file per patient, and Outcomes-*.txt",
            "download a set from physionet.org/content/challenge-2012 and give --path its directory",
        )
    return sets


def read_outcomes(path: Path, letter: str, conversions: Conversions) -> pl.DataFrame:
    """Return stay_id, died (in hospital), end_h and end from Outcomes-`letter`.txt; the end is that of the hospital
    stay, in whole days."""
    file = find(path, f"outcomes-{letter}", (".txt",))
    if file is None:
        raise DataError(
            f"{path / f'Outcomes-{letter}.txt'} is missing",
            "it contains the in-hospital deaths",
            "download it to the directory of its set",
        )
    try:
        text, other = read_text(file)
        mark = separator(text.partition("\n")[0])
        table = pl.read_csv(text.encode(), infer_schema=False, separator=mark)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{file} is not an outcome table", str(error).splitlines()[0], "download it again") from error
    lower = {name: name.strip().lower().replace("in-hospital_", "hospital_") for name in table.columns}
    table = table.rename(lower).filter(~pl.all_horizontal(pl.all().is_null()))
    if missing := [name for name in OUTCOMES if name not in table.columns]:
        shown = ", ".join(missing).replace("hospital_", "In-hospital_").replace("recordid", "RecordID")
        raise DataError(f"{file} is not an outcome table", f"no column {shown}", "download it again")
    findings = Findings(file, conversions)
    findings.not_utf8 = other
    checked = findings.check(table, OUTCOMES, pl.int_range(2, table.height + 2, eager=True))
    findings.close()

    for name in ("survival", "length_of_stay"):
        if name not in checked.columns:
            checked = checked.with_columns(pl.lit(None, pl.String).alias(name))
        read = checked.select(name, read=as_number(name, pl.String(), comma_is_decimal=mark != ","))
        conversions.note("stays of {} with an unreadable {}", count_unread(read, name, "read"), file.name, name)
        checked = checked.with_columns(read["read"].alias(name))

    def days(name: str) -> pl.Expr:
        return pl.when(pl.col(name) > 0).then(pl.col(name) * 24)

    died = pl.col("hospital_death") == 1
    end_h = pl.when(died).then(pl.coalesce(days("survival"), days("length_of_stay"))).otherwise(days("length_of_stay"))
    return checked.select(
        stay_id="recordid",
        died=died,
        end_h=end_h,
        end=pl.when(end_h.is_not_null()).then(pl.when(died).then(pl.lit("death")).otherwise(pl.lit("discharge"))),
    )


def members(place: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, bytes) of every patient in a tar file or a directory."""
    if place.is_dir():
        for file in sorted(place.glob("*.txt")):
            yield file.name, file.read_bytes()
        return
    yield from read_tar(place, ".txt")


def parse(place: Path, conversions: Conversions) -> tuple[pl.DataFrame, list[str]]:
    """Return stay_id, time (h), parameter and value of every row of a set, and all its stays, even those without
    rows."""
    not_text = 0
    files: list[str] = []
    counts: list[int] = []
    lines: list[str] = []
    for name, data in members(place):
        text, other = decode(data, f"{place}: {name}")
        not_text += other
        head, *body = text.splitlines() or [HEADER]
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
    names = pl.DataFrame({"id": [name.removesuffix(".txt") for name in files]})
    stay_ids = names.select(identifier("id", pl.String(), numeric=True))["id"]
    if stay_ids.null_count():
        raise DataError(
            f"{place}: {stay_ids.null_count()} files are not named by a record number",
            f"they are {form(names['id'].filter(stay_ids.is_null()))}",
            "keep only the patients' files, RecordID.txt",
        )
    of_file = pl.int_range(len(files), eager=True).repeat_by(pl.Series(counts)).explode().drop_nulls()
    rows = pl.DataFrame({"file": of_file, "line": pl.Series(lines, dtype=pl.String)})
    table = rows.select(
        stay_id=pl.lit(stay_ids).gather(pl.col("file")),
        # "-00:30" must stay negative
        time=pl.when(clock[2].is_null() & minute.is_between(0, 59))
        .then((hour.abs() + minute / 60) * pl.when(part[0].str.starts_with("-")).then(-1).otherwise(1))
        .cast(pl.Float64),
        parameter=part[1].str.strip_chars(),
        text=pl.when(part[3].is_null()).then(part[2].str.strip_chars()),
    )
    what = pl.col("parameter").str.to_lowercase()
    number = pl.col("text").cast(pl.Float64, strict=False)
    table = table.with_columns(value=number, unread=pl.lit(False))
    places = table.select(pl.arg_where(what.is_in(["age", "gender"]) & pl.col("text").is_not_null())).to_series()
    described = table[places].with_columns(
        value=pl.when(number == -1)
        .then(number)
        .when(what == "age")
        .then(age("text", pl.String()))
        .otherwise(sex("text"))
    )
    unread = described["value"].is_null()
    table = table.with_columns(
        table["value"].scatter(places, described["value"]), table["unread"].scatter(places, unread)
    )
    for name, lost in described.filter(unread).group_by(what).len().sort("parameter").iter_rows():
        conversions.note("stays of {} with an unreadable {}, set missing", lost, place.name, name)
    conversions.note("lines of {} that are not UTF-8, read as Windows-1252", not_text, place.name)
    blank = rows["line"].str.strip_chars() == ""
    empty = table["time"].is_null() | table["parameter"].is_null() | (table["value"].is_null() & ~table["unread"])
    wrong = empty & ~blank
    at = wrong.arg_max() if wrong.any() else None
    if at is not None:
        file = rows["file"][at]
        line = at - sum(counts[:file]) + 2  # lines count from 1, and the first is the header
        raise DataError(
            f"{place}: {files[file]}, line {line} is not '{HEADER}' with a time hh:mm and a number",
            f"{wrong.sum()} malformed rows in this set",
            "replace this file by the published one",
        )
    of_another = table.filter(what == "recordid", pl.col("value") != pl.col("stay_id").cast(pl.Float64)).height
    if of_another:
        raise DataError(
            f"{place}: in {of_another} files RecordID is another number than in the file's name",
            "the patient is ambiguous",
            "replace these files by the published ones",
        )
    return table.filter(~blank & ~pl.col("unread")).drop("text", "unread"), stay_ids.to_list()
