"""MEDS (Medical Event Data Standard) parquet event streams with MIMIC-IV codes.

Columns subject_id, time, code, numeric_value; the item id is the second part of the code (`LAB//223835//UNK`,
`SUBJECT_FLUID_OUTPUT//226559//ml`). A stay runs from ICU_ADMISSION to the patient's next ICU_DISCHARGE; only what is
charted within it becomes an event. Invasive ventilation is an episode, PROCEDURE//START//225792 to END: a mech_vent
event at its start, every hour after and at its end, as PhysioNet 2012 charts it. Everything stays lazy until the
steps of `icu` collect it, so a full MIMIC-IV does not have to fit in memory.
"""

from pathlib import Path

import polars as pl

from raylab.data.concepts import CONCEPTS, EVENTS, STATIC, STAYS, Extract, by_id
from raylab.errors import DataError

COLUMNS = ("subject_id", "time", "code", "numeric_value")
VENTILATION = CONCEPTS["mech_vent"].ids["meds"][0]
FAHRENHEIT = "223761"
COMA_SCALE = CONCEPTS["gcs"].ids["meds"]  # eye, verbal, motor: a score is the sum of the three at one time
# PhysioNet 2012's icu_type of the first care unit; a mixed unit counts as medical
ICU_TYPES = {"Coronary": 1, "Cardiac Vascular": 2, "Medical": 3, "Surgical": 4, "SICU": 4}


def read(path: Path) -> Extract:
    rows = scan(path)
    stays = find_stays(rows, path)
    window = stays.lazy().select("subject_id", "stay_id", "start", "end")
    charted = measurements(rows)
    # the latest admission at or before the event, and not beyond the end of that stay
    inside = (
        charted.sort("time")
        .join_asof(window.sort("start"), left_on="time", right_on="start", by="subject_id", check_sortedness=False)
        .filter(pl.col("time") <= pl.col("end"))
    )
    before = (
        charted.filter(pl.col("concept").is_in(STATIC))
        .join(window, "subject_id")
        .filter((pl.col("time") < pl.col("start")) & (pl.col("start") - pl.col("time") <= pl.duration(hours=24)))
        .with_columns(time="start")
    )
    events = pl.concat([inside, before, ventilation(rows, window)], how="diagonal").with_columns(
        time=hours(pl.col("time") - pl.col("start")), value=pl.col("value").cast(pl.Float64)
    )
    return Extract(
        pl.concat([events.select(EVENTS.names()), descriptors(rows, stays.lazy())]),
        stays.select(STAYS.names()),
    )


def hours(duration: pl.Expr) -> pl.Expr:
    return duration.dt.total_seconds() / 3600


def scan(path: Path) -> pl.LazyFrame:
    """All event files below `path` (below its `data/`, if it has one), with subject_id as text and `item` split off."""
    root = path / "data" if (path / "data").is_dir() else path
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else []
    if not files:
        raise DataError(
            f"{path} holds no MEDS data", "expected data/**/*.parquet", "give --path the root of a MEDS data set"
        )
    for file in files:
        try:
            missing = set(COLUMNS) - set(pl.read_parquet_schema(file))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{file} is damaged or not parquet", str(error).splitlines()[0], "copy it again") from error
        if missing:
            raise DataError(
                f"{file} is not a MEDS event file", f"no column {', '.join(sorted(missing))}", "give --path MEDS data"
            )
    parts = pl.col("code").str.splitn("//", 3).struct
    return (
        pl.scan_parquet(files)
        .select(pl.col("subject_id").cast(pl.String), pl.col("time").cast(pl.Datetime("us")), *COLUMNS[2:])
        .with_columns(kind=parts[0], item=parts[1])
    )


def find_stays(rows: pl.LazyFrame, path: Path) -> pl.DataFrame:
    """One row an ICU admission: the columns of STAYS, start, end, icu_type.

    A stay without a discharge ends at the patient's next admission or last event.
    """

    def times(kind: str, name: str) -> pl.LazyFrame:
        return rows.filter((pl.col("kind") == kind) & pl.col("time").is_not_null()).select(
            "subject_id", pl.col("time").alias(name), pl.col("code").alias(f"{name}_code")
        )

    start = times("ICU_ADMISSION", "start").unique(["subject_id", "start"], keep="any").sort("start")
    forward = {"left_on": "start", "by": "subject_id", "strategy": "forward", "check_sortedness": False}
    out = times("HOSPITAL_DISCHARGE", "left").sort("left")
    stays = (
        start.join_asof(times("ICU_DISCHARGE", "end").sort("end"), right_on="end", **forward)  # type: ignore[arg-type]
        .join_asof(out, right_on="left", **forward)  # type: ignore[arg-type]
        .join(rows.group_by("subject_id").agg(last=pl.col("time").max()), "subject_id")
        .sort("subject_id", "start")
        .with_columns(next=pl.col("start").shift(-1).over("subject_id"))
    )
    unit = pl.coalesce(
        *(pl.when(pl.col("start_code").str.contains(text)).then(number) for text, number in ICU_TYPES.items())
    )
    number = pl.int_range(pl.len()).over("subject_id") + 1
    found = stays.select(
        "subject_id",
        "start",
        stay_id=pl.col("subject_id") + "-" + number.cast(pl.String),
        source=pl.lit("mimic-iv-meds"),
        died=pl.col("left_code").str.starts_with("HOSPITAL_DISCHARGE//DIED"),
        end=pl.min_horizontal("end", "next").fill_null(pl.col("last")),
        icu_type=unit,
    ).collect()
    if found.is_empty():
        raise DataError(f"{path} has no ICU stay", "no code ICU_ADMISSION//...", "give a MEDS data set of ICU patients")
    return found


