"""Series made of other series: P/F, S/F, driving pressure, static compliance. Each at the time of its first-named part,
with the latest of the others at most `BACK_H` back: nothing of the future enters.
"""

import polars as pl

from raylab.data.concepts import CONCEPTS, EVENTS

BACK_H = {"fio2": 8.0, "peep": 4.0, "volume": 4.0}
SOURCES = ("pao2", "spo2", "sao2", "fio2", "plateau", "peep", "tidal_volume", "tidal_volume_set")


def derived(events: pl.LazyFrame) -> pl.LazyFrame:
    """EVENTS of `pf`, `sf`, `driving_pressure` and `compliance` from plausible events of one source.

    S/F is of SpO2, or of SaO2 in stays without SpO2 (PhysioNet 2012 has no SpO2). The compliance takes the observed
    tidal volume, or the set one where that is missing.
    """
    rows = events.filter(pl.col("concept").is_in(SOURCES) & pl.col("value").is_not_null()).with_columns(
        s=(pl.col("time") * 3600).round().cast(pl.Int64)
    )

    def of(*concepts: str) -> pl.LazyFrame:
        return rows.filter(pl.col("concept").is_in(concepts)).sort("s", "value")

    def with_latest(at: pl.LazyFrame, past: pl.LazyFrame, name: str) -> pl.LazyFrame:
        past = past.select("stay_id", "s", pl.col("value").alias(name))
        back = round(BACK_H[name] * 3600)
        return at.join_asof(past, on="s", by="stay_id", tolerance=back, check_sortedness=False)

    def named(at: pl.LazyFrame, concept: str, value: pl.Expr) -> pl.LazyFrame:
        low, high = CONCEPTS[concept].low, CONCEPTS[concept].high
        made = at.with_columns(concept=pl.lit(concept), value=value).filter(pl.col("value").is_between(low, high))
        return made.select(EVENTS.names())

    pulse = of("spo2").select("stay_id").unique()
    oxygen = pl.concat([of("spo2"), of("sao2").join(pulse, "stay_id", "anti")]).sort("s", "value")
    gases = with_latest(of("pao2"), of("fio2"), "fio2")
    pressures = with_latest(of("plateau"), of("peep"), "peep").filter(pl.col("value") > pl.col("peep"))
    observed = of("tidal_volume").with_columns(set=pl.lit(False))
    volumes = pl.concat([of("tidal_volume_set").with_columns(set=pl.lit(True)), observed]).sort(
        "s", "set", "value", descending=[False, True, False]
    )
    pressures = with_latest(pressures, volumes, "volume")
    drive = pl.col("value") - pl.col("peep")
    return pl.concat(
        [
            named(gases, "pf", pl.col("value") / pl.col("fio2")),
            named(with_latest(oxygen, of("fio2"), "fio2"), "sf", pl.col("value") / pl.col("fio2")),
            named(pressures, "driving_pressure", drive),
            named(pressures, "compliance", pl.col("volume") / drive),
        ]
    )
