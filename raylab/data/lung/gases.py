"""Arterial gases with their ventilator settings, from the events of any source, as data for the lung model.

A measurement is an arterial PaO2 of a ventilated patient with its FiO2, the PaCO2 and pH of the same sample, and the
settings and pressures last charted before it, at most BACK_h hours back. Values that a source lacks (PhysioNet 2012 has
no tidal volume, PEEP or plateau) are null here; `readings` inserts usual values, and `flags` says which.
"""

import polars as pl
import torch
from torch import Tensor

from raylab.physiology import blood
from raylab.physiology.fit import ERROR
from raylab.physiology.parameters import QUANTITIES, Inputs, inputs

# the windows of the label (labels.py), if it has them
BACK_h = {
    "fio2": 8.0,
    "peep": 8.0,
    "tidal_volume": 8.0,
    "tidal_volume_set": 8.0,
    "resp_rate": 4.0,
    "plateau": 4.0,
    "etco2": 1.0,
    "temp": 12.0,
    "hemoglobin": 48.0,
    "hct": 48.0,
    "mech_vent": 6.0,
}
SAMPLE = ("paco2", "ph")  # measured in the same sample
STATIC = ("height", "sex", "weight_admission")
LEAST_BREATH_mL = 200.0
VO2_mL_per_min_kg = 3.5  # resting oxygen uptake, per kg of body weight up to 100 kg; a metabolic equivalent
NEEDS = {
    "shunt": ("pao2",),
    "vq_log_sd": ("pao2",),
    "alveolar_dead_space": ("paco2", "tidal_volume", "resp_rate"),
    "compliance_mL_per_cmH2O": ("plateau", "peep", "tidal_volume"),
}
"""Measurements without which a parameter is not more than its prior."""


def gases(events: pl.LazyFrame) -> pl.DataFrame:
    """One row per measurement, by stay and time: stay_id, time (h), pao2, and the columns of BACK_h, SAMPLE and STATIC.

    `events` are plausible values in the units of `concepts`; a null was recorded but cannot be used, and ends the carry
    of the previous value. Of several values at one time the largest is used.
    """
    wanted = ["pao2", *BACK_h, *SAMPLE, *STATIC]
    rows = (
        events.filter(pl.col("concept").is_in(wanted))
        .with_columns(s=(pl.col("time") * 3600).round().cast(pl.Int64))
        .group_by("stay_id", "concept", "s")
        .agg(value=pl.col("value").max())
        .collect()
    )

    def of(concept: str) -> pl.DataFrame:
        return (
            rows.filter(pl.col("concept") == concept).select("stay_id", "s", pl.col("value").alias(concept)).sort("s")
        )

    table = of("pao2").drop_nulls()
    for name in SAMPLE:
        table = table.join(of(name), ["stay_id", "s"], "left")
    for name, hours in BACK_h.items():
        table = table.sort("s").join_asof(
            of(name), on="s", by="stay_id", tolerance=round(hours * 3600), check_sortedness=False
        )
    for name in STATIC:
        first = of(name).drop_nulls().group_by("stay_id", maintain_order=True).agg(pl.col(name).first())
        table = table.join(first, "stay_id", "left")
    ventilated = table.filter((pl.col("mech_vent") == 1) & pl.col("fio2").is_not_null())
    # 52 or 64 mL are charted, which no adult breathes: use the set volume, or none
    volume = pl.coalesce(*(pl.when(pl.col(n) >= LEAST_BREATH_mL).then(n) for n in ("tidal_volume", "tidal_volume_set")))
    return (
        ventilated.with_columns(tidal_volume=volume, time=pl.col("s") / 3600)
        .with_columns(hemoglobin=pl.coalesce("hemoglobin", pl.col("hct") / 3))
        .drop("tidal_volume_set", "hct", "mech_vent", "s")
        .sort("stay_id", "time")
    )


