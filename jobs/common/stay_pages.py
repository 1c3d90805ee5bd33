"""Pages of single stays under a rolling prediction, for clinicians: one HTML file a stay, and an index.

They have no script and refer to nothing outside; they print, and follow the reader's choice of dark or light. Stays are
numbered; the pages name no patient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raylab.data.icu.concepts import CONCEPTS
from raylab.data.icu.labels import GRADES, SEVERITY
from raylab.data.icu.meta import IcuMeta
from raylab.evaluation.alarms import SILENCE_H
from raylab.evaluation.stay_course import Course, Moment, Push, Reading
from raylab.files import write_text
from raylab.score import Score
from tracking.provenance import Provenance, render

CHARTS = ("pf", "sf", "spo2", "fio2", "peep", "resp_rate", "paco2", "ph", "hr", "map", "temp", "lactate")
"""Series that are drawn as curves; a line of marks shows when each of the others was measured."""
UNITS = {
    "1/min": "/min",
    "degC": "°C",
    "ug/L": "µg/L",
    "K/uL": "×10⁹/L",
    "cmH2O": "cmH₂O",
    "mL/cmH2O": "mL/cmH₂O",
    "pH": "",
    "points": "",
}
WORDS = {
    "mech_vent": {1: "yes", 0: "no"},
    "niv": {1: "yes", 0: "no"},
    "sex": {1: "male", 0: "female"},
    "icu_type": {1: "coronary", 2: "cardiac surgery", 3: "medical", 4: "surgical"},
}
RISK_TOPS = (0.1, 0.2, 0.3, 0.5, 1.0)  # of the axis of the risk

# the drawing, in px
WIDTH, LEFT, RIGHT = 980.0, 215.0, 150.0
RISK_HEIGHT, CHART_HEIGHT, STRIP_HEIGHT = 260.0, 74.0, 19.0
LABEL_GAP = 13.0  # between two labels at the right


@dataclass(frozen=True)
class Ward:
    """What all pages say: the run, its data, the threshold of alarms and where it came from, the scores of the alarms
    on `split`, and how many stays there are."""

    run: str
    model: str
    data: str
    split: str
    meta: IcuMeta
    threshold: float
    threshold_is: str
    recall: Score
    precision: Score
    stays: int
    top: float  # of the axis of the risk
    origin: tuple[Provenance, ...] = ()

    @property
    def provenance(self) -> str:
        """Of the run, as the pages have it."""
        return render(self.origin)

    @property
    def hours(self) -> float:
        assert self.meta.until_h is not None  # checked: the data is rolling
        return float(self.meta.until_h)

    @property
    def average(self) -> float:
        """The fraction of predictions in train that an onset follows within the horizon."""
        train = self.meta.counts["train"]
        return train["positive"] / train["n"]


def risk_top(highest: float) -> float:
    """The top of the axis of the risk, the same on all pages."""
    return next(top for top in RISK_TOPS if top >= min(1.0, highest * 1.05))


def write_page(path: Path, course: Course, number: int, ward: Ward) -> dict[str, Any]:
    """Write the page of a stay; returns its line of the index."""
    text = TEMPLATES.get_template("stay.html.j2").render(
        ward=ward,
        number=number,
        headline=describe(course, ward),
        facts=[(CONCEPTS[name].title, words(name, value)) for name, value in course.static.items() if name in CONCEPTS],
        risk=draw_risk(course, ward),
        moments=[describe_moment(moment, course, ward) for moment in course.moments],
        charts=[draw_chart(name, course, ward) for name in CHARTS if name in course.readings],
        absent=[CONCEPTS[name].title for name in CHARTS if name not in course.readings],
        strips=draw_strips(course, ward),
        label=ward.meta.label,
        silence=SILENCE_H,
    )
    write_text(path, text)
    return {
        "number": number,
        "page": path.name,
        "risk": float(course.risk.max()),
        "line": _line([(at, risk) for at, risk in zip(course.at, course.risk, strict=True)], 0, 120, ward.hours,
                      30, ward.top),
        "alarms": len(course.alarms),
        "first": float(course.alarms[0]) if len(course.alarms) else None,
        "onset": course.onset_h,
        "lead": course.lead_h,
    }  # fmt: skip


def write_index(path: Path, lines: Sequence[dict[str, Any]], ward: Ward) -> None:
    text = TEMPLATES.get_template("stays.html.j2").render(ward=ward, lines=lines, label=ward.meta.label)
    write_text(path, text)


# --- in words


def unit(name: str) -> str:
    """The unit of a concept as it is printed after a number."""
    if name not in CONCEPTS or name in WORDS:
        return ""
    given = "%" if name == "fio2" else CONCEPTS[name].unit
    return UNITS.get(given, given)


def shown(name: str, value: float) -> float:
    """A value in the unit in which it is printed: FiO2 in percent."""
    return 100 * value if name == "fio2" else value


def number_text(name: str, value: float) -> str:
    """A value as it is charted, without unit."""
    decimals = CONCEPTS[name].decimals() if name in CONCEPTS else 2
    return f"{round(shown(name, value), max(0, decimals)):g}"


def words(name: str, value: float) -> str:
    """A value with its unit, or what it means."""
    if name in WORDS:
        return WORDS[name].get(round(value), f"{value:g}")
    return f"{number_text(name, value)} {unit(name)}".rstrip()


def title(name: str) -> str:
    return CONCEPTS[name].title if name in CONCEPTS else name.replace("_", " ")


def percent(p: float) -> str:
    return f"{p:.0%}" if p >= 0.095 else f"{p:.1%}"


def describe(course: Course, ward: Ward) -> list[str]:
    """What happened, in a few sentences."""
    alarms = course.alarms
    first = f"The first alarm came at {alarms[0]:g} h" if len(alarms) else ""
    if course.onset_h is None:
        text = f"No onset is recorded. The risk was predicted from {course.at[0]:g} to {course.at[-1]:g} h."
        if not len(alarms):
            return [text, "There was no alarm."]
        if len(alarms) == 1:
            return [text, f"There was one alarm, at {alarms[0]:g} h, and no onset followed it."]
        return [text, f"{first}; there were {len(alarms)} alarms, and no onset followed any of them."]
    text = f"Onset at {course.onset_h:.1f} h after admission to the ICU."
    if not len(alarms):
        return [text, "There was no alarm before it."]
    if course.lead_h is None:
        late = f"more than {ward.meta.gap_h + (ward.meta.horizon_h or 0):g} h before the onset"
        if len(alarms) == 1:
            return [text, f"The only alarm came at {alarms[0]:g} h, {late}: too early to count as right."]
        return [text, f"{first}. All {len(alarms)} came {late}: too early to count as right."]
    true = course.at[course.alarm & course.ahead]
    text_of_alarms = f"The first alarm that counts as right came at {true[0]:g} h, {course.lead_h:.1f} h before it."
    return [text, text_of_alarms, f"Alarms in all: {len(alarms)}."]


def describe_moment(moment: Moment, course: Course, ward: Ward) -> dict[str, Any]:
    """A table of what moved the risk."""
    if moment.is_alarm:
        place = int((course.at == moment.at_h).argmax())
        end = "followed by the onset in time" if course.ahead[place] else "not followed by an onset in time"
        heading = f"Alarm at {moment.at_h:g} h: risk {percent(moment.risk)}"
    else:
        heading, end = f"Highest risk, at {moment.at_h:g} h: {percent(moment.risk)}", "no alarm"
    if moment.before_h is None or moment.before_risk is None:
        compared = "Compared with a patient of whom nothing is known, as there is no earlier prediction:"
    else:
        gone = moment.at_h - moment.before_h
        compared = f"Compared with {gone:g} h earlier, at {moment.before_h:g} h, when it was "
        compared += f"{percent(moment.before_risk)}:"
    largest = max([abs(push.logit) for push in moment.pushes] + [abs(moment.others), 1e-9])
    rows = [
        {
            "what": title(push.name),
            "values": describe_values(push, moment),
            "when": describe_time(push.now, moment),
            **effect(push.logit, largest),
        }
        for push in moment.pushes
    ]
    rows.append({"what": "everything else", "values": "", "when": "", **effect(moment.others, largest)})
    total = sum(push.logit for push in moment.pushes) + moment.others
    return {"heading": heading, "end": end, "compared": compared, "rows": rows, "total": odds(total)}


def describe_values(push: Push, moment: Moment) -> str:
    now, before = push.now.value, push.before.value
    if now is None:
        return "not measured" if before is None else f"no usable value any more ({words(push.name, before)} before)"
    if before is None or push.now.time is None:
        new = moment.before_h is not None and push.now.time is not None
        return f"{words(push.name, now)}{', first value' if new else ''}"
    if push.now.time == push.before.time:
        return f"{words(push.name, now)}, no new value"
    return f"{number_text(push.name, before)} → {words(push.name, now)}" if push.name not in WORDS else (
        f"{words(push.name, before)} → {words(push.name, now)}"
    )  # fmt: skip


def describe_time(reading: Reading, moment: Moment) -> str:
    return "" if reading.time is None else f"{reading.time:.1f} h ({moment.at_h - reading.time:.1f} h before)"


def effect(logit: float, largest: float) -> dict[str, Any]:
    return {"odds": odds(logit), "raises": logit > 0, "share": round(100 * abs(logit) / largest)}


def odds(logit: float) -> str:
    return f"{math.exp(logit):.2f}"


# --- drawings, as numbers for the template


def x_of(hour: float, hours: float) -> float:
    return round(LEFT + hour / hours * (WIDTH - LEFT - RIGHT), 1)


def _line(points: Sequence[tuple[float, float]], left: float, width: float, hours: float, height: float,
          top: float) -> str:  # fmt: skip
    return " ".join(f"{left + x / hours * width:.1f},{height * (1 - y / top):.1f}" for x, y in points)


def marks(course: Course, ward: Ward) -> dict[str, Any]:
    """What every drawing repeats: hours, alarms, onset, and the spans without predictions."""
    hours = ward.hours
    step = next(step for step in (2, 4, 6, 12, 24, 48) if hours / step <= 12 or step == 48)
    inside = course.onset_h is not None and course.onset_h <= hours
    return {
        "width": WIDTH,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "hours": [(hour, x_of(hour, hours)) for hour in range(0, int(hours) + 1, step)],
        "alarms": [x_of(at, hours) for at in course.alarms],
        "onset": x_of(course.onset_h, hours) if inside and course.onset_h is not None else None,
        "begin": x_of(course.at[0], hours),
        "end": x_of(course.at[-1], hours),
    }


def draw_risk(course: Course, ward: Ward) -> dict[str, Any]:
    hours, top, height = ward.hours, ward.top, RISK_HEIGHT

    def y(risk: float) -> float:
        return round(height * (1 - min(risk, top) / top), 1)

    points = [(x_of(at, hours), y(risk)) for at, risk in zip(course.at, course.risk, strict=True)]
    right = spread([(y(ward.threshold), f"alarm from {percent(ward.threshold)}", "alarm"),
                    (y(ward.average), f"average risk {percent(ward.average)}", "soft")])  # fmt: skip
    span = None
    if course.onset_h is not None and ward.meta.horizon_h is not None:
        begin = max(course.at[0], course.onset_h - ward.meta.gap_h - ward.meta.horizon_h)
        end = min(hours, course.onset_h - ward.meta.gap_h)
        span = (x_of(begin, hours), x_of(end, hours)) if end > begin else None
    return {
        **marks(course, ward),
        "height": height,
        "ticks": [(percent(top * k / 5) if k else "0%", round(height * (1 - k / 5), 1)) for k in range(6)],
        "threshold": y(ward.threshold),
        "average": y(ward.average),
        "labels": right,
        "line": " ".join(f"{px},{py}" for px, py in points),
        "points": [
            {"x": px, "y": py, "text": f"{at:g} h: {percent(risk)}", "alarm": bool(alarm), "right": bool(ahead)}
            for (px, py), at, risk, alarm, ahead in zip(
                points, course.at, course.risk, course.alarm, course.ahead, strict=True
            )
        ],
        "span": span,
        "onset_text": None if course.onset_h is None else f"onset {course.onset_h:.1f} h",
    }  # fmt: skip


def spread(labels: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """The labels (y, text, class) from top to bottom, moved down where they would overlap."""
    placed: list[tuple[float, str, str]] = []
    for y, text, kind in sorted(labels):
        placed.append((max(y, placed[-1][0] + LABEL_GAP) if placed else y, text, kind))
    return placed


def draw_chart(name: str, course: Course, ward: Ward) -> dict[str, Any]:
    """The curve of one series, with reference lines."""
    times, values = course.readings[name]
    drawn = [shown(name, float(value)) for value in values]
    usual = None if CONCEPTS[name].usual is None else [shown(name, bound) for bound in CONCEPTS[name].usual or ()]
    limits = list(zip(SEVERITY[name], GRADES, strict=True)) if name in SEVERITY else []
    inside: list[float] = [*drawn, *(usual or ()), *(limit for limit, _ in limits[:1])]
    low, high = min(inside), max(inside)
    pad: float = 0.15 * (high - low) or 1.0
    low, high = low - pad, high + pad
    height = CHART_HEIGHT

    def y(value: float) -> float:
        return round(height * (1 - (value - low) / (high - low)), 1)

    points = [(x_of(time, ward.hours), y(value)) for time, value in zip(times, drawn, strict=True)]
    return {
        **marks(course, ward),
        "title": title(name),
        "unit": unit(name),
        "usual_text": None if usual is None else f"usual {usual[0]:g} to {usual[1]:g}",
        "height": height,
        "ticks": [(f"{tick:g}", y(tick)) for tick in nice_ticks(low, high)],
        "usual": None if usual is None else (y(usual[1]), y(usual[0])),
        "limits": [(y(limit), f"{limit:g}: {grade}") for limit, grade in limits if low <= limit <= high],
        "line": " ".join(f"{px},{py}" for px, py in points),
        "points": [
            {"x": px, "y": py, "text": f"{time:.1f} h: {words(name, value)}"}
            for (px, py), time, value in zip(points, times, values, strict=True)
        ],
        "last": f"last: {words(name, values[-1])}",
        "last_when": f"at {times[-1]:.1f} h",
    }


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to four round numbers between two bounds."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(step * factor for factor in (2, 1, 0.5, 0.25, 0.2, 0.1) if (high - low) / (step * factor) >= 2.4)
    first = math.ceil(low / step)
    return [round(k * step, 6) for k in range(first, math.floor(high / step) + 1)]


def draw_strips(course: Course, ward: Ward) -> dict[str, Any]:
    """When each series was measured: a line of marks each."""
    rows = []
    for k, (name, (times, values)) in enumerate(course.readings.items()):
        rows.append(
            {
                "y": STRIP_HEIGHT * (k + 0.5),
                "title": title(name),
                "marks": [
                    (x_of(time, ward.hours), f"{time:.1f} h: {words(name, value)}")
                    for time, value in zip(times, values, strict=True)
                ],
                "last": words(name, values[-1]),
            }
        )
    return {**marks(course, ward), "height": STRIP_HEIGHT * len(rows), "rows": rows}


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.filters["percent"] = percent
