"""The steps of preparation on small tables, whole preparations of virtual patients, and the published counts on real
data where it is there (RAYLAB_DATA, or ../shared/data beside the repository)."""

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from raylab.data import prepared
from raylab.data.icu import prepare
from raylab.data.icu.cohorts import Framing, attrition
from raylab.data.icu.concepts import (
    CONCEPTS,
    EVENTS,
    ID_SOURCES,
    SERIES,
    STATIC,
    STAYS,
    SourceData,
    by_id,
    whole_stays,
)
from raylab.data.icu.derive import derive_series
from raylab.data.icu.labels import label
from raylab.data.icu.meta import IcuMeta
from raylab.data.icu.patient_batch import screen, summarise_patients
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.sources import synthetic
from raylab.data.icu.timegrid import first_values, grid, hourly_cells, statistics
from raylab.errors import DataError, UsageError
from raylab.files import IGNORE_FILES
from raylab.tasks import mortality

DATA = Path(os.environ.get("RAYLAB_DATA") or Path(__file__).parents[5] / "shared" / "data") / "icu"


def table(*rows: tuple[str, float, str, float]) -> pl.LazyFrame:
    return pl.LazyFrame(
        [(stay, stay, float(time), concept, value) for stay, time, concept, value in rows], schema=EVENTS, orient="row"
    )


def use(monkeypatch: pytest.MonkeyPatch, events: pl.LazyFrame, stays: pl.DataFrame | None = None) -> None:
    """Make `events` what the source "synthetic" yields."""
    if stays is None:
        ids = events.select("stay_id", "subject_id").unique(maintain_order=True).collect()
        stays = ids.with_columns(source=pl.lit("test"), died=pl.lit(None)).select(STAYS.names()).cast(STAYS)
    monkeypatch.setitem(prepare.SOURCES, "synthetic", lambda raw: SourceData(events, stays))


def virtual(patients: int = 200) -> pl.LazyFrame:
    return synthetic.read(patients, 0).events


# the steps


def test_concepts_cover_physionet_2012_and_ids_are_unique():
    assert len(by_id("physionet2012")) == 37 + 4  # series, and Age, Gender, Height, ICUType
    for source in ID_SOURCES:
        ids = [item for concept in CONCEPTS.values() for item in concept.ids[source]]
        assert len(ids) == len(set(ids))
    assert set(SERIES) | set(STATIC) == set(CONCEPTS)


def test_screen_counts_what_it_removes():
    present, unique = screen(
        table(
            ("a", 1, "hr", 80),
            ("a", 1, "hr", 80),  # exact duplicate
            ("a", 1, "hr", 81),  # another value at the same time stays
            ("a", -0.5, "hr", 80),
            ("a", 2, "tidal_volume", 585573),
            ("a", 2, "temp", float("nan")),
            ("a", 2, "map", float("inf")),
            ("a", 3, "fio2", 50),
            ("a", 4, "fio2", 0),
        )
    )
    assert present.collect().height == 9
    text = unique.with_columns(pl.col("concept").cast(pl.String))
    rows = text.sort("time", "concept", "value").select("time", "concept", "value").collect().rows()
    assert rows == [
        (1, "hr", 80),
        (1, "hr", 81),
        (2, "map", None),
        (2, "temp", None),
        (2, "tidal_volume", None),
        (3, "fio2", 0.5),
        (4, "fio2", None),
    ]


def test_grid_holds_last_value_mask_and_time_since():
    cells = hourly_cells(
        table(
            ("a", 0.25, "hr", 80),
            ("a", 0.5, "hr", 90),
            ("a", 2.0, "hr", 70),  # the second hour ends before 2.0
            ("a", 1.0, "urine", 100),
            ("a", 1.5, "urine", 50),
            ("b", 1.0, "hr", 60),
            ("c", 1.0, "lactate", 2),  # not asked for
            ("a", 0, "age", 50),  # not a series
        )
    ).collect()
    rows = grid(cells, pl.Series("stay_id", ["b", "a"]), 3)
    assert rows.columns == [
        "stay_id", "hour", "hr", "hr__mask", "hr__since", "urine", "urine__mask", "urine__since"
    ]  # fmt: skip
    assert rows.rows() == [
        ("b", 0, None, False, None, None, False, None),
        ("b", 1, 60, True, 1, None, False, None),
        ("b", 2, None, False, 2, None, False, None),
        ("a", 0, 90, True, 0.5, None, False, None),
        ("a", 1, None, False, 1.5, 150, True, 0.5),
        ("a", 2, 70, True, 1, None, False, 1.5),
    ]


