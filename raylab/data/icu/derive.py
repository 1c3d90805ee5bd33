"""Series made of other series: P/F, S/F, driving pressure, static compliance. Each at the time of its first-named part,
with the latest of the others at most `BACK_H` back: nothing of the future enters. A part that was recorded and cannot
be used gives a null, which ends the carry of the series.
"""

import polars as pl

from raylab.data.icu.concepts import CONCEPTS, EVENTS, charted, charted_ratio

BACK_H = {"fio2": 8.0, "peep": 4.0, "volume": 4.0}
SOURCES = ("pao2", "spo2", "sao2", "fio2", "plateau", "peep", "tidal_volume", "tidal_volume_set")


def derived(events: pl.LazyFrame) -> pl.LazyFrame:
    """EVENTS of `pf`, `sf`, `driving_pressure` and `compliance` from screened events of one source.

    S/F is of SpO2, or of SaO2 in stays without SpO2 (PhysioNet 2012 has no SpO2). The compliance takes the observed
    tidal volume, or the set one where that is missing.
    """
    rows = events.filter(pl.col("concept").is_in(SOURCES)).with_columns(
        s=(pl.col("time") * 3600).round().cast(pl.Int64)
    )

    def of(*concepts: str) -> pl.LazyFrame:
        return rows.filter(pl.col("concept").is_in(concepts)).sort("s", "value")

    def with_latest(at: pl.LazyFrame, past: pl.LazyFrame, name: str) -> pl.LazyFrame:
        """Rows of `at` that have one, and null where it cannot be used."""
        past = past.select("stay_id", "s", pl.col("value").alias(name), recorded=pl.lit(True))
        back = round(BACK_H[name] * 3600)
        joined = at.join_asof(past, on="s", by="stay_id", tolerance=back, check_sortedness=False)
        return joined.filter("recorded").drop("recorded")

    def named(at: pl.LazyFrame, concept: str, value: pl.Expr) -> pl.LazyFrame:
        inside = value.is_between(CONCEPTS[concept].low, CONCEPTS[concept].high)
        return at.with_columns(concept=pl.lit(concept), value=pl.when(inside).then(value)).select(EVENTS.names())

    pulse = of("spo2").drop_nulls("value").select("stay_id").unique()
    oxygen = pl.concat([of("spo2"), of("sao2").join(pulse, "stay_id", "anti")]).sort("s", "value")
    gases = with_latest(of("pao2"), of("fio2"), "fio2")
    pressures = with_latest(of("plateau"), of("peep"), "peep")
    observed = of("tidal_volume").with_columns(set=pl.lit(False))
    # at one time what can be used comes last, and of that the observed volume
    volumes = (
        pl.concat([of("tidal_volume_set").with_columns(set=pl.lit(True)), observed])
        .with_columns(usable=pl.col("value").is_not_null())
        .sort("s", "usable", "set", "value", descending=[False, False, True, False])
    )
    drive = pl.col("value") - pl.col("peep")
    return pl.concat(
        [
            named(gases, "pf", charted_ratio(pl.col("value"), pl.col("fio2"), "pf")),
            named(with_latest(oxygen, of("fio2"), "fio2"), "sf", charted_ratio(pl.col("value"), pl.col("fio2"), "sf")),
            named(pressures, "driving_pressure", charted(drive, "driving_pressure")),
            named(
                with_latest(pressures, volumes, "volume"), "compliance", charted(pl.col("volume") / drive, "compliance")
            ),
        ]
    )
