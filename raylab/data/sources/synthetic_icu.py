"""Virtual intensive-care stays: a small gas-exchange model under a ventilator. Synthetic, and named so everywhere.

Every patient has a baseline shunt; in some an injury opens a further shunt over hours. Inflammation rises some hours
before the lung does, and also in patients whose lung stays well, so that an onset can be foreseen but never with
certainty. The lung model is four textbook equations (below); everything else (who is ventilated when, how often a gas
is drawn) is a plain rule with its numbers in sight. Nothing here was fitted to patients; how many
fall ill, and how long before it shows, was chosen so that about a fifth has an onset within 24 h after landmark 12 h
and a tree model foresees it with an AUROC near .8.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data.concepts import EVENTS, STAYS, Extract
from raylab.errors import UsageError

Array = NDArray[np.float64]

HOURS = 48
STEP = 0.5  # h between two states of the model
BAROMETRIC, WATER = 760.0, 47.0  # mmHg, at sea level and 37 degC
RQ = 0.8  # respiratory quotient VCO2 / VO2


def severinghaus(po2: Array) -> Array:
    """Haemoglobin O2 saturation (0 to 1) at pH 7.4, 37 degC. Severinghaus, J Appl Physiol 1979;46:599."""
    return 1 / (23400 / (po2**3 + 150 * po2) + 1)


def alveolar_po2(fio2: Array, paco2: Array) -> Array:
    """Alveolar gas equation, mmHg: FiO2 (Pb - 47) - PaCO2 (FiO2 + (1 - FiO2) / R)."""
    return fio2 * (BAROMETRIC - WATER) - paco2 * (fio2 + (1 - fio2) / RQ)


def o2_content(po2: Array, hb: Array) -> Array:
    """mL O2 per dL blood: 1.34 mL/g on haemoglobin (g/dL) and 0.003 mL/dL/mmHg dissolved."""
    return 1.34 * hb * severinghaus(po2) + 0.003 * po2


def arterial_po2(alveolar: Array, shunt: Array, hb: Array, extraction: Array) -> Array:
    """PaO2 (mmHg) by the shunt equation Qs/Qt = (Cc - Ca) / (Cc - Cv) with Cv = Ca - VO2 / CO.

    extraction = VO2 / CO in mL/dL. Solved for Ca = Cc - extraction * s / (1 - s), then the content curve is inverted
    by bisection, which holds 0.001 mmHg after 20 halvings of at most 713 mmHg.
    """
    content = o2_content(alveolar, hb) - extraction * shunt / (1 - shunt)
    low, high = np.ones_like(content), alveolar.copy()
    for _ in range(20):
        middle = (low + high) / 2
        above = o2_content(middle, hb) > content
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def henderson_hasselbalch(hco3: Array, paco2: Array) -> Array:
    """pH = 6.1 + log10(HCO3 / (0.03 PaCO2)), HCO3 in mmol/L, PaCO2 in mmHg."""
    return 6.1 + np.log10(hco3 / (0.03 * paco2))


def read(patients: int, seed: int) -> Extract:
    """`patients` stays of 48 h, the same for the same (patients, seed)."""
    if patients < 1:
        raise UsageError(f"cannot make {patients} virtual patients", do="give --patients 100 or more")
    rng = np.random.default_rng([seed, 2012])
    n = patients
    t = np.arange(0, HOURS, STEP)[None, :]  # [1, T]

    def draw(mean: float, sd: float, low: float, high: float) -> Array:
        return np.clip(rng.normal(mean, sd, (n, 1)), low, high)

    def wander(sd: float) -> Array:
        """Smooth noise [n, T] of standard deviation `sd` that forgets itself over about 4 h."""
        keep = np.exp(-STEP / 4)
        noise = rng.normal(0, sd, (n, t.size))
        for i in range(1, t.size):
            noise[:, i] = keep * noise[:, i - 1] + np.sqrt(1 - keep**2) * noise[:, i]
        return noise

    def rise(start: Array, width: Array) -> Array:
        """0 before `start`, towards 1 over `width` hours."""
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
    shunt = np.clip(draw(0.045, 0.015, 0.01, 0.08) + 0.3 * opened + wander(0.008), 0.005, 0.6)

    # the ventilator: from the start in some, else when breathing fails and someone acts on it; some never
    trouble = inflammation + 2 * opened + wander(0.15)
    failing = np.where((trouble > 1.0).any(axis=1), t[0, (trouble > 1.0).argmax(axis=1)], np.inf)[:, None]
    intubated = np.where(rng.random((n, 1)) < 0.35, 0.0, failing + rng.exponential(2, (n, 1)))
    intubated = np.where(rng.random((n, 1)) < 0.1, np.inf, intubated)
    extubated = np.where((intubated == 0) & ~injured & (rng.random((n, 1)) < 0.6), rng.uniform(6, 40, (n, 1)), np.inf)
    ventilated = (t >= intubated) & (t < extubated)

    # the settings answer the lung of an hour ago, in the steps that clinicians use
    seen = np.concatenate([shunt[:, :2], shunt[:, :-2]], axis=1)
    want = np.clip(0.35 + 1.3 * (seen - 0.05) + draw(0.03, 0.05, -0.05, 0.2), 0.3, 1.0)
    fio2 = np.where(ventilated, np.ceil(want * 10 - 0.2) / 10, np.where(trouble > 0.8, 0.4, 0.21)).clip(0.21, 1)
    resp_rate = np.clip(15 + draw(0, 2, -5, 6) + 9 * inflammation + 4 * opened + wander(1.5), 8, 45)
    tidal = np.where(ventilated, 7.0, 6.5) * (height - 100) * 0.93  # mL, per predicted body weight about height - 100
    peep = np.where(want > 0.6, 10.0, np.where(want > 0.45, 8.0, 5.0))

    # the lung
    dead_space = np.clip(0.32 + 0.2 * opened + wander(0.02), 0.2, 0.75)
    vo2 = 3.3 * weight * (1 + 0.15 * inflammation)  # mL/min
    output = np.clip(5.2 + draw(0, 0.8, -2, 2) + 1.2 * inflammation + wander(0.3), 2.5, 11)  # L/min
    hb = draw(10.8, 1.6, 7, 16) + wander(0.3)
    paco2 = np.clip(0.863 * RQ * vo2 / (resp_rate * tidal * (1 - dead_space) / 1000), 18, 95)
    pao2 = arterial_po2(alveolar_po2(fio2, paco2), shunt, hb, vo2 / (output * 10))
    sao2 = 100 * severinghaus(pao2)
    lactate = np.clip(1.3 * np.exp(0.9 * inflammation + wander(0.25)), 0.4, 20)
    hco3 = np.clip(24 - 1.2 * (lactate - 1.3) + wander(1.5), 6, 40)
    compliance = np.clip(draw(48, 8, 25, 80) * (1 - 0.45 * opened), 12, 80)  # mL/cmH2O

    # the circulation and the rest
    mean_pressure = np.clip(84 + draw(0, 8, -20, 20) - 14 * inflammation + wander(5), 35, 140)
    pulse = np.clip(52 + wander(7), 15, 110)
    state: dict[str, Array] = {
        "hr": 82 + draw(0, 11, -25, 30) + 24 * inflammation + wander(6),
        "map": mean_pressure,
        "sysabp": mean_pressure + pulse * 2 / 3,
        "diasabp": mean_pressure - pulse / 3,
        "resp_rate": resp_rate,
        "temp": 36.8 + draw(0, 0.3, -0.8, 0.8) + 1.1 * inflammation + wander(0.3),
        "spo2": np.clip(sao2 + wander(1), 40, 100),
        "gcs": np.clip(np.round(np.where(ventilated, 8, 14) - 2 * inflammation + wander(1)), 3, 15),
        "urine": np.clip(75 - 30 * inflammation + wander(30), 0, None),
        "fio2": fio2,
        "mech_vent": np.ones_like(fio2),
        "peep": peep,
        "tidal_volume": tidal,
        "plateau": peep + tidal / compliance,
        "pao2": pao2,
        "paco2": paco2,
        "ph": henderson_hasselbalch(hco3, paco2),
        "sao2": sao2,
        "lactate": lactate,
        "hco3": hco3,
        "hemoglobin": hb,
        "wbc": 9.5 * np.exp(0.5 * inflammation + draw(0, 0.3, -0.8, 0.8) + wander(0.1)),
        "platelets": 210 * np.exp(-0.4 * inflammation + draw(0, 0.35, -1, 1) + wander(0.05)),
        "creatinine": 1.0 * np.exp(0.5 * inflammation + draw(0, 0.4, -0.8, 1.2) + wander(0.05)),
    }
    # relative error of one reading; settings and scores are read exactly
    noise = dict.fromkeys(state, 0.03) | dict.fromkeys(("fio2", "mech_vent", "peep", "gcs"), 0.0)
    noise |= {"temp": 0.004, "spo2": 0.01, "sao2": 0.01, "ph": 0.002}

    # readings an hour; the sicker, the more
    sick = 1 + 1.5 * np.clip(trouble, 0, 2)
    settings = ventilated * 0.35 * sick
    gas = np.where(ventilated, 0.14, 0.03) * sick
    laboratory = 0.06 * sick
    often = dict.fromkeys(("hr", "map", "sysabp", "diasabp", "resp_rate", "spo2"), 0.7 * sick)
    often |= dict.fromkeys(("temp", "gcs"), 0.25 * sick) | {"urine": 0.8 * np.ones_like(sick)}
    often |= dict.fromkeys(("mech_vent", "peep", "tidal_volume"), settings) | {"plateau": settings / 3}
    often |= {"fio2": np.where(ventilated, settings, (fio2 > 0.21) * 0.2)}

    stay_id = np.array([f"synthetic-{i:05d}" for i in range(n)])
    rows: list[pl.DataFrame] = []

    def add(concept: str, patient: NDArray[np.int64], time: Array, value: Array) -> None:
        rows.append(
            pl.DataFrame({"stay_id": stay_id[patient], "time": time, "value": value}).with_columns(
                concept=pl.lit(concept)
            )
        )

    drawn = rng.random((n, t.size)) < 1 - np.exp(-gas * STEP)  # one needle, one time for all of a gas
    when = t + STEP * rng.random((n, t.size))
    for concept, values in state.items():
        if concept in ("pao2", "paco2", "ph", "sao2", "lactate"):
            at, time = drawn, when
        else:
            rate = often.get(concept, laboratory)
            at = rng.random((n, t.size)) < 1 - np.exp(-rate * STEP)
            time = t + STEP * rng.random((n, t.size))
            if concept in ("mech_vent", "fio2"):  # charted when the tube goes in
                at = at | (ventilated & ~np.roll(ventilated, 1, axis=1))
            if concept in ("mech_vent", "peep", "tidal_volume", "plateau"):
                at = at & ventilated
        patient, step = np.nonzero(at)
        reading = values[patient, step] * (1 + noise[concept] * rng.normal(size=patient.size))
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
    return Extract(events.lazy(), stays.select(STAYS.names()))