def test_what_cannot_be_used_ends_the_carry_of_its_concept():
    _, unique = screen(
        table(
            ("a", 0.5, "hr", 80),
            ("a", 2.5, "hr", 999),  # of these nothing is known
            ("a", 4.5, "hr", 90),
            ("b", 0.25, "hr", 70),  # measured in the hour, and known in it
            ("b", 0.75, "hr", 0),
            ("c", 0.25, "hr", 0),
            ("c", 0.75, "hr", 60),
            ("a", 1.5, "urine", 9999),
            ("a", 1.6, "urine", 50),
            ("a", 2.5, "urine", 9999),
            ("b", 0.5, "map", 70),  # another concept goes on
        )
    )
    cells = hourly_cells(unique.select(EVENTS.names())).collect()
    rows = grid(cells, pl.Series("stay_id", ["a", "b", "c"]), 6)

    def of(stay: str, name: str) -> list[tuple]:
        return rows.filter(pl.col("stay_id") == stay).select(name, f"{name}__mask", f"{name}__since").rows()

    nothing = (None, False, None)
    assert of("a", "hr") == [(80, True, 0.5), (None, False, 1.5), nothing, nothing, (90, True, 0.5), (None, False, 1.5)]
    assert of("b", "hr") == [(70, True, 0.75), *[nothing] * 5] and of("c", "hr")[:2] == [
        (60, True, 0.25), (None, False, 1.25)
    ]  # fmt: skip
    assert of("a", "urine")[:4] == [nothing, (50, True, pytest.approx(0.4)), nothing, nothing]
    assert [since for *_, since in of("b", "map")] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_what_cannot_be_used_ends_the_carry_of_what_is_made_of_it():
    _, unique = screen(
        table(
            ("a", 1, "fio2", 0.5), ("a", 2, "pao2", 100), ("a", 3, "fio2", 4), ("a", 4, "pao2", 90),
            ("a", 5, "fio2", 0.5), ("a", 6, "pao2", 90), ("a", 7, "pao2", 5),
            ("b", 1, "pao2", 100),  # no FiO2 at all: nothing was recorded of P/F
            ("c", 1, "peep", 5), ("c", 1, "plateau", 20), ("c", 1, "tidal_volume_set", 450),
            ("c", 1, "tidal_volume", 5000), ("c", 2, "plateau", 4), ("c", 3, "peep", 99), ("c", 4, "plateau", 20),
        )
    )  # fmt: skip
    rows = derive_series(unique.select(EVENTS.names())).sort("stay_id", "time").collect()
    found = {name: rows.filter(pl.col("concept") == name)["time", "value"].rows() for name in rows["concept"].unique()}
    assert found == {
        "pf": [(2, 200), (4, None), (6, 180), (7, None)],
        "driving_pressure": [(1, 15), (2, None), (4, None)],
        "compliance": [(1, 30), (2, None), (4, None)],
    }


def test_static_values_are_the_first():
    rows = first_values(
        table(("a", 0, "age", 50), ("a", 0, "height", None), ("a", 3, "height", 170), ("a", 5, "height", 171))
    ).collect()
    assert rows.select("age", "height", "sex").rows() == [(50, 170, None)]


def test_statistics_are_over_measured_values():
    rows = pl.DataFrame({"hr": [60.0, None, 80.0], "map": pl.Series([None] * 3, dtype=pl.Float64)})
    assert statistics(rows, ("hr", "map", "temp")) == {"hr": {"mean": 70.0, "std": 10.0, "n": 2}}


