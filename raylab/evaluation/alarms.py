"""Alarms of a rolling prediction, scored by events instead of rows.

An alarm is a prediction at or above a threshold, unless the same stay had an alarm in the last SILENCE_H hours. An
event is a stay's onset. An alarm recalls an event, and is a true alarm, if at + gap < onset <= at + gap + horizon.
(Event-based metrics as in Hyland 2020, Nat Med 26:364, and Hüser 2024 [M].)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.documents import Document
from raylab.evaluation.intervals import Floats, clustered, proportion
from raylab.score import Score

SILENCE_H = 4.0
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = 60  # thresholds tried between the lowest and the highest probability


@dataclass(frozen=True)
class Rolling:
    """Rows [N] of a rolling prediction, in any order: stay (0 to stays - 1), at and onset (h; onset is NaN if there is
    none), and p. `group` [stays] is the patient of each stay."""

    stay: NDArray[np.int64]
    at: Floats
    onset: Floats
    p: Floats
    group: NDArray[Any]
    gap: float
    horizon: float


def raise_alarms(rows: Rolling, threshold: float) -> NDArray[np.bool_]:
    """Return which rows [N] raise an alarm."""
    order = np.lexsort((rows.at, rows.stay))
    stay = rows.stay[order]
    place = np.arange(len(stay)) - np.searchsorted(stay, stay)  # of a row within its stay
    last_alarm = np.full(len(rows.group), -np.inf)
    alarm = np.zeros(len(stay), dtype=bool)
    for k in range(int(place.max()) + 1):
        now = order[place == k]
        now = now[(rows.p[now] >= threshold) & (rows.at[now] - last_alarm[rows.stay[now]] >= SILENCE_H)]
        alarm[now] = True
        last_alarm[rows.stay[now]] = rows.at[now]
    return alarm


def is_ahead(rows: Rolling) -> NDArray[np.bool_]:
    """Return whether an alarm of each row [N] would be true."""
    begin = rows.at + rows.gap
    return (rows.onset > begin) & (rows.onset <= begin + rows.horizon)


def counts(rows: Rolling, threshold: float) -> dict[str, Floats]:
    """Return per-stay arrays [stays]: event (1 if a row's horizon contains an onset), recalled, alarms, true (alarms),
    hours (predicted), and lead (h from the first true alarm to the onset, 0 without one)."""
    alarm, ahead = raise_alarms(rows, threshold), is_ahead(rows)

    def total(inside: NDArray[np.bool_]) -> Floats:
        return np.bincount(rows.stay[inside], minlength=len(rows.group)).astype(float)

    true = alarm & ahead
    lead = np.zeros(len(rows.group))
    np.maximum.at(lead, rows.stay[true], (rows.onset - rows.at)[true])
    return {
        "event": (total(ahead) > 0).astype(float),
        "recalled": (total(true) > 0).astype(float),
        "alarms": total(alarm),
        "true": total(true),
        "hours": total(np.ones(len(rows.stay), dtype=bool)),
        "lead": lead,
    }


def try_thresholds(rows: Rolling) -> list[tuple[float, dict[str, Floats]]]:
    """Return (threshold, counts) for thresholds over the range of the probabilities, the highest first."""
    tried = np.unique(np.quantile(rows.p, np.linspace(0, 1, STEPS)))[::-1]
    return [(float(t), counts(rows, float(t))) for t in tried]


def find_threshold(
    tried: list[tuple[float, dict[str, Floats]]], recall: float
) -> tuple[float, dict[str, Floats]] | None:
    """Return the highest of the thresholds from `try_thresholds` that recalls this fraction of the events, with its
    counts; None if there is none, or no event."""
    for threshold, of in tried:
        events = of["event"].sum()
        if events and of["recalled"].sum() >= recall * events - 1e-9:
            return threshold, of
    return None


class Alarms(Document):
    """Scores of the alarms at one threshold, or `why` no threshold recalls enough events."""

    event_recall_at_least: float
    why: str | None = None
    threshold: float | None = None
    event_recall: Score | None = None
    alarm_precision: Score | None = None
    alarms_per_patient_day: Score | None = None
    lead_h: Score | None = None


def scores(rows: Rolling, bootstraps: int = 1000, seed: int = 0) -> list[Alarms]:
    """Score the highest threshold that reaches each of RECALLS.

    Event recall, alarm precision, alarms per patient-day and mean lead time (h), each with an interval over patients at
    that threshold (Wilson intervals for recall and precision).
    """
    tried = try_thresholds(rows)
    table = []
    for recall in RECALLS:
        found = find_threshold(tried, recall)
        if found is None:
            table.append(Alarms(event_recall_at_least=recall, why="no threshold recalls enough events"))
            continue
        threshold, of = found
        recalled = of["recalled"] > 0  # the lead time is a mean over these stays only

        def alarms(w: Floats, of: dict[str, Floats] = of) -> dict[str, Floats]:
            return {"alarms_per_patient_day": 24 * (w @ of["alarms"]) / (w @ of["hours"])}

        def lead(w: Floats, lead: Floats = of["lead"][recalled]) -> dict[str, Floats]:
            return {"lead_h": w @ lead / w.sum(axis=1)}

        intervals = {
            "event_recall": proportion(of["recalled"], of["event"], rows.group, "no event"),
            "alarm_precision": proportion(of["true"], of["alarms"], rows.group, "no alarm"),
            **clustered(alarms, rows.group, bootstraps, seed, {}, {}),
            **clustered(
                lead, rows.group[recalled], bootstraps, seed, {}, {"with a recalled event": recalled[recalled]}
            ),
        }
        table.append(Alarms(event_recall_at_least=recall, threshold=threshold, **intervals))
    return table
