"""MEDS (Medical Event Data Standard) parquet event streams: subject_id, time, code, numeric_value.

A mapping file defines the meaning of codes; `meds_NAME.toml` are those of public extractors, the default is MIMIC-IV's.
A stay lasts from its admission code to the patient's next discharge code; only records within it become events.
Ventilation is an episode: an event at its start, every hour after it and at its end, as PhysioNet 2012 charts it. Where
none are recorded, it is marked by codes and by settings of the ventilator. Files are read in portions and written by
patient, so that MIMIC-IV does not have to fit in memory.
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylab.data.icu.concepts import (
    CONCEPTS,
    EVENTS,
    ID_SOURCES,
    STATIC,
    UNIT,
    SourceData,
    by_id,
    read_quantities,
    stated_unit,
    whole_stays,
)
from raylab.data.icu.demographics import age, sex
from raylab.data.icu.sources.episodes import chart_episodes
from raylab.data.icu.sources.schema import DATE, NUMBER, TEXT, Column
from raylab.data.icu.sources.tables import PIECE, Conversions, Findings, Pieces, rows_of
from raylab.documents import describe_problems
from raylab.errors import DataError, UsageError, escape_unprintable

MAPPINGS = {name: Path(__file__).with_name(f"meds_{name}.toml") for name in ("mimic4", "eicu", "hirid", "omop")}
"""The mappings that ship with raylab, by their names in `--mapping`."""
SHIPPED = MAPPINGS["mimic4"]
PARTS = ("begin", "end", "left", "died", "death", "birth")


EVENT_COLUMNS = {  # `names` are those of older MEDS schemas and of similar formats
    "subject_id": Column(pl.String(), nullable=False, identifier="text", names=("patient_id",)),
    "time": replace(DATE, names=("timestamp",)),  # null for static values such as sex
    "code": TEXT,
    "numeric_value": replace(NUMBER, names=("value",)),
    "text_value": replace(TEXT, is_optional=True),
}
LONG_CODE = 120  # characters of a code in a message
UNIT_COLUMN = {"unit": replace(TEXT, is_optional=True)}  # only where a mapping has `units`


@dataclass(frozen=True)
class Mapping:
    """A validated mapping of codes."""

    source: str
    dates: str
    ids: str | None
    kinds: tuple[str, ...]
    concepts: dict[str, str]  # prefix of a code -> concept
    units: dict[str, str | None]  # prefix of a code -> unit in which it is recorded
    stay: dict[str, tuple[str, ...]]
    sex: dict[str, float]
    icu_type: dict[str, float]
    episodes: dict[str, list[str]]
    sums: dict[str, list[str]]
    ventilation: "Ventilation"
    units_of_rows: dict[str, str]  # text of the column `unit` -> unit

    def makes(self) -> set[str]:
        """Return the concepts that events can have."""
        ventilation = VENTILATION if self.ventilation.is_used() else ()
        ids = by_id(self.ids).values() if self.ids else ()
        return {*self.concepts.values(), *ids, *self.episodes, *self.sums, *ventilation}


VENTILATION = ("mech_vent", "niv")


class Ventilation(BaseModel):
    """What marks ventilation at a time where no episodes are recorded: codes, and concepts with a value above 0."""

    model_config = ConfigDict(extra="forbid")

    mech_vent: tuple[str, ...] = ()
    niv: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def is_used(self) -> bool:
        return bool(self.mech_vent or self.niv or self.settings)


class MappingFile(BaseModel):
    """The TOML file of a mapping; see meds_mimic4.toml."""

    model_config = ConfigDict(extra="forbid")

    source: str
    dates: Literal["shifted", "real"] = "shifted"
    ids: str | None = None
    kinds: tuple[str, ...] = ()
    concepts: dict[str, list[str]] = Field({})
    stay: dict[str, str | tuple[str, ...]]
    sex: dict[str, float] = Field({})
    icu_type: dict[str, float] = Field({})
    episodes: dict[str, tuple[str, str]] = Field({})
    sums: dict[str, list[str]] = Field({})
    ventilation: Ventilation = Ventilation()
    units: dict[str, str] = Field({})


def read_mapping(file: Path) -> Mapping:
    """Read the mapping in a TOML file, or the shipped one of that name; UsageError if it cannot be read or names an
    unknown concept."""
    do = f"compare it with {SHIPPED.name}"
    if not file.exists() and file.name in MAPPINGS:
        file = MAPPINGS[file.name]
    if not file.exists():
        raise UsageError(f"no mapping of MEDS codes at {file}", do=f"give a TOML file, or one of {', '.join(MAPPINGS)}")
    try:
        document = MappingFile.model_validate(tomllib.loads(file.read_text(encoding="utf-8-sig")))
    except ValidationError as error:
        what = describe_problems(error)
        raise UsageError(f"{file} is not a valid mapping of MEDS codes: {what}", do=do) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} is not a mapping of MEDS codes", str(error), f"write one like {SHIPPED.name}"
        ) from error
    concepts: dict[str, str] = {}
    units: dict[str, str | None] = {}
    for name, codes in document.concepts.items():
        for text in codes:
            code, _, unit = text.partition("=")
            if concepts.setdefault(code, name) != name:
                what = f"'{code}' is {concepts[code]} and {name}"
                raise UsageError(f"{file} is not a valid mapping of MEDS codes: {what}", do="give a code one concept")
            units[code] = unit or None
    named = {*concepts.values(), *document.episodes, *document.sums, *document.ventilation.settings}
    wrong = [name for name in named if name not in CONCEPTS] + [f"stay.{k}" for k in document.stay if k not in PARTS]
    if document.ids is not None and document.ids not in ID_SOURCES:
        wrong.append(f"ids {document.ids!r}")
    if wrong or "begin" not in document.stay:
        what = f"unknown {', '.join(sorted(wrong))}" if wrong else "it needs source and stay.begin"
        raise UsageError(f"{file} is not a valid mapping of MEDS codes: {what}", do=do)
    return Mapping(
        document.source,
        document.dates,
        document.ids,
        document.kinds,
        concepts,
        units,
        {part: (codes,) if isinstance(codes, str) else codes for part, codes in document.stay.items()},
        document.sex,
        document.icu_type,
        {name: list(codes) for name, codes in document.episodes.items()},
        document.sums,
        document.ventilation,
        document.units,
    )


ROWS = pl.Schema(
    {
        "subject_id": pl.String(),
        "time": pl.Datetime("us"),
        "code": pl.String(),
        "concept": pl.String(),
        "value": pl.Float64(),
        "role": pl.String(),
        UNIT: pl.String(),
    }
)


def read(path: Path, work: Path, mapping: Path | None = None) -> SourceData:
    by = read_mapping(mapping or SHIPPED)
    columns = EVENT_COLUMNS | (UNIT_COLUMN if by.units_of_rows else {})
    files = event_files(path)
    pieces = Pieces(work, "meds", max(1, -(-sum(file.stat().st_size for file in files) * 10 // PIECE)))
    codes, conversions = Codes(by), Conversions()
    edges, last, from_text, unused = [], [], 0, 0
    for number, file in enumerate(files):
        findings = Findings(flatten_events(file, work / f"flat-{number:05d}.parquet"), conversions)
        for part, lines in rows_of(findings, columns, "MEDS events"):
            asked = codes.mean_something(part["code"])
            unused += int((~asked).sum())
            rows = findings.check(part, columns, lines, asked=asked)
            last.append(rows.group_by("subject_id").agg(pl.col("time").max()))
            rows = codes.known(rows)
            from_text += int(rows["from_text"].sum())
            rows = rows.drop("from_text")
            about = pl.col("role").is_in([*PARTS, "sex"])
            edges.append(rows.filter(about))
            pieces.add(rows.filter(~about))
        findings.close()
    conversions.note("values read from text_value, such as 50%, where numeric_value is empty", from_text)
    check_codes(codes, path)
    note_codes(codes, unused, conversions)
    ends = pl.concat(last).drop_nulls("subject_id").group_by("subject_id").agg(last=pl.col("time").max())
    stays, cut = find_stays(pl.concat(edges), ends, by, path, conversions)
    first = descriptors(stays).lazy()
    window = stays.lazy().select("subject_id", "stay_id", "start", "stop", "end_h")
    parts, elsewhere = [], 0
    for k, piece in enumerate(pieces.close(ROWS)):
        here = pl.col("subject_id").hash(seed=0) % pieces.count == k
        elsewhere += int(piece.join(window, "subject_id", "anti").select(pl.len()).collect().item())
        parts.append(pl.concat([events_of(piece, window, by), first.filter(here)], how="diagonal"))
    counts = {"stays cut where they overlap": cut, "rows of patients without an ICU stay": elsewhere}
    counts = {what: n for what, n in counts.items() if n}
    notes = conversions.close()
    lacks = tuple(name for name in (*VENTILATION, "peep") if name not in by.makes())
    return SourceData(
        pl.concat(parts), whole_stays(stays), counts, tuple(parts), notes, lacks=lacks, numbering=by.source
    )


def check_codes(codes: "Codes", path: Path) -> None:
    """DataError if no code of the data is that of a concept: it then belongs to another extractor."""
    if not codes.used:
        here = codes.table["code"].unique().sort().head(3).to_list()
        ours = [*codes.by.concepts, *(f"{kind}//{item}" for kind in codes.by.kinds for item in codes.names)][:3]
        raise DataError(
            f"{path}: none of its {codes.table.height:,} codes is a value that the mapping of {codes.by.source} knows",
            f"the mapping knows {quoted(ours)}, ...; the data has {quoted(here)}, ...",
            f"give --mapping {', '.join(MAPPINGS)} or a file of your own",
        )


def note_codes(codes: "Codes", unused: int, conversions: Conversions) -> None:
    """Note the rows whose code the mapping does not name, and the codes of concepts that no row has."""
    unknown = codes.table["role"].null_count()
    conversions.note("rows of {} codes that the mapping does not name, not used", unused, f"{unknown:,}")
    absent = [code for code in codes.by.concepts if code not in codes.used]
    more = ", ..." if len(absent) > 5 else ""
    conversions.note("codes of the mapping that no row has ({})", len(absent), quoted(absent[:5]) + more)


def quoted(codes: Iterable[str]) -> str:
    """Return codes for a message."""
    return ", ".join(f"'{escape_unprintable(code[:LONG_CODE])}'" for code in codes)


def event_files(path: Path) -> list[Path]:
    """Return all event files below `path` (below its `data/`, if it has one), or `path` itself if it is a file.

    Tables in `metadata/` and hidden files (with names that start with `.` or `_`) are excluded.
    """
    if path.is_file():
        return [path]
    root = path / "data" if (path / "data").is_dir() else path
    files = [
        file
        for file in (sorted(root.rglob("*.parquet")) if root.is_dir() else ())
        if not any(part.startswith((".", "_")) or part == "metadata" for part in file.relative_to(root).parts)
    ]
    if not files:
        raise DataError(
            f"{path} holds no MEDS data", "expected data/**/*.parquet", "give --path the root of a MEDS data set"
        )
    return files


def flatten_events(file: Path, out: Path) -> Path:
    """Return `file`, or `out` with the flattened events of a MEDS 0.1 file (one row per patient, nested events)."""
    try:
        kinds = pl.read_parquet_schema(file)
    except (pl.exceptions.PolarsError, OSError):
        return file  # rows_of explains it
    lower = {name.lower(): name for name in kinds}
    if not isinstance(kinds.get(lower.get("events", "")), pl.List):
        return file
    who = lower.get("subject_id") or lower.get("patient_id")
    if who is None:
        raise DataError(f"{file} has nested events, but no column subject_id or patient_id")
    nested = pl.scan_parquet(file)
    events = nested.select(who, lower["events"]).explode(lower["events"]).unnest(lower["events"])
    parts = [events.select(who, "time", "measurements")]
    if static := lower.get("static_measurements"):
        parts.append(nested.select(who, time=pl.lit(None, pl.Datetime("us")), measurements=static))
    rows = [part.explode("measurements").unnest("measurements") for part in parts]
    out.parent.mkdir(parents=True, exist_ok=True)
    flat_rows = (part.select(subject_id=who, time="time", code="code", numeric_value="numeric_value") for part in rows)
    pl.concat(flat_rows, how="vertical_relaxed").sink_parquet(out)
    return out


class Codes:
    """The meaning of codes; every code is looked up once. `used`: the codes of values and episodes, as in the mapping,
    that the data has."""

    def __init__(self, by: Mapping) -> None:
        self.by = by
        self.names = by_id(by.ids) if by.ids else {}
        self.used: set[str] = set()
        self.roles: dict[str, str] = {code: role for role, codes in by.stay.items() for code in codes}
        self.roles |= dict.fromkeys(by.sex, "sex")
        self.sex_kinds = {code.rpartition("//")[0] for code in by.sex} - {""}
        for name, codes in by.episodes.items():
            for code, edge in zip(codes, ("from", "to"), strict=True):
                self.roles[code] = f"{edge} {name}"
        for name, codes in by.sums.items():
            self.roles |= {code: f"part of {name}" for code in codes}
        self.roles |= dict.fromkeys(by.ventilation.mech_vent, "marks mech_vent")
        self.roles |= dict.fromkeys(by.ventilation.niv, "marks niv")
        self.table = pl.DataFrame(
            schema={
                "code": pl.String,
                "concept": pl.String,
                "role": pl.String,
                UNIT: pl.String,
            }
        )

    def mean_something(self, codes: pl.Series) -> pl.Series:
        """Return which of the codes have a meaning."""
        codes = codes.cast(pl.String)
        new = pl.DataFrame({"code": codes.drop_nulls().unique()}).join(self.table, "code", "anti")["code"].to_list()
        if new:
            self.table = self.table.vstack(
                pl.DataFrame([self.meaning(code) for code in new], self.table.schema, orient="row")
            )
        asked = self.table.filter(pl.col("role").is_not_null())["code"]
        return codes.is_in(asked.implode()).fill_null(False)

    def known(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return ROWS of the rows whose code has a meaning, and `from_text`: whether the value is from text_value.

        `mean_something` must have been called with their codes. The value of a concept without a number is NaN."""
        of_concept = pl.col("role") == "value"
        table = self.table.filter(pl.col("role").is_not_null()).rename({UNIT: "of_code"})
        found = rows.rename({"unit": "of_row"}, strict=False).join(table, "code")
        unit = pl.col("of_code")
        if self.by.units_of_rows:
            said = pl.col("of_row").str.strip_chars().str.replace(r"\.0*$", "")
            # an unknown unit must not parse as one, as a bare number would
            of_row = said.replace_strict(self.by.units_of_rows, default=pl.format("concept {}", said))
            unit = pl.when((unit == "") & said.is_not_null()).then(of_row).otherwise(unit)
        found = found.with_columns(unit.alias(UNIT)).with_columns(
            text=pl.when(of_concept & pl.col("numeric_value").is_null()).then("text_value")
        )
        texts = found.select("concept", UNIT, "text").drop_nulls("text").unique()
        found = found.join(read_quantities(texts), ["concept", UNIT, "text"], "left", maintain_order="left")
        value = pl.when(of_concept).then(pl.coalesce("numeric_value", "number").fill_null(float("nan")))
        return found.select(
            "subject_id",
            "time",
            "code",
            "concept",
            value=value.otherwise("numeric_value"),
            role="role",
            unit=pl.coalesce("unit_read", UNIT),
            from_text=pl.col("number").is_not_null(),
        )

    def meaning(self, code: str) -> tuple[str, str | None, str | None, str | None]:
        """Return (code, concept, role, unit); the role is None if the code has no meaning. The longest prefix in the
        mapping decides; the part after it is the unit."""
        for start in beginnings(code):
            if start in self.roles:
                if self.roles[start] not in (*PARTS, "sex"):
                    self.used.add(start)
                return code, None, self.roles[start], None
            if start in self.sex_kinds and len(code) > len(start):
                return code, None, "sex", None
            if start in self.by.concepts:
                self.used.add(start)
                name = self.by.concepts[start]
                return code, name, "value", stated_unit(CONCEPTS[name], self.by.units[start], unit_after(code, start))
            kind, _, item = start.rpartition("//")
            if kind in self.by.kinds and item in self.names and self.by.ids:
                self.used.add(start)
                name = self.names[item]
                of_id = CONCEPTS[name].ids[self.by.ids][item]
                return code, name, "value", stated_unit(CONCEPTS[name], of_id, unit_after(code, start))
        return code, None, None, None