def test_attrition_counts_stays_and_patients():
    stays = pl.DataFrame(
        {
            "subject_id": ["p", "p", "q", "r", "s"],
            "stay_id": list("abcde"),
            "onset_h": [12.0, 12.1, None, None, None],
            "last": [40.0, 40.0, 12.0, None, 12.1],
            "age": [None] * 5,
        }
    )
    kept, steps = attrition(stays, Framing(12), label("ahrf"))
    assert kept["stay_id"].to_list() == ["b", "e"]
    assert [(patients, stays) for _, patients, stays in steps] == [(4, 5), (4, 5), (3, 4), (2, 3), (2, 2)]


# whole preparations


def test_prepare_publishes_checked_files(tmp_path):
    meta = prepare_icu("ards", "synthetic", None, tmp_path / "out")
    assert prepared.read_meta(tmp_path / "out", "ards", IcuMeta) == meta
    written = {p.name for p in (tmp_path / "out").iterdir()} - set(IGNORE_FILES)
    assert written == {"meta.json", "samples.parquet", "hours.parquet"}
    assert meta.synthetic is True and meta.source == "synthetic"
    rows = pl.read_parquet(tmp_path / "out" / "samples.parquet")
    hours = pl.read_parquet(tmp_path / "out" / "hours.parquet")
    assert hours.height == 12 * rows.height == 12 * meta.attrition[-1]["stays"]
    assert 0.15 <= rows["label"].mean() <= 0.25
    assert meta.split_hash == prepared.split_hash(list(rows.select("subject_id", "split").iter_rows()))
    assert meta.counts["train"]["positive"] == rows.filter(pl.col("split") == "train")["label"].sum()
    onset = rows["onset_h"]
    assert (rows["label"] == ((onset > 12) & (onset <= 36)).fill_null(False).cast(pl.Int8)).all()
    assert meta.statistics["hr"]["n"] == (
        hours.join(rows.filter(pl.col("split") == "train"), "stay_id", "semi")["hr__mask"].sum()
    )


def test_same_input_gives_the_same_files(tmp_path):
    first = prepare_icu("ards", "synthetic", None, tmp_path / "a", patients=150)
    again = prepare_icu("ards", "synthetic", None, tmp_path / "b", patients=150)
    assert first.data_hash == again.data_hash


def test_row_order_and_duplicates_do_not_matter(tmp_path, monkeypatch):
    events = virtual().collect()
    use(monkeypatch, events.lazy())
    first = prepare_icu("ards", "synthetic", None, tmp_path / "a")
    messy = pl.concat([events, events.head(7)]).sample(fraction=1, shuffle=True, seed=1)
    use(monkeypatch, messy.lazy())
    again = prepare_icu("ards", "synthetic", None, tmp_path / "b")
    assert first.data_hash == again.data_hash
    assert again.dropped["exact duplicate"] == 7


def test_data_do_not_depend_on_the_number_of_pieces(tmp_path, monkeypatch):
    events = virtual()
    use(monkeypatch, events)
    one = prepare_icu("ards", "synthetic", None, tmp_path / "a")
    whole = prepare.SOURCES["synthetic"](prepare.Raw(Path(), Path()))
    part = pl.col("stay_id").hash(seed=1) % 3
    pieces = tuple(events.filter(part == k) for k in range(3))
    monkeypatch.setitem(prepare.SOURCES, "synthetic", lambda raw: replace(whole, pieces=pieces))
    three = prepare_icu("ards", "synthetic", None, tmp_path / "b")
    assert one.data_hash == three.data_hash
    assert one.model_dump() == three.model_dump()