def measurements(rows: pl.LazyFrame) -> pl.LazyFrame:
    """subject_id, time (date), concept, value of everything charted with a known item id."""
    ids = {item: name for item, name in by_id("meds").items() if item != VENTILATION}
    known = rows.filter(
        pl.col("kind").is_in(["LAB", "SUBJECT_FLUID_OUTPUT"])
        & pl.col("item").is_in(list(ids))
        & pl.col("time").is_not_null()
        & pl.col("numeric_value").is_not_null()
    ).with_columns(value=pl.col("numeric_value").cast(pl.Float64))
    coma = pl.col("item").is_in(COMA_SCALE)
    scores = (
        known.filter(coma)
        .group_by("subject_id", "time")
        .agg(pl.col("value").sum(), parts=pl.col("item").n_unique(), rows=pl.len())
        # a part charted twice at one time would make the sum ambiguous
        .filter((pl.col("parts") == len(COMA_SCALE)) & (pl.col("rows") == len(COMA_SCALE)))
        .select("subject_id", "time", "value", concept=pl.lit("gcs"))
    )
    celsius = pl.when(pl.col("item") == FAHRENHEIT).then((pl.col("value") - 32) / 1.8).otherwise(pl.col("value"))
    others = known.filter(~coma).select(
        "subject_id",
        "time",
        value=celsius,
        concept=pl.col("item").replace_strict(ids, return_dtype=pl.String),
    )
    return pl.concat([others, scores])


def ventilation(rows: pl.LazyFrame, window: pl.LazyFrame) -> pl.LazyFrame:
    """mech_vent = 1 at the start and every hour of each episode, 0 at its end, all within the stay it overlaps.

    An episode without an end runs to the end of the stay; one that ends while another goes on leaves no 0.
    """

    def times(edge: str) -> pl.LazyFrame:
        at = rows.filter(pl.col("code").str.starts_with(f"PROCEDURE//{edge}//{VENTILATION}"))
        return at.filter(pl.col("time").is_not_null()).select("subject_id", pl.col("time").alias(edge)).sort(edge)

    episodes = (
        times("START")
        .join_asof(
            times("END"), left_on="START", right_on="END", by="subject_id", strategy="forward", check_sortedness=False
        )
        .join(window, "subject_id")
        .filter((pl.col("START") <= pl.col("end")) & (pl.col("END").is_null() | (pl.col("END") >= pl.col("start"))))
    )
    first = pl.max_horizontal("START", "start")
    last = pl.min_horizontal("END", "end")
    columns = ("subject_id", "stay_id", "start", "end", "time")
    on = (
        episodes.with_columns(time=pl.datetime_ranges(first, last, "1h", closed="left"))
        .explode("time")
        .drop_nulls("time")
    )
    off = episodes.filter(pl.col("END") <= pl.col("end")).with_columns(time="END")
    going_on = (
        off.select(columns)
        .join(episodes.select("stay_id", "START", "END"), "stay_id")
        .filter((pl.col("START") <= pl.col("time")) & ((pl.col("END") > pl.col("time")) | pl.col("END").is_null()))
    )
    off = off.join(going_on, ["stay_id", "time"], "anti")
    return pl.concat(
        [
            on.select(columns).with_columns(value=pl.lit(1.0), concept=pl.lit("mech_vent")),
            off.select(columns).with_columns(value=pl.lit(0.0), concept=pl.lit("mech_vent")),
        ]
    ).unique()


def descriptors(rows: pl.LazyFrame, stays: pl.LazyFrame) -> pl.LazyFrame:
    """age, sex and icu_type of every stay as events at its start."""
    born = rows.filter(pl.col("kind") == "MEDS_BIRTH").group_by("subject_id").agg(born=pl.col("time").min())
    sex = rows.filter(pl.col("kind") == "GENDER").group_by("subject_id").agg(sex=pl.col("item").min())
    wide = (
        stays.join(born, "subject_id", "left")
        .join(sex, "subject_id", "left")
        .select(
            "subject_id",
            "stay_id",
            time=pl.lit(0.0),
            age=(hours(pl.col("start") - pl.col("born")) / (24 * 365.25)).round(1),
            sex=pl.col("sex").replace_strict({"M": 1.0, "F": 0.0}, default=None),
            icu_type=pl.col("icu_type").cast(pl.Float64),
        )
    )
    return (
        wide.unpivot(index=["subject_id", "stay_id", "time"], variable_name="concept")
        .drop_nulls("value")
        .select(EVENTS.names())
    )