def beginnings(code: str) -> list[str]:
    """Return the code and its beginnings up to a `//` or a `|`, the longest first."""
    cuts = [found.start() for found in re.finditer(r"//|\|", code)]
    return [code, *(code[:cut] for cut in reversed(cuts))]


def unit_after(code: str, start: str) -> str:
    """Return the part of `code` after `start//`; empty if there is none."""
    rest = code.removeprefix(start)
    return rest[2:].partition("//")[0] if rest.startswith("//") else ""


def find_stays(
    edges: pl.DataFrame, ends: pl.DataFrame, by: Mapping, path: Path, conversions: Conversions
) -> tuple[pl.DataFrame, int]:
    """Return one row per ICU admission (STAYS, start and stop (dates), age, sex, icu_type), and the number of stays
    that were truncated because the patient's next stay starts before they end.

    A stay without a discharge ends at the patient's next admission or last event.
    """

    def times(role: str, name: str) -> pl.DataFrame:
        rows = edges.filter((pl.col("role") == role) & pl.col("time").is_not_null())
        return rows.select("subject_id", pl.col("time").alias(name), pl.col("code").alias(f"{name}_code")).sort(name)

    start = times("begin", "start").unique(["subject_id", "start"], keep="first", maintain_order=True).sort("start")
    if start.is_empty():
        raise DataError(
            f"{path} has no ICU stay",
            f"no code {' or '.join(by.stay['begin'])}, with which the mapping of {by.source} begins one",
            f"give a MEDS data set of ICU patients, or another --mapping: {', '.join(MAPPINGS)} or a file of your own",
        )
    forward: dict[str, Any] = {"left_on": "start", "by": "subject_id", "strategy": "forward", "check_sortedness": False}
    left = pl.concat([times("left", "left"), times("died", "left")]).sort("left")
    out = times("end", "out") if "end" in by.stay else left.rename({"left": "out", "left_code": "out_code"})
    if "left" not in by.stay:
        left = out.rename({"out": "left", "out_code": "left_code"})
    born = edges.filter(pl.col("role") == "birth").group_by("subject_id").agg(born=pl.col("time").min())
    sexes = read_sexes(edges.filter(pl.col("role") == "sex"), by)
    death = times("death", "death").group_by("subject_id").agg(pl.col("death").min())
    stays = (
        pair_with_end(start, out)
        .join_asof(left, right_on="left", **forward)
        .join(ends, "subject_id", "left")
        .join(death, "subject_id", "left")
        .join(born, "subject_id", "left")
        .join(sexes, "subject_id", "left")
        .sort("subject_id", "start")
        .with_columns(next=pl.col("start").shift(-1).over("subject_id"))
    )  # fmt: skip
    unread = stays.filter(pl.col("said").fill_null(0) > 0, pl.col("sex").is_null()).height
    conversions.note("stays with an unreadable sex, or with two, set missing", unread)
    cut = int(stays.select((pl.col("out") > pl.col("next")).sum()).item() or 0)
    words = (
        pl.when(pl.col("start_code").str.contains(text, literal=True)).then(kind) for text, kind in by.icu_type.items()
    )
    unit = pl.coalesce(*words, pl.lit(None, pl.Float64))
    unknown = int(stays.select(unit.is_null().sum()).item()) if by.icu_type else 0
    conversions.note("stays of a kind of unit that the mapping does not know", unknown)
    number = pl.int_range(pl.len()).over("subject_id") + 1
    stop = pl.min_horizontal("out", "next").fill_null(pl.col("last"))
    died = in_hospital_death(by)
    # discharge is charted late: a patient who dies within 6 h of leaving the unit is counted as having died there
    here = pl.coalesce(pl.col("death"), pl.when(died).then("left")) <= stop + pl.duration(hours=6)
    stays = stays.with_columns(age=hours(pl.col("start") - pl.col("born")) / (24 * 365.25))
    return stays.select(
        "subject_id",
        stay_id=pl.col("subject_id") + "-" + number.cast(pl.String),
        source=pl.lit(by.source),
        died=pl.when(pl.col("left_code").is_not_null()).then(died),
        end_h=hours(stop - pl.col("start")),
        end=pl.when(here).then(pl.lit("death")).when(pl.col("out").is_not_null()).then(pl.lit("discharge")),
        period=pl.col("start").dt.year().cast(pl.String) if by.dates == "real" else pl.lit(None, pl.String),
        clock_h=pl.col("start").dt.hour() + pl.col("start").dt.minute() / 60,
        start="start",
        stop=stop,
        age=age("age", pl.Float64()).round(2),  # one decimal would turn 17.95 into an adult
        sex="sex",
        icu_type=unit,
    ), cut  # fmt: skip