def test_nothing_at_or_after_the_landmark_becomes_a_feature(tmp_path, monkeypatch):
    events = virtual().collect()
    use(monkeypatch, events.lazy())
    prepare_icu("ards", "synthetic", None, tmp_path / "a")
    # from the landmark on: everything but what makes the label reads otherwise, and new statics appear
    later = (pl.col("time") >= 12) & ~pl.col("concept").is_in(["pao2", "fio2", "mech_vent"])
    other = events.with_columns(value=pl.when(later).then(pl.col("value") * 0.9).otherwise("value"))
    ids = events.select("subject_id", "stay_id").unique()
    extra = [
        ids.with_columns(time=pl.lit(time), concept=pl.lit(name), value=pl.lit(value)).select(EVENTS.names())
        for time, name, value in ((12.0, "hr", 200.0), (12.0, "height", 220.0), (30.0, "lactate", 30.0))
    ]
    use(monkeypatch, pl.concat([other, *extra]).lazy())
    prepare_icu("ards", "synthetic", None, tmp_path / "b")
    for name in ("hours.parquet", "samples.parquet"):
        assert pl.read_parquet(tmp_path / "a" / name).equals(pl.read_parquet(tmp_path / "b" / name))


def test_the_oximeter_after_the_landmark_does_not_choose_the_feature(tmp_path):
    before = table(("a", 1, "fio2", 0.5), ("a", 2, "sao2", 95), ("a", 20, "hr", 80))
    stays = whole_stays(pl.DataFrame({"stay_id": ["a"], "subject_id": ["a"], "source": ["test"], "died": [False]}))
    grids = [
        summarise_patients(events, stays, Framing(), label("ahrf"), False).table
        for events in (before, pl.concat([before, table(("a", 13, "spo2", 95))]))
    ]
    assert grids[0].equals(grids[1])
    assert grids[0]["sf"].drop_nulls().to_list() == [190]


def test_features_of_kept_stays_do_not_change_when_their_future_is_cut(tmp_path, monkeypatch):
    events = virtual().collect()
    use(monkeypatch, events.lazy())
    prepare_icu("ards", "synthetic", None, tmp_path / "a")
    use(monkeypatch, events.filter(pl.col("time") < 37).lazy())
    prepare_icu("ards", "synthetic", None, tmp_path / "b")
    for name in ("hours.parquet", "samples.parquet"):
        a, b = (pl.read_parquet(tmp_path / d / name).drop("onset_h", strict=False) for d in "ab")
        assert a.equals(b)


# bad input: explained, and nothing half-written


