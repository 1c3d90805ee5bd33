"""The dictionary holds together, and its ids are what the sources' own item tables say (on real data where it is)."""

import gzip
import io
import re

import polars as pl
import pytest

from raylab.data.icu.concepts import CONCEPTS, DERIVED, SERIES, by_id, factor, names_no_unit, stated_units
from raylab.data.icu.sources import mimic, mimic3

# What the label of an item must say, in MIMIC's own words
SAYS = {
    "hr": "heart rate",
    "map": "(arterial|art) (bp|blood pressure) mean|art bp mean",
    "sysabp": r"(arterial|art) (bp|blood pressure).*syst",
    "diasabp": r"(arterial|art) (bp|blood pressure).*diast",
    "nimap": "(nbp|non invasive blood pressure) mean",
    "nisysabp": r"(nbp|non invasive blood pressure).*syst",
    "nidiasabp": r"(nbp|non invasive blood pressure).*diast",
    "resp_rate": r"resp(iratory)? rate",
    "spo2": "spo2|pulseoxymetry",
    "fio2": "fio2|inspired o2|^oxygen$",
    "pao2": "pa?o2|arterial o2 pressure",
    "paco2": "pa?co2|arterial co2 pressure",
    "ph": r"\bph\b",
    "sao2": "sao2|o2 saturation|oxygen saturation",
    "base_excess": "base excess",
    "lactate": "lactate",
    "mech_vent": "^invasive ventilation",
    "niv": "non-invasive ventilation",
    "o2_flow": "o2 flow",
    "peep": "^peep",
    "peep_total": "total peep",
    "tidal_volume": r"tidal volume \(obser",
    "tidal_volume_set": r"tidal volume \(set",
    "tidal_volume_spont": r"tidal volume \(spont",
    "resp_rate_set": r"respiratory rate \(?set",
    "resp_rate_spont": r"resp(iratory)? rate \(spont",
    "resp_rate_total": r"respiratory rate \(total",
    "minute_volume": "minute volume",
    "plateau": "plateau",
    "peak_pressure": "peak insp",
    "mean_airway_pressure": "mean airway",
    "etco2": "etco2",
    "temp": "temperature",
    "gcs": "gcs",
    "weight": "daily weight",
    "hct": "hematocrit",
    "hemoglobin": "hemoglobin",
    "wbc": "white blood",
    "platelets": "platelet",
    "na": "sodium",
    "k": "potassium",
    "mg": "magnesium",
    "hco3": "bicarbonate",
    "bun": "urea",
    "creatinine": "creatinine",
    "glucose": "glucose",
    "albumin": "albumin",
    "alp": "alkaline",
    "alt": "alanine",
    "ast": "asparate",
    "bilirubin": "bilirubin, total",
    "cholesterol": "cholesterol, total",
    "troponin_i": "troponin i",
    "troponin_t": "troponin t",
    "height": "height|admit ht",
    "weight_admission": "admit wt|admission weight",
}


def test_ranges_and_ids_hold_together():
    assert len(CONCEPTS) >= 40
    assert {"peep", "plateau", "tidal_volume", "driving_pressure", "compliance"} <= set(SERIES)
    for name, concept in CONCEPTS.items():
        assert concept.low < concept.high, name
        assert bool(concept.derived) == (name in DERIVED) and not (concept.derived and any(concept.ids.values()))
    said = {unit for c in CONCEPTS.values() for ids in c.ids.values() for unit in ids.values() if unit}
    assert said == {"degC", "degF", "in"}


def test_precisions_are_powers_of_ten_and_bounds_lie_on_them():
    for name, concept in CONCEPTS.items():
        decimals = concept.decimals()
        assert concept.precision == pytest.approx(10.0**-decimals, rel=1e-12), name
        assert [round(bound, decimals) for bound in (concept.low, concept.high)] == [concept.low, concept.high], name


def test_a_row_says_its_unit_or_its_id_does():
    rows = stated_units(
        "mimic3",
        [("678", "Deg. F"), ("678", None), ("678", "?"), ("678", "Deg. C"), ("678", "kg"), ("678", "smudge"),
         ("50821", "MM HG"), ("50821", None), ("1", "x")],
    )  # fmt: skip
    found = {(item, recorded): (concept, unit) for item, recorded, concept, unit in rows.iter_rows()}
    assert found["678", "Deg. F"] == found["678", None] == found["678", "?"] == found["678", "smudge"] == (
        "temp", "degF"
    )  # fmt: skip
    assert found["50821", "MM HG"] == ("pao2", "MM HG") and found["50821", None] == ("pao2", "")
    assert found["678", "Deg. C"] == ("temp", "Deg. C where all is degF")  # a contradiction is no unit
    assert factor(CONCEPTS["temp"], found["678", "Deg. C"][1]) is None
    assert factor(CONCEPTS["temp"], found["678", "kg"][1]) is None and len(rows) == 8


def test_each_mimic_iii_id_is_what_its_item_table_says(real_data):
    folder = real_data / "icu" / "mimic-iii-demo"
    if not folder.is_dir():
        pytest.skip("no mimic-iii-demo in the real data")
    labels = {}
    for table in ("D_ITEMS", "D_LABITEMS"):
        text = gzip.decompress((folder / f"{table}.csv.gz").read_bytes())
        rows = pl.read_csv(io.BytesIO(text), infer_schema=False).rename(str.lower)
        labels |= dict(rows.select("itemid", "label").iter_rows())
    ids = by_id("mimic3")
    wrong = {
        item: (name, labels.get(item))
        for item, name in ids.items()
        if not re.search(SAYS[name], str(labels.get(item)).lower())
    }
    assert not wrong
    rule = (mimic3.MODE, mimic3.DEVICE, *mimic3.SETTINGS, *mimic.COMA_SCALE)
    assert "mode" in labels[str(mimic3.MODE)].lower() and "o2 delivery" in labels[str(mimic3.DEVICE)].lower()
    assert all(str(item) in labels for item in rule) and labels[str(mimic3.SPECIMEN)].lower() == "specimen type"
    assert all("GCS" in labels[str(item)] for item in mimic.COMA_SCALE)


def test_each_mimic_iv_id_occurs_as_that_in_the_meds_demo(real_data):
    """The MEDS copy has no labels: a MIMIC-IV id is MetaVision's of MIMIC-III, where the label stands, and its unit and
    usual value in the demo are the concept's."""
    file = real_data / "icu" / "mimic-iv-demo-meds" / "data" / "0.parquet"
    if not file.is_file():
        pytest.skip("no mimic-iv-demo-meds in the real data")
    parts = pl.col("code").str.splitn("//", 3).struct
    rows = (
        pl.scan_parquet(file).with_columns(item=parts[1], unit=parts[2]).filter(pl.col("numeric_value").is_not_null())
    )
    ids = by_id("mimic4")
    usual = rows.group_by("item", "unit").agg(pl.col("numeric_value").median(), pl.len()).collect()
    usual = usual.filter(pl.col("item").is_in(list(ids)))
    assert usual["item"].n_unique() >= 50
    for item, unit, median, n in usual.sort("len").iter_rows():
        concept = CONCEPTS[ids[item]]
        stated = stated_units("mimic4", [(item, unit)])["unit"][0]
        scale, offset = (1.0, 0.0) if names_no_unit(stated) else factor(concept, stated)  # no unit is another's
        value = median * scale + offset
        percent = concept.name == "fio2" and value > 1
        assert n < 5 or concept.low <= (value / 100 if percent else value) <= concept.high, (item, concept.name, value)
    in_both = by_id("mimic3")
    assert all(in_both[item] == name for item, name in ids.items() if item in in_both)