def pair_with_end(start: pl.DataFrame, out: pl.DataFrame) -> pl.DataFrame:
    """Return `start` with the columns of the patient's next end in `out`. An end at the very start belongs to the
    patient's earlier stay, if that one has no other: units hand over to each other in one minute."""
    pairs: dict[str, Any] = {"left_on": "start", "right_on": "out", "by": "subject_id", "strategy": "forward"}
    later, at_once = (
        start.join_asof(out, **pairs, check_sortedness=False, allow_exact_matches=exact) for exact in (False, True)
    )
    earlier = later.sort("subject_id", "start").with_columns(
        is_taken=(pl.col("out").shift(1).over("subject_id") == pl.col("start")).fill_null(False)
    )
    taken = earlier.filter("is_taken").select("subject_id", "start")
    return pl.concat(
        [later.join(taken, ["subject_id", "start"], "semi"), at_once.join(taken, ["subject_id", "start"], "anti")]
    ).sort("start")


def in_hospital_death(by: Mapping) -> pl.Expr:
    """Return whether the patient died in hospital: by the code of leaving it, or without one by the date of death."""
    if "died" in by.stay:
        return pl.any_horizontal(pl.col("left_code").str.starts_with(code) for code in by.stay["died"])
    if "death" in by.stay:
        return (pl.col("death").dt.date() <= pl.col("left").dt.date()).fill_null(False)
    return pl.lit(None, pl.Boolean)