def refuses(tmp_path: Path, text: str, **options: object) -> str:
    with pytest.raises(DataError, match=text) as caught:
        prepare_icu("ards", "synthetic", None, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("name", ["pao2", "fio2", "mech_vent"])
def test_a_label_that_cannot_be_made(tmp_path, monkeypatch, name):
    use(monkeypatch, virtual().filter(pl.col("concept") != name))
    refuses(tmp_path, f"no plausible value of {name}")


def in_kpa(concept: str, share: float) -> pl.LazyFrame:
    """Virtual patients, of whom a share has this tension in kPa, though no row says so."""
    some = (pl.col("concept") == concept) & (pl.col("stay_id").hash(seed=0) % 100 < 100 * share)
    return virtual().with_columns(value=pl.when(some).then(pl.col("value") / 7.50062).otherwise("value"))


@pytest.mark.parametrize("share", [1, 0.15])
def test_a_pao2_in_kpa_that_no_unit_names_is_refused(tmp_path, monkeypatch, share):
    use(monkeypatch, in_kpa("pao2", share))
    assert "values are 30 mmHg or less, as values in kPa are" in refuses(tmp_path, "values of pao2 cannot be in")


def test_a_paco2_in_kpa_that_no_unit_names_is_left_out_and_said(tmp_path, monkeypatch):
    use(monkeypatch, in_kpa("paco2", 1))
    meta = prepare_icu("ards", "synthetic", None, tmp_path / "out")
    assert meta.left_out == ["paco2"] and "paco2" not in meta.features
    (warning,) = meta.warnings
    assert warning.startswith("paco2 is left out: ") and "as values in kPa are" in warning


@pytest.mark.parametrize(
    ("unfit", "left"),
    [
        ("pao2", {"sf", "driving_pressure", "compliance"}),
        ("fio2", {"driving_pressure", "compliance"}),
        ("peep", {"pf", "sf"}),
        ("tidal_volume", {"pf", "sf", "driving_pressure"}),
    ],
)
def test_nothing_is_derived_from_values_in_a_wrong_unit(tmp_path, monkeypatch, unfit, left):
    """A label that does not read them is made; `tidal_volume_set`, which could stand in, is not recorded."""
    factor = {"pao2": 0.133, "fio2": 10, "peep": 98.1, "tidal_volume": 0.001}[unfit]  # kPa, L/min, Pa, L
    scaled = pl.when(pl.col("concept") == unfit).then(pl.col("value") * factor).otherwise("value")
    stays = synthetic.read(200, 0).stays.with_columns(died=pl.col("stay_id").hash(seed=0) % 3 == 0)
    use(monkeypatch, virtual().filter(pl.col("concept") != "tidal_volume_set").with_columns(value=scaled), stays)
    rule = mortality.LABELS["in-hospital-death"]
    meta = prepare_icu("mortality", "synthetic", None, tmp_path / "out", rule=rule)
    assert meta.left_out == [unfit] and unfit not in meta.features
    table = pl.read_parquet(tmp_path / "out" / "hours.parquet")
    derived = {"pf", "sf", "driving_pressure", "compliance"}
    assert derived & set(table.columns) == derived & set(meta.features) == left


def test_only_implausible_values_are_no_values(tmp_path, monkeypatch):
    fio2 = pl.when(pl.col("concept") == "fio2").then(0.0).otherwise("value")
    use(monkeypatch, virtual().with_columns(value=fio2))
    refuses(tmp_path, "no plausible value of fio2")


def test_an_empty_cohort_names_the_exclusion(tmp_path, monkeypatch):
    use(monkeypatch, virtual().filter(pl.col("time") < 10))
    assert "all stays: 200 stays" in refuses(tmp_path, "empty after 'at least one record beyond 12 h'")


def test_one_class_only(tmp_path, monkeypatch):
    use(monkeypatch, virtual().filter((pl.col("concept") != "pao2") | (pl.col("time") < 12)))
    refuses(tmp_path, r"one class only: 0 of \d+ rows are positive")


def test_no_events_at_all(tmp_path, monkeypatch):
    use(monkeypatch, virtual().filter(pl.lit(False)))
    refuses(tmp_path, "no plausible value of pao2, fio2, mech_vent")


def test_raw_data_damaged_inside_is_explained(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    n = 10_000
    pl.DataFrame(
        {
            "subject_id": [str(i) for i in range(n)],
            "time": [datetime(2150, 1, 1)] * n,
            "code": ["ICU_ADMISSION//" + str(i) for i in range(n)],
            "numeric_value": [1.0] * n,
        }
    ).write_parquet(raw / "0.parquet")
    data = bytearray((raw / "0.parquet").read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)  # the footer stays whole
    (raw / "0.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"0\.parquet is damaged"):
        prepare_icu("ards", "meds", raw, out)
    assert list(tmp_path.iterdir()) == [raw]


def test_wrong_options(tmp_path):
    with pytest.raises(UsageError, match="unknown source 'physionet'"):
        prepare_icu("ards", "physionet", None, tmp_path / "out")
    with pytest.raises(UsageError, match="needs the directory"):
        prepare_icu("ards", "meds", None, tmp_path / "out")
    for landmark, horizon in ((0, 24), (6.5, 24), (12, 0)):
        with pytest.raises(UsageError, match="cannot be used"):
            prepare_icu("ards", "synthetic", None, tmp_path / "out", landmark=landmark, horizon=horizon)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda e: e, None),
        (lambda e: e.filter(~pl.col("stay_id").str.ends_with("7")), "stays with events that the source does not list"),
    ],
)
def test_events_of_stays_that_are_not_listed(tmp_path, monkeypatch, change, note):
    """A source of one's own whose tables meet in a part, or not at all."""
    drawn = synthetic.read(200, 0)
    stays = change(drawn.stays)
    monkeypatch.setitem(prepare.SOURCES, "synthetic", lambda raw: SourceData(drawn.events, stays))
    meta = prepare_icu("ards", "synthetic", None, tmp_path / "out")
    assert [n.rpartition(":")[0] for n in meta.notes] == ([note + ", left out"] if note else [])
    floats = stays.with_columns(stay_id=pl.col("stay_id") + ".0")
    monkeypatch.setitem(prepare.SOURCES, "synthetic", lambda raw: SourceData(drawn.events, floats))
    with pytest.raises(DataError, match="no identifier of the events is in the stays: 0 of 200"):
        prepare_icu("ards", "synthetic", None, tmp_path / "none")


