"""Synthetic intensive-care stays from the lung model under ventilation, marked as synthetic everywhere.

Every patient has a baseline shunt; in some, an injury increases the shunt and collapses lung over hours. Inflammation
rises some hours before the injury, and also in patients without one, so that an onset is predictable but not certain.
Every hour is a steady state of the lung model. Tidal volume, PEEP, FiO2 and rate are the treatment, which responds to
the lung of the previous hour. Everything else (when a patient is ventilated, how often a gas is drawn, how precise a
reading is) follows simple rules with the numbers in the tables below and in `read`. Nothing was fitted to patients,
except the compliance, whose spread is that of the MIMIC-IV demo. The incidence of injury and its lead time were chosen
so that about a fifth of patients have an onset within 24 h after landmark 12 h, and a tree model predicts it with an
AUROC near 0.8.
"""

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from raylab.data.icu.concepts import EVENTS, STAYS, SourceData
from raylab.errors import UsageError
from raylab.physiology.parameters import QUANTITIES, inputs
from raylab.physiology.steady import steady_state

Array = NDArray[np.float64]

HOURS = 48
STEP = 1.0  # h between two states of the model

# lung parameters: the healthy value, and the change at `opened` = 1, a full injury
INJURY = {
    "shunt": (0.045, 0.17),
    "collapsed": (0.05, 0.30),
    "vq_log_sd": (0.55, 0.50),
    "alveolar_dead_space": (0.08, 0.30),
}
COMPLIANCE = (
    50.0,
    14.0,
    0.25,
)  # mL/cmH2O: mean, sd between patients; fraction lost to the injury in addition to collapse

# relative standard deviation of a reading; settings, scores and all other concepts are read exactly
NOISE = dict.fromkeys(
    ("hr", "map", "sysabp", "diasabp", "resp_rate", "tidal_volume", "plateau", "pao2", "paco2", "lactate", "hco3",
     "hemoglobin", "wbc", "platelets", "creatinine", "urine"), 0.03,
) | {"temp": 0.004, "spo2": 0.01, "sao2": 0.01, "ph": 0.002}  # fmt: skip

# readings per hour of a patient without trouble; multiplied by (1 + 1.5 trouble), except for urine
OFTEN = {
    "vital signs": 0.7,
    "temp, gcs": 0.25,
    "urine": 0.8,
    "laboratory": 0.06,
    "gas, ventilated": 0.14,
    "gas, not ventilated": 0.03,
    "ventilator": 0.35,
    "plateau": 0.12,
    "oxygen without ventilator": 0.2,
}
VITAL = ("hr", "map", "sysabp", "diasabp", "resp_rate", "spo2")
GAS = ("pao2", "paco2", "ph", "sao2", "lactate")  # from one blood sample, so at the same time
VENTILATOR = ("mech_vent", "peep", "tidal_volume")


def lungs(state: dict[str, Array]) -> dict[str, Array]:
    """Return outputs of the lung model for inputs [n, T]; NaN where a patient has no steady state.

    Inputs outside the model's range are clipped.
    """
    shape = np.broadcast_shapes(*(value.shape for value in state.values()))
    clipped = {
        name: np.clip(np.broadcast_to(value, shape), QUANTITIES[name].low, QUANTITIES[name].high).ravel()
        for name, value in state.items()
    }
    with torch.no_grad():
        steady = steady_state(inputs(clipped))
    return {name: value.numpy().reshape(shape) for name, value in steady.values.items()}


