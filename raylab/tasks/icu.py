"""What tasks on intensive-care data share: their recipes, their preparation from labels of their own, how they load
samples, and how they read new patients."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import Field

from raylab.config.assignments import parse_assignments
from raylab.config.recipe import ICU_HOURLY, IcuData, Recipe, Search
from raylab.data.icu.meta import IcuMeta
from raylab.errors import UsageError, escape_unprintable
from raylab.tasks.base import Frame, SiteStatistics, Task
from raylab.tasks.outcomes import Binary
from raylab.tasks.preparation import Preparation, PrepareOptions, Resources, attrition_lines

if TYPE_CHECKING:  # as in base.py
    import numpy as np
    from numpy.typing import NDArray

    from raylab.data.icu.labels import Label
    from raylab.data.icu.new_patients import NewPatients
    from raylab.data.samples import NewRows, Samples


class IcuRecipe(Recipe):
    """Of the tasks on intensive-care data."""

    inputs: ClassVar[str] = ICU_HOURLY

    data: IcuData = IcuData()


class IcuOptions(PrepareOptions):
    """Options of `prepare` for intensive-care data."""

    source: str | None = None
    """events (your own tables), physionet2012, meds, mimic3, mimic4, yaib, synthetic, or that of a plugin"""
    landmark: int | float = 12
    """hours after admission at which is predicted"""
    horizon: int | float = 24
    """hours after landmark and gap in which onset counts"""
    gap: int | float = 0
    """hours after the landmark that no onset may fall into"""
    label: str | None = None
    """definition of the outcome; the task's first one unless given"""
    label_set: tuple[str, ...] = ()
    """NAME=VALUE: windows of the label, for example persist_h=8 fio2_back_h=4"""
    rolling: bool = False
    """predict every hour from the landmark until onset"""
    until: int | float = 48
    """rolling: the last hour at which is predicted"""
    mapping: Path | None = None
    """meds: what the codes mean, eicu, hirid, omop or a TOML file; MIMIC-IV's otherwise"""
    sensitivity: bool = False
    """count onsets over windows of FiO2 and persistence"""
    virtual_patient: bool = False
    """fit the lung model to the gases before the landmark: features for --set data.virtual_patient=true"""
    origin: tuple[Path, ...] = Field((), alias="from")
    """prepared directories, pooled and split anew"""
    split_by: str = "patient:0/5"
    """with --from: patient:K/N, temporal, temporal:PERIOD or site:SOURCE"""


def icu_preparation(labels: Mapping[str, "Label"]) -> Preparation[IcuOptions, IcuMeta]:
    """The preparation of a task with these labels, the first of which is the usual one."""
    return Preparation("intensive care", IcuOptions, partial(prepare, labels), describe)


def prepare(
    labels: Mapping[str, "Label"], task: str, out: Path, options: IcuOptions, replace: bool, resources: Resources
) -> IcuMeta:
    """Prepare raw tables, or pool prepared directories, for `task` at `out`."""
    from raylab.data.icu.labels import label
    from raylab.data.icu.prepare import prepare_icu
    from raylab.data.icu.resplit import parse, resplit

    if options.origin:
        if options.source is not None or options.path is not None:
            raise UsageError("--from takes prepared directories, and so no --source and no --path")
        directories = [directory.absolute() for directory in options.origin]
        return resplit(directories, out, parse(options.split_by), options.seed, replace, task)
    from raylab.tasks.plugins import versions_of_data  # which reads the tasks

    source = options.source or ("physionet2012" if options.path else None)
    if source is None:
        raise UsageError(f"prepare {task} needs --source", do="add --source events --path DIR, or synthetic")
    if source != "synthetic" and options.path is None:
        raise UsageError(f"source {source} needs --path DIR", do=f"raylab prepare {task} --source {source} --path DIR")
    return prepare_icu(
        task,
        source,
        options.path,
        out,
        options.landmark,
        options.horizon,
        options.patients,
        options.seed,
        rule=label(options.label or next(iter(labels)), parse_assignments(list(options.label_set)), labels),
        gap=options.gap,
        framing="rolling" if options.rolling else "landmark",
        until=options.until,
        mapping=options.mapping,
        grid_of_windows=options.sensitivity,
        virtual=options.virtual_patient,
        replace=replace,
        plugins=versions_of_data(task, source),
    )