def read_sexes(rows: pl.DataFrame, by: Mapping) -> pl.DataFrame:
    """Return subject_id, sex (null if it cannot be read or if rows differ), and said (number of rows with a sex)."""
    code = pl.col("code")
    mapped = (pl.when((code == start) | code.str.starts_with(f"{start}//")).then(v) for start, v in by.sex.items())
    word = code.str.extract(r"([^/]*)$", 1).alias("word")
    words = rows.select(word).select(sex("word")).to_series()
    read = rows.with_columns(sex=pl.coalesce(*mapped, words))
    one = pl.when(pl.col("sex").drop_nulls().n_unique() == 1).then(pl.col("sex").max())
    return read.group_by("subject_id").agg(sex=one, said=pl.len())


def hours(duration: pl.Expr) -> pl.Expr:
    return duration.dt.total_seconds() / 3600


def events_of(rows: pl.LazyFrame, window: pl.LazyFrame, by: Mapping) -> pl.LazyFrame:
    """Return EVENTS of one batch: ROWS within the stays of `window`."""
    rows = rows.filter(pl.col("time").is_not_null())
    values = rows.filter(pl.col("role") == "value").select("subject_id", "time", "concept", "value", UNIT)
    marked = [marked_ventilation(rows, by)] if by.ventilation.is_used() else []
    measured = pl.concat([values, *(sum_parts(rows, n, by) for n in by.sums), *marked], how="diagonal")
    # an event belongs to the latest admission at or before it, unless that stay has ended
    inside = (
        measured.sort("time")
        .join_asof(window.sort("start"), left_on="time", right_on="start", by="subject_id", check_sortedness=False)
        .filter(pl.col("time") <= pl.col("stop"))
    )
    before = (
        measured.filter(pl.col("concept").is_in(STATIC))
        .join(window, "subject_id")
        .filter((pl.col("time") < pl.col("start")) & (pl.col("start") - pl.col("time") <= pl.duration(hours=24)))
        .with_columns(time="start")
    )
    charts = pl.concat([inside, before], how="diagonal").with_columns(time=hours(pl.col("time") - pl.col("start")))
    columns = EVENTS.names()
    return pl.concat(
        [charts.select(*columns, UNIT), *(episodes(rows, window, n).select(columns) for n in by.episodes)],
        how="diagonal",
    )


