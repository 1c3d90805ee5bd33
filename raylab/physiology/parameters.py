"""Every input of the lung model: its unit, accepted range and usual value.

Ranges are wide: they keep out what no living adult shows (and what the equations were not made for), not what is rare.
The usual values describe a ventilated adult with moderate ARDS. Ranges of the ARDS literature named in `about`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from raylab.errors import DataError, unknown


@dataclass(frozen=True)
class Quantity:
    """`low` and `high` (inclusive) and `usual` are in `unit`."""

    unit: str
    low: float
    high: float
    usual: float
    about: str


SETTINGS = {
    "fio2": Quantity("fraction", 0.21, 1, 0.5, "inspired oxygen fraction"),
    "peep_cmH2O": Quantity("cmH2O", 0, 30, 8, "positive end-expiratory pressure"),
    "tidal_volume_mL": Quantity("mL", 100, 1500, 430, "set tidal volume, constant flow"),
    "rate_per_min": Quantity("1/min", 4, 50, 20, "breaths, all of them the ventilator's"),
    "inspired_fraction": Quantity("fraction", 0.15, 0.75, 1 / 3, "inspiratory part of the cycle; 1/3 is I:E 1:2"),
}
PATIENT = {
    "shunt": Quantity("fraction", 0, 0.7, 0.15, "of cardiac output through lung that no pressure opens"),
    "vq_log_sd": Quantity("", 0, 2.5, 0.8, "standard deviation of ln(V/Q) over perfusion; 0.3 to 0.6 in health"),
    "alveolar_dead_space": Quantity("fraction", 0, 0.8, 0.2, "of alveolar ventilation that reaches no blood"),
    "compliance_mL_per_cmH2O": Quantity("mL/cmH2O", 8, 150, 40, "respiratory system, all recruitable lung open"),
    "resistance_cmH2O_s_per_L": Quantity("cmH2O s/L", 1, 50, 12, "airways and tube"),
    "collapsed": Quantity("fraction", 0, 0.7, 0.15, "of the lung: closed, and opened by enough pressure"),
    "opening_pressure_cmH2O": Quantity("cmH2O", 0, 60, 20, "mean threshold opening pressure of that part"),
    "opening_sd_cmH2O": Quantity("cmH2O", 1, 20, 6, "its standard deviation over lung units"),
    "cardiac_output_L_per_min": Quantity("L/min", 1.5, 16, 6, ""),
    "vo2_mL_per_min": Quantity("mL/min STPD", 80, 600, 250, "oxygen uptake"),
    "rq": Quantity("", 0.65, 1.3, 0.85, "respiratory quotient: CO2 output / O2 uptake"),
    "hb_g_per_dL": Quantity("g/dL", 4, 20, 10.5, "haemoglobin"),
    "base_excess_mmol_per_L": Quantity("mmol/L", -25, 25, 0, "of oxygenated blood"),
    "temperature_C": Quantity("degC", 32, 42, 37, "of blood and lung"),
    "barometric_mmHg": Quantity("mmHg", 450, 790, 760, ""),
    "predicted_weight_kg": Quantity("kg", 30, 120, 66, "predicted body weight, sets the airway dead space"),
    "gas_volume_mL": Quantity("mL", 300, 5000, 1500, "end-expiratory lung volume; matters to time courses only"),
}
QUANTITIES = SETTINGS | PATIENT

LIVING = {
    "fio2": (0.21, 1.0),
    "peep_cmH2O": (0.0, 20.0),
    "tidal_volume_mL": (250.0, 700.0),
    "rate_per_min": (8.0, 35.0),
    "inspired_fraction": (0.2, 0.5),
    "shunt": (0.02, 0.5),
    "vq_log_sd": (0.3, 2.0),
    "alveolar_dead_space": (0.0, 0.6),
    "compliance_mL_per_cmH2O": (15.0, 80.0),
    "resistance_cmH2O_s_per_L": (5.0, 25.0),
    "collapsed": (0.0, 0.4),
    "opening_pressure_cmH2O": (5.0, 40.0),
    "opening_sd_cmH2O": (3.0, 10.0),
    "cardiac_output_L_per_min": (3.0, 9.0),
    "vo2_mL_per_min": (180.0, 350.0),
    "rq": (0.7, 1.0),
    "hb_g_per_dL": (7.0, 15.0),
    "base_excess_mmol_per_L": (-10.0, 10.0),
    "temperature_C": (35.0, 40.0),
    "barometric_mmHg": (690.0, 780.0),
    "predicted_weight_kg": (45.0, 85.0),
}
"""Ranges that ventilated patients cover; sweeps and the surrogate use them. The corners of this box are not
survivable."""

AIRWAY_DEAD_SPACE_mL_per_kg = 2.2
"""Radford's rule of 1 mL a pound (J Appl Physiol 1955;7:451), of predicted weight; from memory, and imprecise for
one person (r2 of measured against estimated near 0 in ventilated adults), so `alveolar_dead_space` accounts for the
difference."""


@dataclass(frozen=True)
class Inputs:
    """Settings and patients, one per row: every field is a float64 tensor [N], with names and ranges of QUANTITIES."""

    fio2: Tensor
    peep_cmH2O: Tensor
    tidal_volume_mL: Tensor
    rate_per_min: Tensor
    inspired_fraction: Tensor
    shunt: Tensor
    vq_log_sd: Tensor
    alveolar_dead_space: Tensor
    compliance_mL_per_cmH2O: Tensor
    resistance_cmH2O_s_per_L: Tensor
    collapsed: Tensor
    opening_pressure_cmH2O: Tensor
    opening_sd_cmH2O: Tensor
    cardiac_output_L_per_min: Tensor
    vo2_mL_per_min: Tensor
    rq: Tensor
    hb_g_per_dL: Tensor
    base_excess_mmol_per_L: Tensor
    temperature_C: Tensor
    barometric_mmHg: Tensor
    predicted_weight_kg: Tensor
    gas_volume_mL: Tensor

    def __len__(self) -> int:
        return len(self.fio2)

    def airway_dead_space_mL(self) -> Tensor:
        return AIRWAY_DEAD_SPACE_mL_per_kg * self.predicted_weight_kg

    def alveolar_ventilation_L_per_min(self) -> Tensor:
        """Expired ventilation of perfused alveoli, BTPS: rate (VT - airway dead space)(1 - alveolar dead space)."""
        each = (self.tidal_volume_mL - self.airway_dead_space_mL()) * (1 - self.alveolar_dead_space)
        return self.rate_per_min * each / 1000

    def but(self, **values: Any) -> "Inputs":
        """The same patients with other values in some fields, [N] or one number."""
        return replace(self, **{name: _column(value, len(self), self.fio2.device) for name, value in values.items()})

    def take(self, rows: Tensor) -> "Inputs":
        return Inputs(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def inputs(values: Mapping[str, Any], rows: int | None = None, device: str | torch.device = "cpu") -> Inputs:
    """Inputs from `values` {name: number or array [N]}; other inputs have their usual values.

    Raises UsageError for a name that is no input, DataError for lengths that differ.
    """
    for name in values:
        if name not in QUANTITIES:
            raise unknown("lung model input", name, QUANTITIES)
    lengths = {name: len(value) for name, value in values.items() if getattr(value, "ndim", 0) == 1}
    if rows is None:
        rows = max(lengths.values(), default=1)
    if any(length != rows for length in lengths.values()):
        raise DataError("the inputs have different lengths", f"{lengths}", "give each input one number, or N numbers")
    known = {name: quantity.usual for name, quantity in QUANTITIES.items()} | dict(values)
    return Inputs(**{name: _column(known[name], rows, device) for name in QUANTITIES})


def impossible(given: Inputs) -> dict[str, Tensor]:
    """{what is wrong: rows bool [N]} of values that are not numbers, out of range, or inconsistent."""
    wrong = {}
    for name, q in QUANTITIES.items():
        value = getattr(given, name)
        outside = ~((value >= q.low) & (value <= q.high))  # also true for NaN
        if bool(outside.any()):
            wrong[f"{name} is not within {q.low:g} to {q.high:g} {q.unit}".rstrip()] = outside
    shallow = given.tidal_volume_mL <= given.airway_dead_space_mL()
    if bool(shallow.any()):
        dead = f"{AIRWAY_DEAD_SPACE_mL_per_kg} mL/kg predicted weight"
        wrong[f"tidal_volume_mL does not exceed the airway dead space of {dead}"] = shallow
    return wrong


def check(given: Inputs) -> None:
    """Raise DataError that names every input out of its range, with the first row and the number of rows."""
    wrong = impossible(given)
    if wrong:
        problems = []
        for what, rows in wrong.items():
            at = int(rows.nonzero()[0])
            got = getattr(given, what.split()[0])[at].item()
            problems.append(f"{what} (row {at}: {got:g}; {int(rows.sum())} of {len(given)} rows)")
        raise DataError("inputs that no patient or ventilator has", "; ".join(problems), "correct or remove these rows")


def _column(value: Any, rows: int, device: str | torch.device) -> Tensor:
    column = torch.as_tensor(value, dtype=torch.float64, device=device)
    return column.expand(rows) if column.ndim == 0 else column
