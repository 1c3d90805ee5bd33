"""Labels: when hypoxaemic respiratory failure begins, by the oxygenation criteria of three definitions.

    ahrf                 first PaO2/FiO2 <= 300 mmHg on mechanical ventilation; no PEEP, no persistence
    berlin-oxygenation   Berlin (JAMA 2012;307:2526): P/F <= 300 with PEEP >= 5 cmH2O on invasive ventilation, as a
                         computable phenotype: another qualifying gas 8 to 24 h later, onsets before 6 h are prevalent
    global-2023          the global definition of 2023: P/F <= 300, or SpO2/FiO2 <= 315 where SpO2 <= 97 %, with PEEP or
                         CPAP >= 5 cmH2O, invasive or not, or oxygen at 30 L/min and more

The data has neither imaging nor notes, so none of them is adjudicated ARDS. Every window is a parameter of `Label`.
PhysioNet 2012 set a, `ahrf`: 741 / 390 / 189 onsets within 24 h after landmark 6 / 12 / 24 h, of which 422 / 189 / 47
persist (tests/unit/data/icu/test_prepare_icu.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import polars as pl

from raylab.data.icu.concepts import charted, charted_ratio
from raylab.errors import UsageError, unknown

TITLE = "AHRF / oxygenation criteria of ARDS (not adjudicated ARDS: no imaging, no notes)"
SLACK_H = 2.0  # a stay whose last record lies so near the end of the horizon was seen to its end
WITHIN = 16.0  # h: a persisting gas lies in (t0 + persist_h, t0 + persist_h + WITHIN]
GRADES = ("mild", "moderate", "severe")
SEVERITY = {"pf": (300.0, 200.0, 100.0), "sf": (315.0, 235.0, 148.0)}  # of GRADES: at or below


@dataclass(frozen=True)
class Framing:
    """When is predicted, and what counts.

    `landmark`  h: prediction at it (framing "landmark"), or from it on every hour until onset or the last record, at
                most until `until` ("rolling"). The model looks back `landmark` hours in both.
    `gap`       h after the prediction that no onset may fall into: the row is then left out
    `horizon`   h after the gap in which onset counts
    """

    landmark: int = 12
    horizon: float = 24.0
    gap: float = 0.0
    kind: str = "landmark"
    until: int = 48

    def hours(self) -> int:
        """How many hours of features the rows together see."""
        return self.landmark if self.kind == "landmark" else self.until


@dataclass(frozen=True)
class Label:
    """One definition. Ratios in mmHg or %, windows in hours, pressures in cmH2O, flows in L/min; all inclusive.

    A gas (or SpO2) qualifies when its ratio is at or below the threshold and its support holds: ventilated by the
    latest record at most `vent_back_h` back, with PEEP at least `peep` at most `peep_back_h` back where that is asked
    for; or oxygen flow of at least `flow`. FiO2 is the latest at most `fio2_back_h` back.
    `ventilation` None asks for none. Values and ratios are compared as they are charted (`concepts.charted`). The label
    is defined for patients of `min_age` years and older, and for those of unknown age.
    """

    classes: ClassVar[tuple[str, str]] = ("no onset", "onset")
    has_onset: ClassVar[bool] = True
    """whether it begins at a time, within a horizon; else it is known at the end and is predicted once"""

    name: str
    version: int = 2  # 2: values compared as charted; what cannot be used ends the carry of the value before it
    pf: float = 300.0
    sf: float | None = None
    spo2_max: float = 97.0
    fio2_back_h: float = 8.0
    ventilation: str | None = "invasive"  # or "any": non-invasive too
    vent_back_h: float = 6.0
    peep: float | None = None
    peep_back_h: float = 8.0
    flow: float | None = None
    flow_back_h: float = 8.0
    persist_h: float = 0.0
    strict: bool = False  # no ratio above the threshold between onset and the gas that shows persistence
    prevalent_h: float = 0.0  # an onset earlier than this was there at admission: the stay is not at risk
    min_age: float = 18.0  # years; 0 for patients of every age

    def needs(self) -> tuple[str, ...]:
        """Concepts without which the label cannot be made."""
        return (
            *(("pao2",) if self.sf is None else ()),
            "fio2",
            *(("mech_vent",) if self.ventilation else ()),
            *(("peep",) if self.peep is not None else ()),
        )

    def reads(self) -> tuple[str, ...]:
        """All concepts that the label looks at, needed or not."""
        return (
            "pao2",
            *(("spo2",) if self.sf is not None else ()),
            "fio2",
            *(("mech_vent",) if self.ventilation else ()),
            *(("niv",) if self.ventilation == "any" else ()),
            *(("peep",) if self.peep is not None else ()),
            *(("o2_flow",) if self.flow is not None else ()),
        )

    def exclude(self, stays: pl.DataFrame, framing: Framing) -> Iterator[tuple[str, pl.DataFrame]]:
        """(step, stays left) after each exclusion of those who are not at risk at the (first) prediction."""
        onset, landmark = pl.col("onset_h"), framing.landmark
        if self.prevalent_h:
            stays = stays.filter(onset.is_null() | (onset >= self.prevalent_h))
            yield f"no onset before {self.prevalent_h:g} h, there at admission", stays
        stays = stays.filter(onset.is_null() | (onset > landmark))
        yield f"no onset at or before {landmark:g} h", stays
        if framing.gap and framing.kind == "landmark":
            stays = stays.filter(onset.is_null() | (onset > landmark + framing.gap))
            yield f"no onset in the gap of {framing.gap:g} h", stays

    def rows(self, stays: pl.DataFrame, framing: Framing) -> pl.DataFrame:
        """One row a stay at risk and time of prediction: `at_h`, `label`, `outcome`."""
        if framing.kind == "landmark":
            rows = stays.with_columns(at_h=pl.lit(float(framing.landmark)))
        else:
            last = pl.min_horizontal(pl.col("last"), pl.col("onset_h"), pl.lit(float(framing.until) + 1e-9))
            count = (last - framing.landmark).ceil().clip(0).cast(pl.Int64)  # times strictly before `last`
            rows = stays.with_columns(at_h=pl.int_ranges(framing.landmark, framing.landmark + count)).explode("at_h")
            rows = rows.drop_nulls("at_h").with_columns(pl.col("at_h").cast(pl.Float64))
        begin, end = pl.col("at_h") + framing.gap, pl.col("at_h") + framing.gap + framing.horizon
        onset = pl.col("onset_h")
        rows = rows.filter(onset.is_null() | (onset > begin))
        ended = pl.col("end_h") <= end
        outcome = (
            pl.when((onset <= end).fill_null(False))
            .then(pl.lit("onset"))
            .when((ended & (pl.col("end") == "death")).fill_null(False))
            .then(pl.lit("death before onset"))
            .when((ended & (pl.col("end") == "discharge")).fill_null(False))
            .then(pl.lit("discharge before onset"))
            .when(onset.is_null() & (pl.col("last") < end - SLACK_H))
            .then(pl.lit("records end before the horizon does"))
            .otherwise(pl.lit("no onset within the horizon"))
        )
        return rows.with_columns(outcome=outcome, label=(outcome == "onset").cast(pl.Int8))

    def without_ventilation(self) -> "Label":
        """The same for a source that records ventilation of nobody."""
        return replace(self, ventilation=None)

    def describe(self, landmark: float, horizon: float, gap: float = 0) -> dict[str, Any]:
        """What meta.json says about the label."""
        ratio = f"PaO2/FiO2 <= {self.pf:g} mmHg"
        if self.sf is not None:
            ratio += f" or SpO2/FiO2 <= {self.sf:g} where SpO2 <= {self.spo2_max:g} %"
        support = [f"the latest FiO2 at most {self.fio2_back_h:g} h back"]
        if self.ventilation:
            kind = (
                "mechanical ventilation" if self.ventilation == "invasive" else "invasive or non-invasive ventilation"
            )
            support.append(f"{kind} recorded at most {self.vent_back_h:g} h back")
        else:
            support.append("ventilation not asked for")
        if self.peep is not None:
            support.append(f"PEEP >= {self.peep:g} cmH2O at most {self.peep_back_h:g} h back")
        if self.flow is not None:
            support.append(f"or oxygen at {self.flow:g} L/min and more at most {self.flow_back_h:g} h back")
        last = self.persist_h + WITHIN
        persistence = f"another after {self.persist_h:g} and at most {last:g} h" if self.persist_h else "no persistence"
        if self.persist_h and self.strict:
            persistence += " with none above in between"
        prevalent = f", none before {self.prevalent_h:g} h" if self.prevalent_h else ""
        return {
            "title": TITLE,
            "onset": f"first {ratio} with {' and '.join(support)}; {persistence}",
            "population": f"{self.min_age:g} years and older, or of unknown age" if self.min_age else "every age",
            "at_risk": f"no onset at or before {landmark:g} h{prevalent} and at least one record beyond it",
            "positive": f"onset after {landmark + gap:g} h and at most {landmark + gap + horizon:g} h after the start "
            "of the stay",
            "persistence": self.persist_h > 0,
            **asdict(self),
        }


LABELS = {
    label.name: label
    for label in (
        Label("ahrf"),
        Label("berlin-oxygenation", vent_back_h=8.0, peep=5.0, persist_h=8.0, prevalent_h=6.0),
        Label("global-2023", sf=315.0, ventilation="any", vent_back_h=8.0, peep=5.0, flow=30.0),
    )
}
GRID_FIO2 = (2.0, 4.0, 8.0)  # h
GRID_PERSIST = (0.0, 8.0, 24.0)  # h


def label(name: str, settings: Mapping[str, Any] | None = None, among: Mapping[str, Label] = LABELS) -> Label:
    """The label `name` of those there are, with some of its windows set; UsageError for a wrong name or value."""
    if name not in among:
        raise unknown("label", name, among)
    known = {field: kind for field, kind in asdict(among[name]).items() if field not in {"name", "version"}}
    for field, value in (settings or {}).items():
        if field not in known:
            raise unknown("label parameter", field, known)
        optional = field in {"sf", "peep", "flow", "ventilation"}
        if field == "ventilation":
            fits = value in (None, "invasive", "any")
        elif field == "strict":
            fits = isinstance(value, bool)
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = (value is None and optional) or (number and value >= 0)
        if not fits:
            raise UsageError(
                f"label parameter {field} cannot be {value!r}", do="hours and thresholds are numbers from 0"
            )
    return replace(among[name], **(settings or {}))


def restore_label(description: Mapping[str, Any], among: Mapping[str, Label] = LABELS) -> Label:
    """The label that `Label.describe` has described; UsageError for a name that is not among those there are."""
    name = description["name"]
    if name not in among:
        raise unknown("label", name, among)
    fields = asdict(among[name]).keys() & description.keys()
    return replace(among[name], **{field: description[field] for field in fields})


def ratios(events: pl.LazyFrame, rule: Label) -> pl.LazyFrame:
    """Every gas, and SpO2 where the label asks for it, with an FiO2: stay_id, time (h), kind (pf, sf), ratio, vent,
    support (bool: what the label asks for beside the ratio).

    `events` are plausible values in the units of `concepts`; a null is a value that was recorded and cannot be used: it
    ends the carry of the one before, so that there is no ratio until the next valid FiO2. Of several values of a
    concept at one time the largest counts, so that the result does not depend on the order of the rows. Times are
    compared as whole seconds, values and ratios as charted: "exactly 8 h back" and "exactly 300" must not hang on a
    float.
    """
    seconds = (pl.col("time") * 3600).round().cast(pl.Int64)

    def values(concepts: list[str], name: str) -> pl.LazyFrame:
        rows = events.filter(pl.col("concept").is_in(concepts)).select("stay_id", "time", pl.col("value").alias(name))
        return rows.with_columns(seconds.alias("s")).sort("s", name)  # nulls first: at one time a value counts

    def latest(rows: pl.LazyFrame, concepts: list[str], name: str, hours: float) -> pl.LazyFrame:
        past = values(concepts, name).drop("time")
        # both sides are sorted by time, and so within each stay: polars cannot see that itself
        return rows.join_asof(past, on="s", by="stay_id", tolerance=round(hours * 3600), check_sortedness=False)

    gases = values(["pao2"], "value").drop_nulls("value").with_columns(kind=pl.lit("pf"))
    if rule.sf is not None:
        pulse = values(["spo2"], "value").filter(charted(pl.col("value"), "spo2") <= rule.spo2_max)
        pulse = pulse.with_columns(kind=pl.lit("sf"))
        gases = pl.concat([gases, pulse]).sort("s", "value")
    gases = latest(gases, ["fio2"], "fio2", rule.fio2_back_h).filter(pl.col("fio2").is_not_null())
    gases = latest(gases, ["mech_vent"], "mech_vent", rule.vent_back_h)
    vent = (pl.col("mech_vent") == 1).fill_null(False)
    held = vent
    if rule.ventilation == "any":
        gases = latest(gases, ["niv"], "niv", rule.vent_back_h)
        held = vent | (pl.col("niv") == 1).fill_null(False)
    support = held if rule.ventilation else pl.lit(True)
    if rule.peep is not None:
        gases = latest(gases, ["peep"], "peep", rule.peep_back_h)
        support = support & (charted(pl.col("peep"), "peep") >= rule.peep).fill_null(False)
    if rule.flow is not None:
        gases = latest(gases, ["o2_flow"], "flow", rule.flow_back_h)
        support = support | (charted(pl.col("flow"), "o2_flow") >= rule.flow).fill_null(False)
    parts = charted_ratio(pl.col("value"), pl.col("fio2"), "pf"), charted_ratio(pl.col("value"), pl.col("fio2"), "sf")
    ratio = pl.when(pl.col("kind") == "pf").then(parts[0]).otherwise(parts[1])
    return gases.select("stay_id", "time", "s", "kind", ratio=ratio, vent=vent, support=support)


def first_onset(found: pl.LazyFrame, rule: Label) -> pl.LazyFrame:
    """stay_id, onset_h of every stay that meets the definition; `found` from `ratios` with the same rule.

    t0 is the first qualifying ratio of the stay. Where persistence is asked for, a stay whose t0 is not followed by
    another qualifying one in (t0 + persist_h, t0 + persist_h + 16 h] has no onset.
    """
    limit = pl.when(pl.col("kind") == "pf").then(rule.pf).otherwise(rule.sf)
    low = pl.col("ratio") <= limit
    met = found.with_columns(low=low).filter(pl.col("support") & pl.col("low"))
    first = met.group_by("stay_id").agg(onset_h=pl.col("time").min(), t0=pl.col("s").min())
    if not rule.persist_h:
        return first.select("stay_id", "onset_h")
    after, last = (round(hours * 3600) for hours in (rule.persist_h, rule.persist_h + WITHIN))
    later = met.join(first, "stay_id").filter(
        (pl.col("s") > pl.col("t0") + after) & (pl.col("s") <= pl.col("t0") + last)
    )
    shown = later.group_by("stay_id").agg(
        onset_h=pl.col("onset_h").first(), t0=pl.col("t0").first(), s=pl.col("s").min()
    )
    if rule.strict:
        above = found.with_columns(low=low).filter(~pl.col("low")).select("stay_id", high="s")
        broken = above.join(shown, "stay_id").filter((pl.col("high") > pl.col("t0")) & (pl.col("high") < pl.col("s")))
        shown = shown.join(broken.select("stay_id").unique(), "stay_id", "anti")
    return shown.select("stay_id", "onset_h")


def severity(found: pl.LazyFrame, onsets: pl.LazyFrame) -> pl.LazyFrame:
    """stay_id, severity (mild, moderate, severe) of the ratio at each stay's onset."""
    at = found.join(onsets, "stay_id").filter((pl.col("time") == pl.col("onset_h")) & pl.col("support"))

    def grade(kind: str) -> pl.Expr:
        _, moderate, severe = SEVERITY[kind]
        below = pl.when(pl.col("ratio") <= severe).then(2).when(pl.col("ratio") <= moderate).then(1).otherwise(0)
        return pl.when(pl.col("kind") == kind).then(below)

    worst = at.group_by("stay_id").agg(grade=pl.coalesce(grade("pf"), grade("sf")).max())
    return worst.select(
        "stay_id",
        severity=pl.col("grade").replace_strict(dict(enumerate(GRADES)), return_dtype=pl.String),
    )


def sensitivity(rule: Label) -> list[Label]:
    """The same label over the grid of windows that its onset counts are shown for."""
    return [replace(rule, fio2_back_h=fio2, persist_h=persist) for fio2 in GRID_FIO2 for persist in GRID_PERSIST]
