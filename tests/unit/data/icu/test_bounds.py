"""At every bound of every concept and label a value reads the same as float32, float64 and decimal.

The oracle is decimal arithmetic: six significant digits (what float32 holds), then the concept's precision, a half away
from zero.
"""

from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylab.data.icu.concepts import CONCEPTS, DERIVED, EVENTS, charted, charted_ratio
from raylab.data.icu.derive import derive_series
from raylab.data.icu.labels import SEVERITY, first_onset, label, ratios, severity
from raylab.data.icu.patient_batch import screen

SPELLINGS = {"float32": lambda x: float(np.float32(float(x))), "float64": float, "decimal": lambda x: float(str(x))}


def significant(value: Decimal) -> Decimal:
    return value.quantize(Decimal(1).scaleb(value.adjusted() - 5), ROUND_HALF_UP) if value else value


def rounded(value: Decimal, precision: float) -> Decimal:
    return significant(value).quantize(Decimal(str(precision)), ROUND_HALF_UP)


def exact(number: float) -> Decimal:
    return Decimal(str(number))


def expected(name: str, value: Decimal) -> Decimal | None:
    """The value that screening keeps, None where it is set missing."""
    concept = CONCEPTS[name]
    if name == "fio2":
        if value > Decimal("1.5") and rounded(value / 100, concept.precision) >= Decimal("0.2"):
            value = value / 100
        if Decimal("0.2") <= rounded(value, concept.precision) <= Decimal("0.21"):
            value = Decimal("0.21")
    low, high = exact(concept.low), exact(concept.high)
    return min(max(value, low), high) if low <= rounded(value, concept.precision) <= high else None


def screened(values: Iterable[tuple[str, Decimal]]) -> pl.DataFrame:
    """Every value in every spelling, with what screening keeps of it; one stay a value."""
    rows = [
        (f"{k}", kind, 1.0, name, spell(value))
        for k, (name, value) in enumerate(values)
        for kind, spell in SPELLINGS.items()
    ]
    _, unique = screen(pl.LazyFrame(rows, schema=EVENTS, orient="row"))
    return unique.collect()


def check(values: list[tuple[str, Decimal]]) -> None:
    kept = {(row["subject_id"], row["stay_id"]): row["value"] for row in screened(values).iter_rows(named=True)}
    for k, (name, value) in enumerate(values):
        wanted = expected(name, value)
        for kind in SPELLINGS:
            found = kept[f"{k}", kind]
            assert (found is None) == (wanted is None), (name, value, kind, found)
            assert wanted is None or found == pytest.approx(float(wanted), rel=1e-6, abs=1e-9), (name, value, kind)


def around(bound: float, precision: float, twentieths: int) -> Decimal:
    """Near a bound, with as many digits as float32 holds."""
    return significant(exact(bound) + twentieths * exact(precision) / 20)


def test_every_bound_of_every_concept():
    """In twentieths of the precision, so that the halves are among them."""
    check(
        [
            (name, around(bound, concept.precision, k))
            for name, concept in CONCEPTS.items()
            for bound in (concept.low, concept.high)
            for k in range(-30, 31)
        ]
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(CONCEPTS)), st.booleans(), st.integers(-10_000, 10_000)),
        min_size=40,
        max_size=80,
    )
)
def test_drawn_values_around_the_bounds(drawn):
    check(
        [
            (name, around(CONCEPTS[name].high if high else CONCEPTS[name].low, CONCEPTS[name].precision, k))
            for name, high, k in drawn
        ]
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 110_000), min_size=40, max_size=80))
def test_drawn_fio2(thousandths):
    """Fractions, litres and percentages."""
    check([("fio2", Decimal(n) / 1000) for n in thousandths])


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("0.199", None), ("0.2", 0.21), ("0.205", 0.21), ("0.209", 0.21), ("0.2093", 0.21), ("0.2095", 0.21),
        ("0.21", 0.21), ("0.211", 0.211), ("1", 1), ("1.0004", 1), ("1.1", None), ("2", None), ("6", None),
        ("15", None), ("19", None), ("19.9", None), ("20", 0.21), ("20.9", 0.21), ("20.93", 0.21), ("20.95", 0.21),
        ("21", 0.21), ("21.5", 0.215), ("22", 0.22), ("100", 1), ("100.04", 1), ("101", None), ("0", None),
    ],
)  # fmt: skip
def test_room_air_litres_and_percent(value, kept):
    rows = screened([("fio2", Decimal(value))])
    assert rows["value"].to_list() == pytest.approx([kept] * 3) if kept else rows["value"].to_list() == [None] * 3
    assert rows["problem"].to_list() == [None if kept else "out of range"] * 3
    assert set(rows["room_air"]) == {
        value in ("0.2", "0.205", "0.209", "0.2093", "0.2095", "20", "20.9", "20.93", "20.95")
    }


# ratios: whatever the fraction, a PaO2 of exactly 300, 200 or 100 times it

FRACTIONS = [Decimal(n) / 100 for n in range(21, 101)]