def describe(meta: IcuMeta) -> list[str]:
    """What is said of a prepared directory, beside what is said of every one."""
    lines = []
    for cohort, steps in meta.cohort_attrition.items():
        if cohort != "all":
            lines += [f"  cohort {cohort}", *attrition_lines(steps[1:], "    ")]
    lines.append(f"  label {meta.label['name']} version {meta.label['version']}: {meta.label['onset']}")
    if meta.onsets is not None:
        onsets = ", ".join(f"{what.replace('_', ' ')} {n:,}" for what, n in meta.onsets.items())
        lines.append(f"  onsets at any time: {onsets}")
    lines.append("  outcomes of the rows: " + ", ".join(f"{how} {n:,}" for how, n in meta.ends.items()))
    for cell in meta.sensitivity:
        lines.append(
            f"  FiO2 {cell['fio2_back_h']:g} h back, persistence {cell['persist_h']:>2g} h: {cell['stays']:>6,} onsets"
            f", {cell['after_6_h']:,} after 6 h, {cell['after_12_h']:,} after 12 h"
        )
    if dropped := {what: n for what, n in meta.dropped.items() if n}:
        lines.append("  rows not used: " + ", ".join(f"{what} {n:,}" for what, n in dropped.items()))
    lines += [f"  {line}" for line in describe_values(vars(meta))]
    return lines + [f"  note: {note}" for note in meta.notes]


def describe_values(counts: Mapping[str, Any]) -> list[str]:
    """What was set missing, converted or guessed, by concept. Directories prepared before some of it was counted have
    no such line."""
    lines = []
    for name, words in (
        ("out_of_range", "outside plausible range, set missing"),
        ("unreadable", "not a number, set missing"),
        ("unknown_units", "unit not understood, set missing"),
        ("converted", "units converted"),
        ("no_unit", "no unit given, the usual one taken"),
        ("percent", "read as percent"),
        ("room_air", "20 to 21 %, read as room air"),
    ):
        if counts[name]:
            lines.append(f"{words}: " + ", ".join(f"{concept} {_by_unit(n)}" for concept, n in counts[name].items()))
    return lines


def _by_unit(n: int | dict[str, int]) -> str:
    return f"{n:,}" if isinstance(n, int) else ", ".join(f"'{unit}' {count:,}" for unit, count in n.items())


def sum_statistics(meta: IcuMeta, directory: Path) -> "NDArray[np.float64]":
    """See SiteStatistics."""
    from raylab.data.icu import site_statistics

    return site_statistics.sum_statistics(meta)


def pool_statistics(meta: IcuMeta, sums: "NDArray[np.float64]") -> dict[str, Any]:
    """See SiteStatistics."""
    from raylab.data.icu import site_statistics

    return site_statistics.pool_statistics(meta, sums)


def add_up_patients(directory: Path) -> "NDArray[np.float64]":
    """See SiteStatistics."""
    from raylab.data.icu import site_statistics

    return site_statistics.add_up_patients(directory)


SITE_STATISTICS = SiteStatistics(
    sum_statistics,
    pool_statistics,
    bound=2.0**34,  # values of a concept
    add_up_patients=add_up_patients,
)


EVENTS = Frame(
    columns=(
        ("stay_id", "string", True),
        ("time", "double", True),
        ("concept", "string", True),
        ("value", "double", True),
        ("unit", "string", False),
    ),
    results=(("stay_id", "string"), ("at_h", "double"), ("last_h", "double")),
    remarks=(("reason", "string"), ("absent", "strings")),
    example=tuple(
        ("synthetic-1", 0.5, concept, value, unit)
        for concept, value, unit in (
            ("age", 60.0, "years"),
            ("hr", 80.0, "/min"),
            ("map", 75.0, "mmHg"),
            ("resp_rate", 16.0, "/min"),
            ("spo2", 97.0, "%"),
            ("fio2", 21.0, "%"),
            ("temp", 98.6, "F"),
        )
    ),
)
"""The frame of raw events (new_patients.py). Its example is a healthy virtual person."""


