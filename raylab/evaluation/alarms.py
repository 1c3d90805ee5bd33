"""Alarms of a rolling prediction, counted as a ward would: events, not rows.

An alarm is a prediction at or above a threshold, unless the same stay had one in the last SILENCE_H hours. An event is
a stay's onset. It is recalled by an alarm whose horizon holds it, at + gap < onset <= at + gap + horizon; such an alarm
is a true one. (Event-based metrics as in Hyland 2020, Nat Med 26:364, and Hüser 2024 [M].)
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
STEPS = 60  # thresholds tried between the least and the largest probability


@dataclass(frozen=True)
class Rolling:
    """Rows [N] of a rolling prediction: stay (running number), at and onset (h; onset NaN without one), p; in any
    order. `group` [stays] is the patient of each stay."""

    stay: NDArray[np.int64]
    at: Floats
    onset: Floats
    p: Floats
    group: NDArray[Any]
    gap: float
    horizon: float


def counts(rows: Rolling, threshold: float) -> dict[str, Floats]:
    """Of every stay [stays]: event (1 where an onset can be foreseen), recalled, alarms, true (alarms), hours watched,
    and lead (h from the first true alarm to the onset, 0 without one)."""
    order = np.lexsort((rows.at, rows.stay))
    stay, at, onset, p = rows.stay[order], rows.at[order], rows.onset[order], rows.p[order]
    n = len(rows.group)
    last_alarm = np.full(n, -np.inf)
    place = np.arange(len(stay)) - np.searchsorted(stay, stay)  # of a row within its stay
    found = {name: np.zeros(n) for name in ("event", "recalled", "alarms", "true", "hours", "lead")}
    ahead = (onset > at + rows.gap) & (onset <= at + rows.gap + rows.horizon)
    for k in range(int(place.max()) + 1):
        now = place == k
        s = stay[now]
        alarm = (p[now] >= threshold) & (at[now] - last_alarm[s] >= SILENCE_H)
        true = alarm & ahead[now]
        first = true & (found["recalled"][s] == 0)
        found["lead"][s[first]] = (onset[now] - at[now])[first]
        found["recalled"][s[true]] = 1
        found["alarms"][s] += alarm
        found["true"][s] += true
        found["hours"][s] += 1
        found["event"][s] = np.maximum(found["event"][s], ahead[now])
        last_alarm[s[alarm]] = at[now][alarm]
    return found


class Alarms(Document):
    """What alarms at a threshold are worth; `why` there is none that recalls so many events."""

    event_recall_at_least: float
    why: str | None = None
    threshold: float | None = None
    event_recall: Score | None = None
    alarm_precision: Score | None = None
    alarms_per_patient_day: Score | None = None
    lead_h: Score | None = None


def scores(rows: Rolling, bootstraps: int = 1000, seed: int = 0) -> list[Alarms]:
    """For each of RECALLS the highest threshold that reaches it: event recall, alarm precision, alarms a patient-day
    and mean lead time (h), each with its interval over patients at that threshold (recall and precision: Wilson's)."""
    found = [(float(t), counts(rows, float(t))) for t in np.unique(np.quantile(rows.p, np.linspace(0, 1, STEPS)))[::-1]]
    table = []
    for recall in RECALLS:
        reached = [
            (t, c) for t, c in found if c["event"].sum() and c["recalled"].sum() >= recall * c["event"].sum() - 1e-9
        ]
        if not reached:
            table.append(Alarms(event_recall_at_least=recall, why="no threshold recalls so many events"))
            continue
        threshold, of = reached[0]

        recalled = of["recalled"] > 0  # the lead is a mean over these stays alone

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
