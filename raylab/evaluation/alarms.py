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


def counts(rows: Rolling, threshold: float) -> dict[str, Floats]:
    """Return per-stay arrays [stays]: event (1 if a row's horizon contains an onset), recalled, alarms, true (alarms),
    hours (predicted), and lead (h from the first true alarm to the onset, 0 without one)."""
    order = np.lexsort((rows.at, rows.stay))
    stay, at, onset, p = rows.stay[order], rows.at[order], rows.onset[order], rows.p[order]
    n = len(rows.group)
    last_alarm = np.full(n, -np.inf)
    place = np.arange(len(stay)) - np.searchsorted(stay, stay)  # of a row within its stay
    totals = {name: np.zeros(n) for name in ("event", "recalled", "alarms", "true", "hours", "lead")}
    ahead = (onset > at + rows.gap) & (onset <= at + rows.gap + rows.horizon)
    for k in range(int(place.max()) + 1):
        now = place == k
        s = stay[now]
        alarm = (p[now] >= threshold) & (at[now] - last_alarm[s] >= SILENCE_H)
        true = alarm & ahead[now]
        first = true & (totals["recalled"][s] == 0)
        totals["lead"][s[first]] = (onset[now] - at[now])[first]
        totals["recalled"][s[true]] = 1
        totals["alarms"][s] += alarm
        totals["true"][s] += true
        totals["hours"][s] += 1
        totals["event"][s] = np.maximum(totals["event"][s], ahead[now])
        last_alarm[s[alarm]] = at[now][alarm]
    return totals


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
    tried = [(float(t), counts(rows, float(t))) for t in np.unique(np.quantile(rows.p, np.linspace(0, 1, STEPS)))[::-1]]
    table = []
    for recall in RECALLS:
        reached = [
            (t, c) for t, c in tried if c["event"].sum() and c["recalled"].sum() >= recall * c["event"].sum() - 1e-9
        ]
        if not reached:
            table.append(Alarms(event_recall_at_least=recall, why="no threshold recalls enough events"))
            continue
        threshold, of = reached[0]

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