def sum_parts(rows: pl.LazyFrame, name: str, by: Mapping) -> pl.LazyFrame:
    """Sum a score that is charted in parts; if a part is charted twice at one time, the ambiguous sum is omitted."""
    n = len(by.sums[name])
    return (
        rows.filter((pl.col("role") == f"part of {name}") & pl.col("value").is_not_null())
        .group_by("subject_id", "time")
        .agg(pl.col("value").sum(), parts=pl.col("code").n_unique(), rows=pl.len())
        .filter((pl.col("parts") == n) & (pl.col("rows") == n))
        .select("subject_id", "time", concept=pl.lit(name), value="value")
    )


def marked_ventilation(rows: pl.LazyFrame, by: Mapping) -> pl.LazyFrame:
    """Return mech_vent and niv at each time that is marked: non-invasive by its codes, otherwise invasive."""
    is_set = (
        (pl.col("role") == "value") & pl.col("concept").is_in(list(by.ventilation.settings)) & (pl.col("value") > 0)
    )
    mask = pl.col("role") == "marks niv"
    marks = mask | (pl.col("role") == "marks mech_vent") | (is_set & pl.col("value").is_not_nan())
    at = rows.filter(marks).group_by("subject_id", "time").agg(niv=mask.any().cast(pl.Float64))
    wide = at.with_columns(mech_vent=1 - pl.col("niv"))
    return wide.unpivot(VENTILATION, index=["subject_id", "time"], variable_name="concept", value_name="value")


