"""The label `ahrf`: acute hypoxaemic respiratory failure, the oxygenation criteria of ARDS.

Onset is the first arterial PaO2 / FiO2 at or below 300 mmHg (Berlin definition, JAMA 2012;307:2526: mild or worse)
whose FiO2 is the latest recorded at most 8 h back and with mechanical ventilation recorded at most 6 h back. No
persistence is asked for. The data has neither imaging nor notes, so this is never adjudicated ARDS.

PhysioNet 2012 set a: 742 / 390 / 189 onsets within 24 h after landmark 6 / 12 / 24 h (tests/unit/data/test_icu.py).
"""

from dataclasses import asdict, dataclass
from typing import Any

import polars as pl


@dataclass(frozen=True)
class Ahrf:
    """Thresholds of the definition: P/F in mmHg, windows in hours, all inclusive."""

    pf: float = 300.0
    fio2_back_h: float = 8.0
    vent_back_h: float = 6.0

    def describe(self, landmark: float, horizon: float) -> dict[str, Any]:
        """What meta.json says about the label."""
        return {
            "name": "ahrf",
            "title": "AHRF / oxygenation criteria of ARDS (not adjudicated ARDS: no imaging, no notes)",
            "onset": f"first PaO2/FiO2 <= {self.pf:g} mmHg with the latest FiO2 at most {self.fio2_back_h:g} h back "
            f"and mechanical ventilation recorded at most {self.vent_back_h:g} h back; no persistence",
            "at_risk": f"no onset at or before {landmark:g} h and at least one record beyond it",
            "positive": f"onset after {landmark:g} h and at most {landmark + horizon:g} h after the start of the stay",
            "persistence": False,
            **asdict(self),
        }


def pf_ratios(events: pl.LazyFrame, rule: Ahrf | None = None) -> pl.LazyFrame:
    """Every arterial gas with an FiO2: stay_id, time (h), pf (mmHg), vent (bool).

    `events` are plausible values in the units of `concepts`. Of several FiO2 at one time the largest counts, so that
    the result does not depend on the order of the rows. Times are compared as whole seconds and P/F to 1e-6:
    "exactly 8 h back" and "exactly 300" must not hang on a float.
    """
    rule = rule or Ahrf()
    seconds = (pl.col("time") * 3600).round().cast(pl.Int64)

    def values(concept: str, name: str) -> pl.LazyFrame:
        rows = events.filter(pl.col("concept") == concept).select("stay_id", "time", pl.col("value").alias(name))
        return rows.with_columns(seconds.alias("s")).sort("s", name)

    def latest(rows: pl.LazyFrame, concept: str, name: str, hours: float) -> pl.LazyFrame:
        past = values(concept, name).drop("time")
        # both sides are sorted by time, and so within each stay: polars cannot see that itself
        return rows.join_asof(past, on="s", by="stay_id", tolerance=round(hours * 3600), check_sortedness=False)

    gases = latest(values("pao2", "pao2"), "fio2", "fio2", rule.fio2_back_h)
    gases = latest(gases, "mech_vent", "mech_vent", rule.vent_back_h)
    return gases.filter(pl.col("fio2").is_not_null()).select(
        "stay_id",
        "time",
        pf=(pl.col("pao2") / pl.col("fio2")).round(6),
        vent=(pl.col("mech_vent") == 1).fill_null(False),
    )


def first_onset(ratios: pl.LazyFrame, rule: Ahrf | None = None) -> pl.LazyFrame:
    """stay_id, onset_h of every stay that meets the definition; `ratios` from `pf_ratios` with the same rule."""
    rule = rule or Ahrf()
    met = ratios.filter(pl.col("vent") & (pl.col("pf") <= rule.pf))
    return met.group_by("stay_id").agg(onset_h=pl.col("time").min())
