"""Features of a stay's virtual patient: the lung model fitted to its gases before the landmark, and what-if outputs.

Only the hourly grid before the landmark is used, so that no later value can enter. Each fit uses one stay's readings
only: no data passes between patients, and simulated patients are never rows. Stays without a ventilated gas have nulls,
and vp_known is 0.
"""

import polars as pl
import torch

from raylab.data.lung import gases
from raylab.data.lung.fits import fit_stays
from raylab.physiology.parameters import inputs
from raylab.physiology.steady import steady_state

FITTED = {
    "vp_shunt": "shunt",
    "vp_vq_log_sd": "vq_log_sd",
    "vp_dead_space": "alveolar_dead_space",
    "vp_compliance": "compliance_mL_per_cmH2O",
}
WHAT_IFS = {
    "vp_pf_at_half": ({"fio2": 0.5}, "pf_mmHg"),
    "vp_pf_low_output": ({"fio2": 0.5, "cardiac_output_L_per_min": 4.0}, "pf_mmHg"),
    "vp_paco2_usual": ({"fio2": 0.5}, "paco2_mmHg"),
}
"""Outputs of the fitted lung under standard settings (parameters.SETTINGS) changed by these, so that gases of patients
can be compared at the same FiO2 and ventilation."""
VIRTUAL = ("vp_known", *FITTED, "vp_shunt_width", *WHAT_IFS)


def virtual_patients(samples: pl.DataFrame, table: pl.DataFrame, landmark_h: int) -> pl.DataFrame:
    """Return `samples` with the columns VIRTUAL, float32; `table` is their hourly grid (hours.parquet)."""
    readings = gases.gases(events(samples, table.filter(pl.col("hour") < landmark_h)))
    if readings.is_empty():
        nothing = [pl.lit(None, pl.Float32).alias(name) for name in VIRTUAL[1:]]
        return samples.with_columns(pl.lit(0.0, pl.Float32).alias("vp_known"), *nothing)
    fits, _ = fit_stays(readings.with_columns(window=pl.lit(0, pl.Int32)))
    fits = fits.filter(pl.col("status") == 0)
    columns = {"stay_id": fits["stay_id"], **{name: fits[parameter] for name, parameter in FITTED.items()}}
    columns["vp_shunt_width"] = fits["shunt/high"] - fits["shunt/low"]
    lung = {parameter: torch.tensor(fits[parameter].to_numpy().copy()) for parameter in FITTED.values()}
    for name, (settings, output) in WHAT_IFS.items():
        with torch.no_grad():
            state = steady_state(inputs({**lung, "collapsed": 0.0, **settings}, rows=fits.height))
        columns[name] = pl.Series(state.values[output].numpy()).fill_nan(None)
    features = pl.DataFrame(columns).with_columns(pl.exclude("stay_id").cast(pl.Float32))
    joined = samples.join(features, "stay_id", "left", maintain_order="left")
    joined = joined.with_columns(vp_known=pl.col("vp_shunt").is_not_null().cast(pl.Float32))
    return joined.select(*samples.columns, *VIRTUAL)


def events(samples: pl.DataFrame, table: pl.DataFrame) -> pl.LazyFrame:
    """Convert the grid back to events: stay_id, time (h), concept, value; the last value of each hour, and a null where
    an unusable record ended the carry."""
    wanted = [name for name in ("pao2", *gases.BACK_h, *gases.SAMPLE) if name in table.columns]
    known = {name: pl.col(f"{name}__since").is_not_null() for name in wanted}
    rows = [
        table.filter(~known[name] & known[name].shift().over("stay_id")).select(
            "stay_id",
            time=pl.col("hour").cast(pl.Float64),
            concept=pl.lit(name),
            value=pl.lit(None, pl.Float64),
        )
        for name in wanted
    ]
    rows += [
        table.filter(pl.col(f"{name}__mask")).select(
            "stay_id",
            time=pl.col("hour") + 1 - pl.col(f"{name}__since").cast(pl.Float64),
            concept=pl.lit(name),
            value=pl.col(name).cast(pl.Float64),
        )
        for name in wanted
    ]
    stays = samples.unique("stay_id", maintain_order=True)
    rows += [
        stays.select(
            "stay_id", time=pl.lit(0.0), concept=pl.lit(name), value=pl.col(name).cast(pl.Float64)
        ).drop_nulls()
        for name in gases.STATIC
        if name in stays.columns
    ]
    return pl.concat(rows).lazy()
