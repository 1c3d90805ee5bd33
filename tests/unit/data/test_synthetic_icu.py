import numpy as np
import pytest

from raylab.data.concepts import CONCEPTS
from raylab.data.sources import synthetic_icu as lung
from raylab.errors import UsageError


def test_severinghaus_at_published_points():
    saturation = lung.severinghaus(np.array([40.0, 60.0, 100.0]))
    assert saturation == pytest.approx([0.7495, 0.906, 0.977], abs=6e-4)


def test_alveolar_gas_and_ph_of_a_healthy_person_on_air():
    assert lung.alveolar_po2(np.array(0.21), np.array(40.0)) == pytest.approx(101.8, abs=0.1)
    assert lung.henderson_hasselbalch(np.array(24.0), np.array(40.0)) == pytest.approx(7.40, abs=0.01)


def test_arterial_po2_solves_the_shunt_equation():
    alveolar, hb, extraction = np.full(4, 400.0), np.full(4, 12.0), np.full(4, 4.5)
    shunt = np.array([0.0, 0.05, 0.2, 0.4])
    pao2 = lung.arterial_po2(alveolar, shunt, hb, extraction)
    assert pao2[0] == pytest.approx(400, abs=0.01) and (np.diff(pao2) < 0).all()
    capillary, arterial = lung.o2_content(alveolar, hb), lung.o2_content(pao2, hb)
    assert (capillary - arterial) / (capillary - (arterial - extraction)) == pytest.approx(shunt, abs=1e-5)


def test_patients_are_plausible_and_the_same_for_the_same_seed():
    events = lung.read(50, seed=3).events.collect()
    assert events.equals(lung.read(50, seed=3).events.collect())
    assert not events.equals(lung.read(50, seed=4).events.collect())
    assert events["time"].is_between(0, 48).all()
    for (name,), rows in events.group_by("concept"):
        concept = CONCEPTS[str(name)]
        assert rows["value"].is_between(concept.low, concept.high).all(), name
    assert lung.read(3, 0).stays["source"].unique().to_list() == ["synthetic"]


def test_no_patients_is_a_usage_error():
    with pytest.raises(UsageError, match="0 virtual patients"):
        lung.read(0, seed=0)
