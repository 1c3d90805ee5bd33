"""meta.json of sweeps of the lung model."""

from typing import Any

from raylab.data import prepared


class SweepMeta(prepared.Meta):
    """Rows are virtual; `counts` are of rows with a steady state."""

    made_by = "raylab simulate living --out"

    sweep: dict[str, Any]
    """the recipe of the sweep, as `raylab.physiology.sweep.Sweep` reads it"""
    rows: int
    status: dict[str, int]
    """how many rows the solver left with which status"""