def predicted_weight(table: pl.DataFrame) -> pl.Series:
    """kg from height (cm) and sex (1 male): 50 or 45.5 + 0.91 (height - 152.4), as in the ARDS network's trials (N Engl
    J Med 2000;342:1301); null without them."""
    base = pl.when(pl.col("sex") == 1).then(50.0).otherwise(45.5)
    return table.select(w=(base + 0.91 * (pl.col("height") - 152.4)).clip(30, 120))["w"]


def readings(table: pl.DataFrame) -> tuple[Inputs, dict[str, Tensor]]:
    """(inputs, measured outputs) of `gases` for `fit`: unknown inputs have their usual value, unknown outputs are
    NaN.

    Base excess is computed from the pH, PaCO2 and haemoglobin of the measurement. Collapsed lung is counted as shunt.
    """

    def column(name: str, usual: str) -> Tensor:
        q = QUANTITIES[usual]
        return torch.tensor(table[name].cast(pl.Float64).fill_null(q.usual).clip(q.low, q.high).to_numpy().copy())

    known = {
        "fio2": column("fio2", "fio2"),
        "peep_cmH2O": column("peep", "peep_cmH2O"),
        "tidal_volume_mL": column("tidal_volume", "tidal_volume_mL"),
        "rate_per_min": column("resp_rate", "rate_per_min"),
        "hb_g_per_dL": column("hemoglobin", "hb_g_per_dL"),
        "temperature_C": column("temp", "temperature_C"),
        "collapsed": 0.0,
        "predicted_weight_kg": torch.tensor(predicted_weight(table).fill_null(66.0).to_numpy().copy()),
    }
    given = inputs(known, rows=table.height)
    # a volume barely above the airway dead space would leave almost nothing for the alveoli
    shallow = given.tidal_volume_mL < 1.3 * given.airway_dead_space_mL()
    given = given.but(predicted_weight_kg=torch.where(shallow, given.tidal_volume_mL / 2.86, given.predicted_weight_kg))
    measured = {
        output: torch.tensor(table[name].cast(pl.Float64).fill_null(float("nan")).to_numpy().copy())
        for output, name in zip(ERROR, ("pao2", "paco2", "etco2", "plateau"), strict=True)
    }
    # a plateau at or below PEEP, or an end-tidal value above the arterial one, is an entry error
    measured["plateau_cmH2O"][measured["plateau_cmH2O"] <= given.peep_cmH2O + 1] = torch.nan
    measured["etco2_mmHg"][measured["etco2_mmHg"] > 1.1 * measured["paco2_mmHg"]] = torch.nan
    ph = torch.tensor(table["ph"].cast(pl.Float64).fill_null(float("nan")).to_numpy().copy())
    nothing = torch.zeros_like(ph)
    po2, pco2 = measured["pao2_mmHg"], measured["paco2_mmHg"]
    excess = blood.state(po2.log(), pco2.log(), ph, given.hb_g_per_dL, nothing, given.temperature_C).excess
    limit = QUANTITIES["base_excess_mmol_per_L"]
    return given.but(base_excess_mmol_per_L=excess.nan_to_num(0.0).clamp(limit.low, limit.high)), measured


def vo2_median(table: pl.DataFrame) -> pl.Series:
    """O2 uptake in mL/min of the patient of each measurement, from body weight; null without it."""
    return table.select(v=VO2_mL_per_min_kg * pl.col("weight_admission").clip(40, 100))["v"]


def flags(table: pl.DataFrame) -> pl.DataFrame:
    """`patient`, readings, and for each parameter of NEEDS `PARAMETER/missing`: what was never measured in the
    patient."""
    present = table.group_by("patient", maintain_order=True).agg(
        pl.len().alias("readings"),
        *(pl.col(name).count().alias(name) for name in dict.fromkeys(sum(NEEDS.values(), ()))),
    )
    lacks = [
        pl.concat_str(
            [pl.when(pl.col(n) == 0).then(pl.lit(n)) for n in names], separator=", ", ignore_nulls=True
        ).alias(f"{parameter}/missing")
        for parameter, names in NEEDS.items()
    ]
    return present.select("patient", "readings", *lacks)