def gases(pairs: list[tuple[str, Decimal, Decimal]], spell: object) -> pl.LazyFrame:
    """One ventilated stay a pair (concept, value, FiO2), on PEEP 5."""
    rows = [
        (f"{k}", f"{k}", hour, concept, spell(value))
        for k, (name, value, fio2) in enumerate(pairs)
        for hour, concept, value in ((9.0, "mech_vent", Decimal(1)), (9.0, "peep", Decimal(5)), (9.0, "fio2", fio2),
                                     (10.0, name, value))
    ]  # fmt: skip
    return pl.LazyFrame(rows, schema=EVENTS, orient="row")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("threshold", SEVERITY["pf"])
def test_exactly_at_a_threshold_of_pf(spelling, threshold):
    pairs = [("pao2", exact(threshold) * fio2, fio2) for fio2 in FRACTIONS]
    rule = label("ahrf", {"pf": threshold})
    for step, n in (("0", len(pairs)), ("-0.1", len(pairs)), ("0.1", 0)):
        shifted = [(name, (exact(threshold) + Decimal(step)) * fio2, fio2) for name, _, fio2 in pairs]
        _, unique = screen(gases(shifted, SPELLINGS[spelling]))
        found = ratios(unique.collect().lazy(), rule)
        assert first_onset(found, rule).collect().height == n, step
    found = ratios(gases(pairs, SPELLINGS[spelling]), rule)
    grade = {300.0: "mild", 200.0: "moderate", 100.0: "severe"}[threshold]
    assert set(found.collect()["ratio"]) == {threshold}
    assert set(severity(found, first_onset(found, rule)).collect()["severity"]) == {grade}
    series = derive_series(gases(pairs, SPELLINGS[spelling])).collect()
    assert set(series.filter(pl.col("concept") == "pf")["value"]) == {threshold}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("threshold", SEVERITY["sf"])
def test_exactly_at_a_threshold_of_sf(spelling, threshold):
    pairs = [
        ("spo2", exact(threshold) * fio2, fio2) for fio2 in FRACTIONS if 20 <= exact(threshold) * fio2 < Decimal("97.5")
    ]
    rule = label("global-2023", {"sf": threshold})
    found = ratios(gases(pairs, SPELLINGS[spelling]), rule)
    assert len(pairs) > 5 and set(found.collect()["ratio"]) == {threshold}
    assert first_onset(found, rule).collect().height == len(pairs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(150, 8000), st.integers(210, 1000)), min_size=40, max_size=80))
def test_drawn_ratios(drawn):
    """PaO2 in tenths of mmHg, FiO2 in thousandths."""
    table = pl.DataFrame(
        {
            f"{what}_{kind}": [spell(Decimal(pair[k]) / scale) for pair in drawn]
            for k, (what, scale) in enumerate((("pao2", 10), ("fio2", 1000)))
            for kind, spell in SPELLINGS.items()
        }
    )
    found = table.select(
        charted_ratio(pl.col(f"pao2_{kind}"), pl.col(f"fio2_{kind}"), "pf").alias(kind) for kind in SPELLINGS
    )
    wanted = [float(rounded(Decimal(pao2) / 10 / (Decimal(fio2) / 1000), 0.1)) for pao2, fio2 in drawn]
    for kind in SPELLINGS:
        assert found[kind].to_list() == wanted


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("name", "concept", "value", "met"),
    [
        ("berlin-oxygenation", "peep", "5", True), ("berlin-oxygenation", "peep", "4.96", True),
        ("berlin-oxygenation", "peep", "4.9", False), ("global-2023", "o2_flow", "30", True),
        ("global-2023", "o2_flow", "29.96", True), ("global-2023", "o2_flow", "29.9", False),
        ("global-2023", "spo2", "97", True), ("global-2023", "spo2", "97.4", True),
        ("global-2023", "spo2", "97.5", False),
    ],
)  # fmt: skip
def test_support_at_its_bounds(spelling, name, concept, value, met):
    rows = {"mech_vent": "1", "peep": "5", "fio2": "0.35", "pao2": "500", concept: value}
    if concept == "o2_flow":
        rows |= {"mech_vent": "0", "peep": "0"}
    rows |= {} if concept == "spo2" else {"pao2": "70"}
    spell = SPELLINGS[spelling]
    times = {"pao2": 10.0, "spo2": 10.0}
    events = pl.LazyFrame(
        [("p", "s", times.get(c, 9.0), c, spell(Decimal(v))) for c, v in rows.items()], schema=EVENTS, orient="row"
    )
    rule = label(name, {"persist_h": 0})
    assert first_onset(ratios(events, rule), rule).collect().height == met


def test_what_rounding_alone_lets_in_is_at_the_bound():
    rows = screened([("spo2", Decimal("100.3")), ("peep", Decimal("40.04")), ("ph", Decimal("6.496"))])
    assert rows.sort("subject_id")["value"].to_list() == [100.0] * 3 + [40.0] * 3 + [6.5] * 3


@pytest.mark.parametrize("name", [*DERIVED, "fio2", "temp"])
def test_charted_values_are_the_floats_nearest_to_their_decimals(name):
    concept = CONCEPTS[name]
    numbers = [concept.low + k * concept.precision for k in range(500)]
    table = pl.DataFrame({"v": numbers}).select(charted(pl.col("v"), name))
    assert table["v"].to_list() == [float(rounded(exact(number), concept.precision)) for number in numbers]
