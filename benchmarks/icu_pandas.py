"""A reference in plain pandas for `prepare ards --source mimic3`: read the complete tables, select the known items in
the concepts' units, label ahrf, and write the hourly grid before the landmark, without splits.

    python benchmarks/icu_pandas.py DIR OUT.parquet
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from raylab.data.icu.concepts import CONCEPTS, factor, names_no_unit, stated_units
from raylab.data.icu.sources import mimic, mimic3

LANDMARK, FIO2_BACK, VENT_BACK = 12, 8, 6


def read(folder: Path, name: str, columns: list[str]) -> pd.DataFrame:
    file = next(file for file in folder.iterdir() if file.name.lower().startswith(f"{name}.csv"))
    return pd.read_csv(file, usecols=lambda column: column.lower() in columns).rename(columns=str.lower)


def episodes(folder: Path, stays: pd.DataFrame) -> pd.DataFrame:
    """icustay_id, time, value of MetaVision's invasive ventilation: 1 every hour from its start, 0 at its end."""
    rows = read(folder, "procedureevents_mv", ["icustay_id", "itemid", "starttime", "endtime", "statusdescription"])
    rows = rows[(rows.itemid == 225792) & (rows.statusdescription != "Rewritten")].merge(stays, on="icustay_id")
    for column in ("starttime", "endtime"):
        rows[column] = (pd.to_datetime(rows[column]) - rows.intime).dt.total_seconds() / 3600
    charted = []
    for row in rows.itertuples():
        times = np.arange(max(row.starttime, 0.0), row.endtime, 1.0)
        charted.append(pd.DataFrame({"icustay_id": row.icustay_id, "time": times, "value": 1.0}))
        charted.append(pd.DataFrame({"icustay_id": [row.icustay_id], "time": [row.endtime], "value": [0.0]}))
    table = pd.concat(charted).merge(stays, on="icustay_id")
    return table[(table.time >= 0) & (table.time <= (table.outtime - table.intime).dt.total_seconds() / 3600)]


def main(folder: Path, out: Path) -> None:
    stays = read(folder, "icustays", ["subject_id", "icustay_id", "intime", "outtime"])
    stays[["intime", "outtime"]] = stays[["intime", "outtime"]].apply(pd.to_datetime)
    chart = read(
        folder,
        "chartevents",
        ["subject_id", "icustay_id", "itemid", "charttime", "value", "valuenum", "valueuom", "error"],
    )
    labs = read(folder, "labevents", ["subject_id", "itemid", "charttime", "value", "valuenum", "valueuom"])
    known = {int(item) for concept in CONCEPTS.values() for item in concept.ids["mimic3"]}
    rule = {mimic3.MODE, mimic3.DEVICE}
    chart = chart[chart.itemid.isin(known | rule) & (chart.error != 1)]
    art = labs[(labs.itemid == mimic3.SPECIMEN) & (labs.value == "ART")][["subject_id", "charttime"]].drop_duplicates()
    gas = labs[labs.itemid.isin(mimic.GASES)].merge(art, on=["subject_id", "charttime"])
    labs = pd.concat([labs[labs.itemid.isin(known) & ~labs.itemid.isin(mimic.GASES)], gas])
    labs = labs.merge(stays[["subject_id", "icustay_id", "intime", "outtime"]], on="subject_id")
    labs.charttime = pd.to_datetime(labs.charttime)
    labs = labs[(labs.charttime >= labs.intime) & (labs.charttime <= labs.outtime)].drop(columns=["intime", "outtime"])
    chart.charttime = pd.to_datetime(chart.charttime)
    rows = pd.concat([chart.drop(columns="error"), labs]).merge(
        stays[["icustay_id", "intime", "outtime"]], on="icustay_id"
    )
    rows["time"] = (rows.charttime - rows.intime).dt.total_seconds() / 3600
    rows = rows[(rows.time >= 0) & (rows.charttime <= rows.outtime)]
    rows.valueuom = rows.valueuom.astype(object).where(rows.valueuom.notna(), None)
    pairs = rows[["itemid", "valueuom"]].drop_duplicates()
    stated = stated_units("mimic3", zip(pairs.itemid.astype(str), pairs.valueuom, strict=True))
    factors = []
    for item, recorded, name, unit in stated.iter_rows():
        found = (1.0, 0.0) if names_no_unit(unit) else factor(CONCEPTS[name], unit)
        factors += [(int(item), recorded, name, *found)] if found else []
    columns = ["itemid", "valueuom", "concept", "scale", "offset"]
    measured = rows.merge(pd.DataFrame(factors, columns=columns), on=["itemid", "valueuom"])
    measured["value"] = measured.valuenum * measured.scale + measured.offset
    settings = rows.itemid.isin(mimic3.SETTINGS) & (rows.valuenum > 0)
    on = rows[settings | ((rows.itemid == mimic3.MODE) & (rows.value != "Other/Remarks"))]
    free = rows[(rows.itemid == mimic3.DEVICE) & rows.value.str.lower().isin(mimic3.NO_TUBE)]
    vent = pd.concat([on.assign(value=1.0), free.assign(value=0.0), episodes(folder, stays)]).assign(
        concept="mech_vent"
    )
    columns = ["icustay_id", "time", "concept", "value"]
    events = pd.concat([measured[columns], vent[columns]]).dropna().drop_duplicates()
    fio2 = events.concept == "fio2"
    events.loc[fio2 & (events.value >= 20), "value"] /= 100
    events.loc[fio2 & events.value.round(3).between(0.2, 0.21), "value"] = 0.21
    low = events.concept.map({name: concept.low for name, concept in CONCEPTS.items()})
    high = events.concept.map({name: concept.high for name, concept in CONCEPTS.items()})
    events = events[(events.value >= low) & (events.value <= high)].sort_values(["time", "value"])

    def of(concept: str) -> pd.DataFrame:
        return events[events.concept == concept][["icustay_id", "time", "value"]]

    gases = pd.merge_asof(
        of("pao2"), of("fio2").rename(columns={"value": "fio2"}), on="time", by="icustay_id", tolerance=float(FIO2_BACK)
    )
    gases = pd.merge_asof(
        gases, of("mech_vent").rename(columns={"value": "vent"}), on="time", by="icustay_id", tolerance=float(VENT_BACK)
    )
    low_pf = gases[(gases.value / gases.fio2 <= 300) & (gases.vent == 1)]
    onset = low_pf.groupby("icustay_id").time.min()
    last = events.groupby("icustay_id").time.max()
    at_risk = last[last > LANDMARK].index.difference(onset[onset <= LANDMARK].index)
    before = events[(events.time < LANDMARK) & events.icustay_id.isin(at_risk)].assign(hour=lambda e: np.floor(e.time))
    cells = before.groupby(["icustay_id", "hour", "concept"]).agg(value=("value", "last"), time=("time", "last"))
    wide = cells.unstack("concept")
    whole = pd.MultiIndex.from_product([at_risk, range(LANDMARK)], names=["icustay_id", "hour"])
    wide = wide.reindex(whole)
    value = wide["value"]
    since = value.notna().groupby(level=0).cumsum()
    age = (wide.index.get_level_values("hour").to_numpy()[:, None] + 1) - wide["time"].groupby(level=0).ffill()
    table = pd.concat(
        [value.astype("float32"), value.notna().add_suffix("__mask"), age.where(since > 0).add_suffix("__since")],
        axis=1,
    )
    table.to_parquet(out)
    print(f"{len(at_risk)} stays, {len(onset)} onsets")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