def read(patients: int, seed: int) -> SourceData:
    """Generate `patients` stays of 48 h, deterministic in (patients, seed)."""
    if patients < 1:
        raise UsageError(f"cannot generate {patients} virtual patients", do="give --patients 100 or more")
    rng = np.random.default_rng([seed, 2012])
    n = patients
    t = np.arange(0, HOURS, STEP)[None, :]  # [1, T]

    def draw(mean: float, sd: float, low: float, high: float) -> Array:
        return np.clip(rng.normal(mean, sd, (n, 1)), low, high)

    def wander(sd: float) -> Array:
        """Return smooth noise [n, T] with standard deviation `sd` and a correlation time of about 4 h."""
        keep = np.exp(-STEP / 4)
        noise = rng.normal(0, sd, (n, t.size))
        for i in range(1, t.size):
            noise[:, i] = keep * noise[:, i - 1] + np.sqrt(1 - keep**2) * noise[:, i]
        return noise

    def rise(start: Array, width: Array) -> Array:
        """Return 0 before `start`, then a rise towards 1 over `width` hours."""
        return 1 - np.exp(-np.clip(t - start, 0, None) / width)

    # the patients
    male = rng.random((n, 1)) < 0.56
    age, height = draw(64, 16, 18, 90), np.where(male, 176, 163) + draw(0, 7, -20, 20)
    weight = np.where(male, 86, 73) + draw(0, 16, -35, 70)
    icu_type = rng.integers(1, 5, (n, 1)).astype(float)

    # the course: inflammation (0 to 1) in some, and in most of these an injured lung hours later
    inflamed = rng.random((n, 1)) < 0.5
    injured = inflamed & (rng.random((n, 1)) < 0.75)
    begin = rng.uniform(2, 46, (n, 1))
    severity = inflamed * draw(0.75, 0.25, 0.2, 1.2)
    inflammation = severity * rise(begin - rng.uniform(8, 26, (n, 1)), draw(5, 2, 2, 10))
    opened = injured * severity * rise(begin, draw(8, 3, 2, 16))
    # the ventilator: from the start in some, otherwise some time after breathing fails; never in some
    trouble = inflammation + 2 * opened + wander(0.15)
    failing = np.where((trouble > 1.0).any(axis=1), t[0, (trouble > 1.0).argmax(axis=1)], np.inf)[:, None]
    intubated = np.where(rng.random((n, 1)) < 0.35, 0.0, failing + rng.exponential(2, (n, 1)))
    intubated = np.where(rng.random((n, 1)) < 0.1, np.inf, intubated)
    extubated = np.where((intubated == 0) & ~injured & (rng.random((n, 1)) < 0.6), rng.uniform(6, 40, (n, 1)), np.inf)
    ventilated = (t >= intubated) & (t < extubated)

    # the settings respond to the lung of the previous hour, in the steps that clinicians use
    seen = np.concatenate([opened[:, :1], opened[:, :-1]], axis=1)
    want = np.clip(0.35 + 0.4 * seen + draw(0.03, 0.05, -0.05, 0.2), 0.3, 1.0)
    fio2 = np.where(ventilated, np.ceil(want * 10 - 0.2) / 10, np.where(trouble > 0.8, 0.4, 0.21)).clip(0.21, 1)
    resp_rate = np.clip(15 + draw(0, 2, -5, 6) + 9 * inflammation + 4 * opened + wander(1.5), 8, 45)
    predicted = np.clip(np.where(male, 50.0, 45.5) + 0.91 * (height - 152.4), 35, 110)  # kg, ARDS network
    tidal = np.where(ventilated, 7.0, 6.5) * predicted + 0 * t
    peep = np.where(want > 0.6, 10.0, np.where(want > 0.45, 8.0, 5.0))

    # the lung
    vo2 = 3.3 * weight * (1 + 0.15 * inflammation)  # mL/min
    output = np.clip(5.2 + draw(0, 0.8, -2, 2) + 1.2 * inflammation + wander(0.3), 2.5, 11)  # L/min
    hb = draw(10.8, 1.6, 7, 16) + wander(0.3)
    lactate = np.clip(1.3 * np.exp(0.9 * inflammation + wander(0.25)), 0.4, 20)
    temp = 36.8 + draw(0, 0.3, -0.8, 0.8) + 1.1 * inflammation + wander(0.3)
    mean, sd, lost = COMPLIANCE
    injury = {name: first + more * opened for name, (first, more) in INJURY.items()}
    injury["shunt"] = injury["shunt"] * draw(1, 0.3, 0.3, 2) + wander(0.008)
    lung = lungs(
        {
            **injury,
            "fio2": fio2,
            "peep_cmH2O": np.where(ventilated, peep, 3.0),  # spontaneous breathing keeps the lung about as open
            "tidal_volume_mL": tidal,
            "rate_per_min": resp_rate,
            "opening_pressure_cmH2O": draw(20, 4, 8, 35),
            "compliance_mL_per_cmH2O": draw(mean, sd, 22, 85) * (1 - lost * opened),
            "cardiac_output_L_per_min": output,
            "vo2_mL_per_min": vo2,
            "hb_g_per_dL": hb,
            "base_excess_mmol_per_L": -1.2 * (lactate - 1.3) + wander(1.5),
            "temperature_C": temp,
            "predicted_weight_kg": predicted,
        }
    )
    pao2, paco2, ph, sao2 = (lung[name] for name in ("pao2_mmHg", "paco2_mmHg", "ph", "sao2"))

    # the circulation and the rest
    mean_pressure = np.clip(84 + draw(0, 8, -20, 20) - 14 * inflammation + wander(5), 35, 140)
    pulse = np.clip(52 + wander(7), 15, 110)
    state: dict[str, Array] = {
        "hr": 82 + draw(0, 11, -25, 30) + 24 * inflammation + wander(6),
        "map": mean_pressure,
        "sysabp": mean_pressure + pulse * 2 / 3,
        "diasabp": mean_pressure - pulse / 3,
        "resp_rate": resp_rate,
        "temp": temp,
        "spo2": np.clip(100 * sao2 + wander(1), 40, 100),
        "gcs": np.clip(np.round(np.where(ventilated, 8, 14) - 2 * inflammation + wander(1)), 3, 15),
        "urine": np.clip(75 - 30 * inflammation + wander(30), 0, None),
        "fio2": fio2,
        "mech_vent": np.ones_like(fio2),
        "peep": peep,
        "tidal_volume": tidal,
        "plateau": lung["plateau_cmH2O"],
        "pao2": pao2,
        "paco2": paco2,
        "ph": ph,
        "sao2": 100 * sao2,
        "lactate": lactate,
        "hco3": 0.0304 * paco2 * 10 ** (ph - 6.1),  # Henderson and Hasselbalch
        "hemoglobin": hb,
        "wbc": 9.5 * np.exp(0.5 * inflammation + draw(0, 0.3, -0.8, 0.8) + wander(0.1)),
        "platelets": 210 * np.exp(-0.4 * inflammation + draw(0, 0.35, -1, 1) + wander(0.05)),
        "creatinine": 1.0 * np.exp(0.5 * inflammation + draw(0, 0.4, -0.8, 1.2) + wander(0.05)),
    }
    # readings per hour; sicker patients are measured more often
    sick = 1 + 1.5 * np.clip(trouble, 0, 2)
    rate = dict.fromkeys(state, OFTEN["laboratory"] * sick)
    rate |= dict.fromkeys(VITAL, OFTEN["vital signs"] * sick)
    rate |= dict.fromkeys(("temp", "gcs"), OFTEN["temp, gcs"] * sick)
    rate |= dict.fromkeys(VENTILATOR, OFTEN["ventilator"] * sick) | {"plateau": OFTEN["plateau"] * sick}
    rate |= {
        "urine": OFTEN["urine"] * np.ones_like(sick),
        "fio2": np.where(ventilated, OFTEN["ventilator"] * sick, (fio2 > 0.21) * OFTEN["oxygen without ventilator"]),
    }
    gas = np.where(ventilated, OFTEN["gas, ventilated"], OFTEN["gas, not ventilated"]) * sick

    stay_id = np.array([f"synthetic-{i:05d}" for i in range(n)])
    rows: list[pl.DataFrame] = []

    def add(concept: str, patient: NDArray[np.int64], time: Array, value: Array) -> None:
        rows.append(
            pl.DataFrame({"stay_id": stay_id[patient], "time": time, "value": value}).with_columns(
                concept=pl.lit(concept)
            )
        )

    drawn = rng.random((n, t.size)) < 1 - np.exp(-gas * STEP)
    when = t + STEP * rng.random((n, t.size))
    for concept, values in state.items():
        if concept in GAS:
            at, time = drawn, when
        else:
            at = rng.random((n, t.size)) < 1 - np.exp(-rate[concept] * STEP)
            time = t + STEP * rng.random((n, t.size))
            if concept in ("mech_vent", "fio2"):  # charted when the tube goes in
                at = at | (ventilated & ~np.roll(ventilated, 1, axis=1))
            if concept in (*VENTILATOR, "plateau"):
                at = at & ventilated
        patient, step = np.nonzero(
            at & np.isfinite(values)
        )  # there are no readings where the lung model has no steady state
        reading = values[patient, step] * (1 + NOISE.get(concept, 0.0) * rng.normal(size=patient.size))
        if concept in ("spo2", "sao2"):
            reading = np.minimum(reading, 100)
        add(concept, patient, time[patient, step], reading)
    everyone = np.arange(n)
    for concept, fixed in {
        "age": np.floor(age),
        "sex": male.astype(float),
        "height": height,
        "weight_admission": weight,
        "icu_type": icu_type,
    }.items():
        add(concept, everyone, np.zeros(n), fixed[:, 0])

    events = pl.concat(rows).with_columns(subject_id=pl.col("stay_id")).select(EVENTS.names())
    stays = pl.DataFrame({"stay_id": stay_id}).with_columns(
        subject_id=pl.col("stay_id"), source=pl.lit("synthetic"), died=pl.lit(None, pl.Boolean)
    )
    return SourceData(events.lazy(), stays.select(STAYS.names()))
