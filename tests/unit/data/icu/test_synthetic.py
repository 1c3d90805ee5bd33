import polars as pl
import pytest
import torch

from raylab.data.icu.concepts import CONCEPTS
from raylab.data.icu.sources import synthetic as ward
from raylab.errors import UsageError
from raylab.physiology.blood import saturation


def test_patients_are_plausible_and_the_same_for_the_same_seed():
    events = ward.read(50, seed=3).events.collect()
    assert events.equals(ward.read(50, seed=3).events.collect())
    assert not events.equals(ward.read(50, seed=4).events.collect())
    assert events["time"].is_between(0, 48).all()
    for (name,), rows in events.group_by("concept"):
        concept = CONCEPTS[str(name)]
        assert rows["value"].is_between(concept.low, concept.high).all(), name
    assert ward.read(3, 0).stays["source"].unique().to_list() == ["synthetic"]


def test_no_patients_is_a_usage_error():
    with pytest.raises(UsageError, match="0 virtual patients"):
        ward.read(0, seed=0)


@pytest.fixture(scope="module")
def cohort():
    return ward.read(150, seed=0).events.collect()


def wide(events, *concepts):
    rows = events.filter(pl.col("concept").is_in(concepts))
    return rows.pivot("concept", index=["stay_id", "time"], values="value", aggregate_function="first").drop_nulls()


def test_one_gas_is_one_blood(cohort):
    """PaCO2, pH and SaO2 of a sample belong together, as the lung model has them, to the error of a reading."""
    gases = wide(cohort, "pao2", "paco2", "ph", "sao2")
    assert len(gases) > 300
    s = 100 * saturation(torch.tensor(gases["pao2"].to_numpy()), torch.tensor(gases["ph"].to_numpy()))
    assert (s - torch.tensor(gases["sao2"].to_numpy())).abs().median() < 1.5


def test_mechanics_look_like_a_wards(cohort):
    """MIMIC-IV demo: static compliance median 41, P10 to P90 27 to 63 mL/cmH2O, driving pressure 11 cmH2O."""
    last = cohort.filter(pl.col("concept").is_in(["peep", "tidal_volume", "plateau"])).sort("time")
    table = last.pivot("concept", index=["stay_id", "time"], values="value", aggregate_function="first")
    table = (
        table.sort("stay_id", "time")
        .with_columns(pl.col("peep", "tidal_volume").forward_fill().over("stay_id"))
        .drop_nulls()
    )
    driving = table["plateau"] - table["peep"]
    compliance = (table["tidal_volume"] / driving).filter(driving > 2)
    assert 33 < compliance.median() < 47
    assert compliance.quantile(0.1) > 20
    assert compliance.quantile(0.9) < 68
    assert 8 < driving.median() < 14


def test_the_sick_are_measured_more(cohort):
    counts = cohort.filter(pl.col("concept") == "pao2").group_by("stay_id").len()
    worst = cohort.filter(pl.col("concept") == "fio2").group_by("stay_id").agg(pl.col("value").max())
    joined = counts.join(worst, "stay_id")
    assert (
        joined.filter(pl.col("value") > 0.5)["len"].mean() > 1.3 * joined.filter(pl.col("value") <= 0.5)["len"].mean()
    )
