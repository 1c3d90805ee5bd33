"""Series derived from other series: P/F, S/F, driving pressure, static compliance.

Each is computed at the time of its first part, with the latest value of the other part at most `BACK_H` hours earlier,
so that no future value enters. A part whose record is unusable gives a null, which ends the carry of the series.
"""

import polars as pl

from raylab.data.icu.concepts import CONCEPT, CONCEPTS, EVENTS, charted, charted_ratio

BACK_H = {"fio2": 8.0, "peep": 4.0, "volume": 4.0}
SOURCES = ("pao2", "spo2", "sao2", "fio2", "plateau", "peep", "tidal_volume", "tidal_volume_set")


def derive_series(events: pl.LazyFrame) -> pl.LazyFrame:
    """Return EVENTS of `pf`, `sf`, `driving_pressure` and `compliance` from screened events of one source.

    S/F uses SpO2, or SaO2 as long as the stay has no usable SpO2 (PhysioNet 2012 has none at all). The compliance uses
    the observed tidal volume, or the set volume if that is missing.
    """
    rows = events.filter(pl.col("concept").is_in(SOURCES)).with_columns(
        s=(pl.col("time") * 3600).round().cast(pl.Int64)
    )

    def of(*concepts: str) -> pl.LazyFrame:
        return rows.filter(pl.col("concept").is_in(concepts)).sort("s", "value")

    def with_latest(at: pl.LazyFrame, past: pl.LazyFrame, name: str) -> pl.LazyFrame:
        """Return the rows of `at` with a record in `past`, as column `name`: null if that record is unusable."""
        past = past.select("stay_id", "s", pl.col("value").alias(name), recorded=pl.lit(True))
        back = round(BACK_H[name] * 3600)
        joined = at.join_asof(past, on="s", by="stay_id", tolerance=back, check_sortedness=False)
        return joined.filter("recorded").drop("recorded")

    def named(at: pl.LazyFrame, concept: str, value: pl.Expr) -> pl.LazyFrame:
        inside = value.is_between(CONCEPTS[concept].low, CONCEPTS[concept].high)
        return at.with_columns(concept=pl.lit(concept, CONCEPT), value=pl.when(inside).then(value)).select(
            EVENTS.names()
        )

    pulse = of("spo2").drop_nulls("value").group_by("stay_id").agg(first=pl.col("s").min())
    # not "in stays without SpO2": whether a stay will have some is not known yet
    is_before = pl.col("first").is_null() | (pl.col("s") < pl.col("first"))
    blood = of("sao2").join(pulse, "stay_id", "left").filter(is_before).drop("first")
    oxygen = pl.concat([of("spo2"), blood]).sort("s", "value")
    gases = with_latest(of("pao2"), of("fio2"), "fio2")
    pressures = with_latest(of("plateau"), of("peep"), "peep")
    observed = of("tidal_volume").with_columns(set=pl.lit(False))
    # of several records at one time, usable ones sort last, and among those the observed volume
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