# real data


@pytest.mark.parametrize(
    ("landmark", "stays", "onsets", "prevalence"),
    [(6, 2980, 741, 0.249), (12, 2574, 390, 0.152), (24, 2307, 189, 0.082)],
)
def test_onsets_of_physionet_2012_set_a(set_a, tmp_path, monkeypatch, landmark, stays, onsets, prevalence):
    monkeypatch.setitem(prepare.SOURCES, "physionet2012", lambda raw: set_a)
    meta = prepare_icu("ards", "physionet2012", tmp_path, tmp_path / "out", landmark=landmark)
    assert meta.cohorts["all"] == {"n": stays, "positive": onsets}
    assert onsets / stays == pytest.approx(prevalence, abs=5e-4)
    assert meta.attrition[0]["stays"] == 4000


def test_onsets_that_persist(set_a, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.SOURCES, "physionet2012", lambda raw: set_a)
    meta = prepare_icu("ards", "physionet2012", tmp_path, tmp_path / "out", rule=label("ahrf", {"persist_h": 8}))
    assert meta.cohorts["all"]["positive"] == 189


@pytest.mark.skipif(
    not (DATA / "mimic-iv-demo-meds").is_dir(), reason="no mimic-iv-demo-meds in RAYLAB_DATA or ../shared/data"
)
def test_the_mimic_iv_demo_can_be_prepared(tmp_path):
    meta = prepare_icu("ards", "meds", DATA / "mimic-iv-demo-meds", tmp_path / "out", horizon=10_000)
    assert meta.attrition[0] == {"step": "all stays", "patients": 100, "stays": 140}
    assert meta.cohorts["all"]["positive"] == 10  # onsets at any time after 12 h
    assert {"peep", "tidal_volume", "plateau"} <= set(meta.features)
    assert meta.out_of_range["fio2"] == 4 and meta.out_of_range["tidal_volume"] == 8
    rows = pl.read_parquet(tmp_path / "out" / "samples.parquet")
    assert rows.group_by("subject_id").agg(pl.col("split").n_unique())["split"].max() == 1


def test_deaths_in_hospital_of_those_whose_outcome_is_known(mortality_data):
    meta = prepared.read_meta(mortality_data, "mortality", IcuMeta)
    rows = pl.read_parquet(mortality_data / "samples.parquet")
    assert meta.task == "mortality" and meta.classes == ["discharge alive", "death in hospital"]
    assert meta.label["name"] == "in-hospital-death" and meta.horizon_h is None and meta.onsets is None
    assert [step["step"] for step in meta.attrition][-2:] == ["in hospital at 12 h", "outcome in hospital known"]
    assert set(rows["outcome"]) == {"death in hospital", "discharge alive"} and set(rows["at_h"]) == {12.0}
    assert rows.filter(pl.col("label") == 1)["outcome"].unique().to_list() == ["death in hospital"]
    assert 0.1 < rows["label"].mean() < 0.3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the cohort is empty after 'outcome in hospital known'"),
        ({"framing": "rolling"}, "predicted once, at the landmark"),
        ({"gap": 2}, "predicted once, at the landmark"),
    ],
)
def test_what_mortality_refuses(tmp_path, options, said):
    with pytest.raises((DataError, UsageError), match=said):
        rule = mortality.LABELS["in-hospital-death"]
        prepare_icu("mortality", "synthetic", None, tmp_path / "out", patients=60, rule=rule, **options)
    assert not (tmp_path / "out").exists()
