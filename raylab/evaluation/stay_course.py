"""The course of single stays under a rolling prediction: risk, alarms, what moved the risk, and what was measured when.

Everything is in the units of concepts.toml, and in hours since the start of the stay.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data.icu.concepts import SERIES, STATIC
from raylab.data.icu.dataset import IcuSamples
from raylab.evaluation.intervals import Floats

BACK_H = 4.0  # a moment is compared with the risk so long before it, or with the first one of its stay
SHOWN = 6  # inputs that moved the risk most, at a moment


@dataclass(frozen=True)
class Reading:
    """The latest usable value before a prediction, and when it was recorded (h); both None if there is none."""

    value: float | None = None
    time: float | None = None


@dataclass(frozen=True)
class Push:
    """How one input has moved the logit of the risk since the moment before, and its readings then and now."""

    name: str
    logit: float
    before: Reading
    now: Reading


@dataclass(frozen=True)
class Moment:
    """A prediction that is explained: an alarm, or the highest risk of a stay without one.

    `before_h` and `before_risk` are the prediction with which it is compared; None at the first prediction of a stay,
    which is compared with a patient without measurements. `pushes`: the inputs that moved it most, and `others`, the
    sum of the logits of all the rest.
    """

    at_h: float
    risk: float
    is_alarm: bool
    before_h: float | None
    before_risk: float | None
    pushes: tuple[Push, ...]
    others: float


@dataclass(frozen=True)
class Course:
    """One stay.

    at, risk [n]   of its predictions, in the order of time
    alarm, ahead [n]  whether a prediction raised an alarm; whether an alarm would be true
    onset_h        when the label's criteria were met; None if they were not
    outcome        how the last prediction ended (a column of samples.parquet)
    readings       series -> (time [k], value [k]), the last usable value of each hour, also after the last prediction
    static         its values; missing ones are left out
    """

    stay_id: str
    at: Floats
    risk: Floats
    alarm: NDArray[np.bool_]
    ahead: NDArray[np.bool_]
    onset_h: float | None
    outcome: str
    moments: tuple[Moment, ...]
    readings: Mapping[str, tuple[Floats, Floats]]
    static: Mapping[str, float]

    @property
    def alarms(self) -> Floats:
        """When it raised alarms [k] (h)."""
        return self.at[self.alarm]

    @property
    def lead_h(self) -> float | None:
        """Hours from the first true alarm to the onset; None if no alarm was true."""
        true = self.at[self.alarm & self.ahead]
        return self.onset_h - float(true[0]) if self.onset_h is not None and len(true) else None


def find_moments(at: Floats, risk: Floats, alarm: NDArray[np.bool_]) -> Iterator[tuple[int, int | None]]:
    """Yield (place of a moment, place of the prediction it is compared with) of one stay's predictions, in the order of
    time."""
    for place in np.flatnonzero(alarm) if alarm.any() else [int(risk.argmax())]:
        earlier = np.flatnonzero(at <= max(at[place] - BACK_H, at[0]))
        yield int(place), int(earlier[-1]) if place else None


def rows_to_explain(samples: IcuSamples, p: Floats, alarm: NDArray[np.bool_], stays: list[str]) -> NDArray[np.int64]:
    """Return the rows of `samples` whose attributions `courses` needs, in their order."""
    rows: set[int] = set()
    for place in places(samples, stays).values():
        at = samples.rows["at_h"].to_numpy()[place]
        for pair in find_moments(at, p[place], alarm[place]):
            rows |= {int(place[k]) for k in pair if k is not None}
    return np.array(sorted(rows), dtype=np.int64)


def places(samples: IcuSamples, stays: list[str]) -> dict[str, NDArray[np.int64]]:
    """Return stay -> its rows of `samples` in the order of time."""
    rows = samples.rows.select("stay_id", "at_h").with_row_index("place").filter(pl.col("stay_id").is_in(stays))
    found = rows.sort("at_h").group_by("stay_id").agg("place").iter_rows()
    by_stay = {stay: np.array(place, dtype=np.int64) for stay, place in found}
    return {stay: by_stay[stay] for stay in stays}


@dataclass(frozen=True)
class Readings:
    """What is known of one stay: its hourly grid, by hour, and its static values."""

    grid: pl.DataFrame
    static: Mapping[str, float]

    def latest(self, name: str, at: float) -> Reading:
        """The reading of an input at a prediction."""
        if name in self.static:
            return Reading(self.static[name])
        if name not in self.grid.columns:
            return Reading()
        past = self.grid.filter(pl.col("hour") < at)
        since, value = past[f"{name}__since"][-1], past[name].drop_nulls()
        return Reading() if since is None else Reading(float(value[-1]), at - since)

    def pair(self, name: str, at: Floats, before: int | None, now: int) -> tuple[Reading, Reading]:
        """The readings of an input at two of the predictions `at` [n]."""
        earlier = Reading() if before is None else self.latest(name, float(at[before]))
        return earlier, self.latest(name, float(at[now]))

    def series(self) -> dict[str, tuple[Floats, Floats]]:
        """(time, value) of each series with a usable value, the last one of each hour."""
        found = {}
        for name in SERIES:
            if name in self.grid.columns:
                measured = self.grid.filter(pl.col(f"{name}__mask"))
                time = measured.select(pl.col("hour") + 1 - pl.col(f"{name}__since").cast(pl.Float64)).to_series()
                if measured.height:
                    found[name] = time.to_numpy(), measured[name].cast(pl.Float64).to_numpy()
        return found


def courses(
    samples: IcuSamples,
    p: Floats,
    alarm: NDArray[np.bool_],
    ahead: NDArray[np.bool_],
    stays: list[str],
    hours: pl.DataFrame,
    attributions: Mapping[int, Floats],
) -> Iterator[Course]:
    """Yield the course of each of `stays`.

    p, alarm and ahead [N] are of the rows of `samples`; `hours` is the hourly grid (timegrid.py) of these stays;
    `attributions` has, for each row of `rows_to_explain`, the attributions of the logit [F + S], by the features and
    then the static values of the samples' spec.
    """
    names = [*samples.spec["features"], *samples.spec["static"]]
    grids = {str(key[0]): table for key, table in hours.sort("hour").partition_by("stay_id", as_dict=True).items()}
    for stay, place in places(samples, stays).items():
        rows = samples.rows[place.tolist()]
        last = rows.row(-1, named=True)
        at, risk = rows["at_h"].to_numpy(), p[place]
        static = {name: float(last[name]) for name in STATIC if last.get(name) is not None}
        readings = Readings(grids[stay], static)
        moments = []
        for now, before in find_moments(at, risk, alarm[place]):
            moved = attributions[int(place[now])]
            if before is not None:
                moved = moved - attributions[int(place[before])]
            most = np.argsort(-np.abs(moved), kind="stable")[:SHOWN]
            moments.append(
                Moment(
                    at_h=float(at[now]),
                    risk=float(risk[now]),
                    is_alarm=bool(alarm[place[now]]),
                    before_h=None if before is None else float(at[before]),
                    before_risk=None if before is None else float(risk[before]),
                    pushes=tuple(
                        Push(names[i], float(moved[i]), *readings.pair(names[i], at, before, now)) for i in most
                    ),
                    others=float(np.delete(moved, most).sum()),
                )
            )
        yield Course(
            stay_id=stay,
            at=at,
            risk=risk,
            alarm=alarm[place],
            ahead=ahead[place],
            onset_h=last["onset_h"],
            outcome=last["outcome"],
            moments=tuple(moments),
            readings=readings.series(),
            static=static,
        )