def read_new(labels: Mapping[str, "Label"], frame: Any, data: IcuData, spec: dict[str, Any]) -> "NewRows":
    """Read raw events of new patients for a model of the task with these labels."""
    from raylab.data.icu.labels import restore_label
    from raylab.data.icu.new_patients import read_new_patients
    from raylab.data.samples import NewRows

    rule = restore_label(spec["label"], labels)
    new = read_new_patients(frame, spec, rule, data.cohort, data.fill)
    return NewRows(new.rows, new.inputs, describe_new(new, rule))


def describe_new(new: "NewPatients", rule: "Label") -> list[str]:
    """What a frame of new patients lacked, and what became of its values."""
    reasons = new.rows.drop_nulls("reason")["reason"].value_counts().sort("reason").iter_rows()
    lines = [f"without a prediction: {n:,}: {reason}" for reason, n in reasons]
    if new.missing:
        lines.append(f"inputs of the model without a usable value in any stay: {', '.join(new.missing)}")
    if new.unknown_concepts:
        names = [f"'{escape_unprintable(name[:40])}' {n:,}" for name, n in new.unknown_concepts.items()]
        others = f" and {len(names) - 10:,} others" if len(names) > 10 else ""
        known = "`raylab concepts` prints those that it knows"
        lines.append(f"concepts that raylab does not know, not used: {', '.join(names[:10])}{others}; {known}")
    lines += [f"{name} is left out: {why}" for name, why in new.left_out.items()]
    counts = {"without a time, concept or value": new.incomplete, **new.totals.dropped()}
    if dropped := {what: n for what, n in counts.items() if n}:
        lines.append("rows not used: " + ", ".join(f"{what} {n:,}" for what, n in dropped.items()))
    lines += describe_values({**new.totals.by_problem(), **new.totals.units()})
    if new.of_unknown_age:
        lines.append(f"stays of unknown age, counted as {rule.min_age:g} years and older: {new.of_unknown_age:,}")
    return lines + new.doubts


def load(task: str, directory: Path, split: str, data: IcuData, spec: dict[str, Any] | None) -> "Samples":
    """Load a split of a directory prepared for `task`."""
    from raylab.data.icu.dataset import load_icu

    return load_icu(directory, split, data.cohort, spec, data.fill, data.virtual_patient, task)


def icu_task(
    kind: type[IcuRecipe],
    labels: Mapping[str, "Label"],
    full: Recipe,
    smoke: Recipe,
    searches: Mapping[str, Search] | None = None,
    primary: tuple[str, ...] = ("auroc", "auprc"),
    benchmark_members: int = 1,
) -> Task:
    """A task that predicts a binary outcome from the hours before a landmark.

    `kind`: its recipes; the task's name is that of their field `task`. `labels`: definitions of the outcome by name,
    the usual one first. `full` and `smoke`: its recipes, or those of another task on intensive-care data, whose values
    it then takes. `searches`: search spaces by model. `primary`: the scores in tables.
    `benchmark_members`: as of Task.
    """
    (name,) = get_args(kind.model_fields["task"].annotation)
    return Task(
        name=name,
        kind="icu",
        outcome=Binary(),
        objective="auroc",
        load=partial(load, name),
        meta=IcuMeta,
        preparation=icu_preparation(labels),
        read_new=partial(read_new, labels),
        frame=EVENTS,
        site_statistics=SITE_STATISTICS,
        full=kind.model_validate({**full.model_dump(), "task": name}),
        smoke=kind.model_validate({**smoke.model_dump(), "task": name}),
        searches=searches or {},
        primary=primary,
        benchmark_members=benchmark_members,
        secondary=("brier", "calibration_slope"),
    )