def episodes(rows: pl.LazyFrame, window: pl.LazyFrame, name: str) -> pl.LazyFrame:
    """Return EVENTS of the episodes of one concept; each start is paired with the patient's next end."""

    def times(edge: str) -> pl.LazyFrame:
        at = rows.filter(pl.col("role") == f"{edge} {name}")
        return at.select("subject_id", pl.col("time").alias(edge)).sort(edge)

    pairs = times("from").join_asof(
        times("to"), left_on="from", right_on="to", by="subject_id", strategy="forward", check_sortedness=False
    )
    placed = pairs.join(window, "subject_id").select(
        "subject_id",
        "stay_id",
        "end_h",
        concept=pl.lit(name),
        from_h=hours(pl.col("from") - pl.col("start")),
        to_h=hours(pl.col("to") - pl.col("start")),
    )
    return chart_episodes(placed)


def descriptors(stays: pl.DataFrame) -> pl.DataFrame:
    """Return age, sex and icu_type of every stay as events at its start."""
    wide = stays.select("subject_id", "stay_id", pl.col("age", "sex", "icu_type").cast(pl.Float64), time=pl.lit(0.0))
    return (
        wide.unpivot(index=["subject_id", "stay_id", "time"], variable_name="concept")
        .drop_nulls("value")
        .select(EVENTS.names())
    )
