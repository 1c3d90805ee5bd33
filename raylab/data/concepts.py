"""The concept dictionary: every quantity by one name, with unit, plausible range and its ids in each source.

Units are those of PhysioNet 2012 (US conventional); a source converts to them. Ranges are deliberately wide: they
remove entry and unit errors (FiO2 of 0, a tidal volume of 585,573 mL, a temperature of -17.8 degrees), never an
extreme but possible patient. They were set by looking at the extremes of PhysioNet 2012 set a and the MIMIC-IV demo.

MIMIC-IV ids of blood gases are the charted arterial ones (PaO2 220224): the laboratory ids (50821, ...) mix
arterial and venous specimens whose type is not in the MEDS copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl


@dataclass(frozen=True)
class Concept:
    """`low` and `high` (inclusive) are in `unit`; a static concept has one value a stay, a series many."""

    name: str
    unit: str
    low: float
    high: float
    ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    static: bool = False


@dataclass(frozen=True)
class Extract:
    """What a source yields.

    events  subject_id str, stay_id str, time f64 (hours since the start of the stay), concept str, value f64
    stays   one row a stay: subject_id, stay_id, source str, died bool (in hospital; null = not known)
    counts  rows that did not become events, by reason
    """

    events: pl.LazyFrame
    stays: pl.DataFrame
    counts: dict[str, int] = field(default_factory=dict)


EVENTS = pl.Schema(
    {"subject_id": pl.String, "stay_id": pl.String, "time": pl.Float64, "concept": pl.String, "value": pl.Float64}
)
STAYS = pl.Schema({"subject_id": pl.String, "stay_id": pl.String, "source": pl.String, "died": pl.Boolean})


def _concept(
    name: str, unit: str, low: float, high: float, physionet2012: str = "", meds: str = "", static: bool = False
) -> Concept:
    ids = {"physionet2012": tuple(physionet2012.split()), "meds": tuple(meds.split())}
    return Concept(name, unit, low, high, ids, static)


CONCEPTS: dict[str, Concept] = {
    concept.name: concept
    for concept in (
        # circulation
        _concept("hr", "1/min", 10, 300, "HR", "220045"),
        _concept("map", "mmHg", 10, 250, "MAP", "220052 225312"),
        _concept("sysabp", "mmHg", 20, 300, "SysABP", "220050 225309"),
        _concept("diasabp", "mmHg", 5, 220, "DiasABP", "220051 225310"),
        _concept("nimap", "mmHg", 10, 250, "NIMAP", "220181"),
        _concept("nisysabp", "mmHg", 20, 300, "NISysABP", "220179"),
        _concept("nidiasabp", "mmHg", 5, 220, "NIDiasABP", "220180"),
        # breathing and gas exchange
        _concept("resp_rate", "1/min", 1, 90, "RespRate", "220210"),
        _concept("spo2", "%", 20, 100, "", "220277"),
        _concept("fio2", "fraction", 0.21, 1, "FiO2", "223835 50816"),
        _concept("pao2", "mmHg", 15, 800, "PaO2", "220224"),
        _concept("paco2", "mmHg", 5, 200, "PaCO2", "220235"),
        _concept("ph", "", 6.5, 8, "pH", "223830"),
        _concept("sao2", "%", 20, 100, "SaO2", "220227"),
        _concept("base_excess", "mmol/L", -40, 40, "", "224828"),
        _concept("lactate", "mmol/L", 0.1, 40, "Lactate", "50813"),
        _concept("mech_vent", "1 = ventilated", 0, 1, "MechVent", "225792"),
        _concept("peep", "cmH2O", 0, 40, "", "220339"),
        _concept("tidal_volume", "mL", 50, 2000, "", "224685"),
        _concept("tidal_volume_set", "mL", 50, 2000, "", "224684"),
        _concept("resp_rate_set", "1/min", 1, 60, "", "224688"),
        _concept("minute_volume", "L/min", 0.5, 50, "", "224687"),
        _concept("plateau", "cmH2O", 2, 80, "", "224696"),
        _concept("peak_pressure", "cmH2O", 2, 100, "", "224695"),
        _concept("mean_airway_pressure", "cmH2O", 1, 60, "", "224697"),
        _concept("etco2", "mmHg", 5, 150, "", "228640"),
        # general
        _concept("temp", "degC", 25, 45, "Temp", "223762 223761"),
        _concept("gcs", "points", 3, 15, "GCS", "220739 223900 223901"),
        _concept("urine", "mL", 0, 5000, "Urine", "226559 226560 226561 226563 226564 226565 226567 226584"),
        _concept("weight", "kg", 20, 400, "Weight", "224639"),
        # laboratory
        _concept("hct", "%", 5, 75, "HCT", "51221"),
        _concept("hemoglobin", "g/dL", 1, 25, "", "51222"),
        _concept("wbc", "K/uL", 0.05, 500, "WBC", "51301"),
        _concept("platelets", "K/uL", 1, 2000, "Platelets", "51265"),
        _concept("na", "mEq/L", 80, 200, "Na", "50983"),
        _concept("k", "mEq/L", 1, 15, "K", "50971"),
        _concept("mg", "mg/dL", 0.2, 15, "Mg", "50960"),
        _concept("hco3", "mEq/L", 1, 60, "HCO3", "50882"),
        _concept("bun", "mg/dL", 1, 300, "BUN", "51006"),
        _concept("creatinine", "mg/dL", 0.05, 40, "Creatinine", "50912"),
        _concept("glucose", "mg/dL", 5, 2000, "Glucose", "50931"),
        _concept("albumin", "g/dL", 0.3, 8, "Albumin", "50862"),
        _concept("alp", "IU/L", 1, 10000, "ALP", "50863"),
        _concept("alt", "IU/L", 1, 40000, "ALT", "50861"),
        _concept("ast", "IU/L", 1, 40000, "AST", "50878"),
        _concept("bilirubin", "mg/dL", 0.05, 100, "Bilirubin", "50885"),
        _concept("cholesterol", "mg/dL", 10, 1000, "Cholesterol", "50907"),
        _concept("troponin_i", "ug/L", 0, 500, "TroponinI", "51002"),
        _concept("troponin_t", "ug/L", 0, 100, "TroponinT", "51003"),
        # one value a stay
        _concept("age", "years", 0, 120, "Age", static=True),
        _concept("sex", "1 = male", 0, 1, "Gender", static=True),
        _concept("height", "cm", 100, 230, "Height", "226730", static=True),
        _concept("weight_admission", "kg", 20, 400, "", "226512", static=True),
        _concept("icu_type", "1 coronary, 2 cardiac surgery, 3 medical, 4 surgical", 1, 4, "ICUType", static=True),
    )
}
SERIES = tuple(name for name, concept in CONCEPTS.items() if not concept.static)
STATIC = tuple(name for name, concept in CONCEPTS.items() if concept.static)
SUMMED = ("urine",)  # amounts add up over an hour; of everything else the last value counts


def by_id(source: str) -> dict[str, str]:
    """Source id -> concept name."""
    return {item: concept.name for concept in CONCEPTS.values() for item in concept.ids.get(source, ())}
