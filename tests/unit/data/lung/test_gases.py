from math import nan

import polars as pl
import pytest
import torch

from raylab.data.lung import fits, gases


def events(*rows):
    """(concept, hours, value) of one stay."""
    return pl.LazyFrame(
        [("p", "s", time, concept, float(value)) for concept, time, value in rows],
        schema={"subject_id": str, "stay_id": str, "time": float, "concept": str, "value": float},
        orient="row",
    )


GAS = (("mech_vent", 1, 1), ("fio2", 1, 0.5), ("pao2", 2, 80), ("paco2", 2, 45), ("ph", 2, 7.35))
BREATH = (("peep", 1, 8), ("tidal_volume", 1, 430), ("resp_rate", 1.5, 20), ("plateau", 1.5, 19))


def test_a_reading_takes_what_was_charted_before_it():
    table = gases.gases(events(*GAS, *BREATH, ("fio2", 2.5, 0.9), ("paco2", 2.2, 60), ("temp", 1, 38)))
    assert len(table) == 1
    row = table.row(0, named=True)
    assert (row["fio2"], row["paco2"], row["ph"], row["peep"], row["plateau"], row["temp"]) == (
        0.5,
        45,
        7.35,
        8,
        19,
        38,
    )
    assert gases.flags(table.with_columns(patient=0)).row(0, named=True) == {
        "patient": 0, "readings": 1, "shunt/missing": "", "vq_log_sd/missing": "",
        "alveolar_dead_space/missing": "", "compliance_mL_per_cmH2O/missing": "",
    }  # fmt: skip


def test_settings_that_are_too_old_do_not_count():
    table = gases.gases(events(*GAS, ("peep", 0.5, 8), ("pao2", 6.5, 90), ("mech_vent", 6, 1), ("plateau", 1, 20)))
    assert table["plateau"].to_list() == [20, None]


def test_what_cannot_be_used_ends_the_carry():
    table = gases.gases(
        events(
            *GAS, *BREATH, ("temp", 0.5, 38), ("peep", 1.5, nan), ("temp", 1.5, nan), ("pao2", 2.5, nan)
        ).with_columns(pl.col("value").fill_nan(None))
    )
    row = table.row(0, named=True)
    assert len(table) == 1 and (row["peep"], row["temp"], row["plateau"]) == (None, None, 19)
    without = events(*GAS, ("fio2", 1.5, nan)).with_columns(pl.col("value").fill_nan(None))
    assert gases.gases(without).is_empty()


def test_only_ventilated_gases_with_fio2_are_readings():
    assert gases.gases(events(("pao2", 2, 80), ("fio2", 1, 0.5))).is_empty()
    assert gases.gases(events(("pao2", 2, 80), ("mech_vent", 1, 1))).is_empty()
    assert gases.gases(events(*GAS[:1], ("fio2", 1, 0.5), ("mech_vent", 1.9, 0), ("pao2", 2, 80))).is_empty()


def test_base_excess_is_the_gases_own():
    table = gases.gases(events(*GAS, *BREATH, ("hemoglobin", 1, 10)))
    given, measured = gases.readings(table)
    # Van Slyke by hand: HCO3 = .0304 x 45 x 10^(7.35 - 6.1)
    bicarbonate = 0.0304 * 45 * 10**1.25
    excess = (1 - 0.143) * (bicarbonate - 24.26 + (9.5 + 16.3) * (-0.05))
    assert given.base_excess_mmol_per_L.item() == pytest.approx(excess - 2 * (1 - 0.95), abs=0.15)
    assert measured["pao2_mmHg"].item() == 80
    assert measured["etco2_mmHg"].isnan().all()


def test_wrong_entries_are_left_out():
    table = gases.gases(
        events(*GAS, *BREATH[:3], ("plateau", 1.5, 7), ("etco2", 1.9, 80), ("height", 0, 190), ("sex", 0, 1))
    )
    given, measured = gases.readings(table)
    assert measured["plateau_cmH2O"].isnan().all()
    assert measured["etco2_mmHg"].isnan().all()
    assert given.predicted_weight_kg.item() == pytest.approx(84.2, abs=0.1)
    tiny = table.with_columns(tidal_volume=pl.lit(150.0))
    given, _ = gases.readings(tiny)
    assert (given.tidal_volume_mL > given.airway_dead_space_mL()).all()


def test_a_fit_says_what_it_knows():
    rows = pl.concat([gases.gases(events(*GAS, *BREATH)), gases.gases(events(*GAS)).with_columns(stay_id=pl.lit("t"))])
    rows = rows.with_columns(window=0)
    found, residuals = fits.fit_stays(rows)
    assert found["stay_id"].to_list() == ["s", "t"]
    assert found["readings"].to_list() == [1, 1]
    assert found["compliance_mL_per_cmH2O/identified"].to_list() == [True, False]
    assert found["compliance_mL_per_cmH2O/missing"].to_list() == ["", "plateau, peep, tidal_volume"]
    assert found["alveolar_dead_space/missing"].to_list() == ["", "tidal_volume, resp_rate"]
    assert found["compliance_mL_per_cmH2O"][0] == pytest.approx(430 / 11, rel=0.1)
    assert found["compliance_mL_per_cmH2O"][1] == pytest.approx(40, rel=1e-3)
    assert (found["shunt/low"] < found["shunt"]).all()
    assert (found["shunt"] < found["shunt/high"]).all()
    assert set(residuals["output"]) == {"pao2_mmHg", "paco2_mmHg", "plateau_cmH2O"}
    told = fits.summary(found, residuals)
    assert told["one_reading"] == 2
    assert told["parameters"]["compliance_mL_per_cmH2O"]["never_measured"] == 1


def test_chunks_of_stays_are_fitted_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "STAYS", 1)
    one = gases.gases(events(*GAS, *BREATH)).with_columns(window=0)
    rows = pl.concat([one.with_columns(stay_id=pl.lit(name)) for name in ("b", "a")])
    parts = fits.begin(rows, {}, tmp_path)
    assert len(parts) == 2
    for path, argument in parts.items():
        fits.write_chunk(argument, path)
    found = pl.concat([pl.read_parquet(path) for path in sorted(parts)])
    assert found["stay_id"].to_list() == ["a", "b"]
    assert torch.tensor(found["shunt"]).diff().abs().max() < 1e-6
