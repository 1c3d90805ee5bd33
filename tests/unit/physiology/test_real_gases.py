"""The dissociation curve on real blood: PaO2 and SaO2 of PhysioNet 2012 that were drawn at one time."""

import polars as pl
import torch

from raylab.data.icu.patient_batch import screen
from raylab.physiology import blood


def test_saturation_of_real_blood(set_a):
    _, unique = screen(set_a.events)
    gases = unique.drop_nulls("value").filter(pl.col("concept").is_in(["pao2", "sao2", "ph"])).collect()
    wide = gases.pivot("concept", index=["stay_id", "time"], values="value", aggregate_function="first")
    pairs = wide.drop_nulls(["pao2", "sao2"])
    assert len(pairs) >= 6579  # of set a alone
    po2 = torch.tensor(pairs["pao2"].to_numpy())
    measured = torch.tensor(pairs["sao2"].to_numpy())
    ph = torch.tensor(pairs["ph"].fill_null(7.4).to_numpy())

    def error(at: torch.Tensor) -> torch.Tensor:
        return (100 * blood.saturation(po2, at) - measured).abs()

    assert error(torch.full_like(ph, 7.4)).mean() < 1.25
    with_ph = error(ph)
    assert with_ph.mean() < 1.15
    assert with_ph[(po2 >= 80) & (po2 <= 120)].mean() < 0.8
    assert with_ph[(po2 >= 20) & (po2 < 60)].mean() < 3.1
