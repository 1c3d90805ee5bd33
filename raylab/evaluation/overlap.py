"""The leakage check of every evaluation: whether patients or images of the scored rows were also in the training data.

It reads only the two prepared directories, so that it works for every task: meta.json records which column identifies
patients (prepared.find_patient_ids), or why there is none, and the scopes of the identifiers (`numbering`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from raylab.data import prepared
from raylab.data.identifiers import UNKNOWN, People, Person, identifier
from raylab.data.images import duplicates
from raylab.data.prepared import Meta, NoPatientIds, PatientIds, numberings, read_meta
from raylab.errors import DataError

HOSPITALS = dict.fromkeys(
    ("physionet2012", "mimic3", "mimic4", "mimic-iv-meds"), "Beth Israel Deaconess Medical Center"
)
"""The hospital of sources, or scopes of identifiers, that overlap: PhysioNet 2012 is a sample of MIMIC-II, and
MIMIC-III and IV are of the same hospital."""
BY_DIRECTORY = ("physionet2012", "mimic3")
"""Sources whose identifiers have one scope, whatever the rows name as their source, in data prepared before `numbering`
was recorded."""


def leakage(task: str, fitted_on: Path, scored_on: Path, split: str, fitted_hash: str | None = None) -> dict[str, Any]:
    """Return {"checked", "patients", "shared"}: how many patients of `split` in `scored_on` are in the train or val
    split of `fitted_on`; or {"checked": False, "why"}. Split "val", which selects the epoch, is compared with train
    only.

    Identifiers are compared only within a scope, because the same number means another patient elsewhere. Rows without
    a source are compared by number alone, which may overcount ("why"). Data without patients may identify other units,
    such as points of a design ("unit"). Real images are compared whatever their source: "copies" counts the scored rows
    that are copies (duplicates.py) of a training image. `fitted_hash`: the data hash of `fitted_on` when the model was
    trained.
    """
    if not (fitted_on / prepared.META).is_file():
        return {"checked": False, "why": f"the training data is no longer at {fitted_on}"}
    scored = ("train", "val", "test") if split == "all" else (split,)
    fitted = ("train",) if split == "val" else ("train", "val")
    try:
        trained = read_meta(fitted_on, task)
    except DataError as error:
        return {"checked": False, "why": f"the training data cannot be read: {error.what}"}
    if fitted_hash not in (None, trained.data_hash):
        return {"checked": False, "why": f"the data at {fitted_on} is no longer what the model was trained on"}
    metas = [trained, read_meta(scored_on, task)]
    copies = {}
    if all(_has_images(directory) for directory in (fitted_on, scored_on)) and not any(
        meta.synthetic for meta in metas
    ):
        pairs = duplicates.pairs(_thumbnails(scored_on, scored), _thumbnails(fitted_on, fitted))
        copies = {"copies": len({row for row, _, _ in pairs})}
    names: list[PatientIds] = []
    for directory, meta in zip((fitted_on, scored_on), metas, strict=True):
        where = meta.patient_ids or prepared.find_patient_ids(directory)
        if isinstance(where, NoPatientIds):
            why = f"{directory} does not name its patients: {where.none}"
            return {"checked": False, "why": why, **copies}
        names.append(where)
    unit = {"unit": names[1].unit} if "unit" in names[1].model_fields_set else {}
    trained_on = people(fitted_on, metas[0], names[0], fitted)
    scored_people = people(scored_on, metas[1], names[1], scored)
    for directory, persons, splits in ((scored_on, scored_people, scored), (fitted_on, trained_on, fitted)):
        if not persons:
            why = f"no row of {directory} in {' and '.join(splits)} names its {names[1].unit}"
            return {"checked": False, "why": why, **copies, **unit}
    sources = {person.source for person in trained_on}, {person.source for person in scored_people}
    unnamed = UNKNOWN in sources[0] | sources[1]
    if not unnamed and not sources[0] & sources[1]:
        why = describe_sources(metas, sources, names[1].unit)
        return {"checked": True, "patients": None, "shared": 0, "why": why, **copies, **unit}
    trained_people = People(trained_on)
    result: dict[str, Any] = {
        "checked": True,
        "patients": len(scored_people),
        "shared": sum(p in trained_people for p in scored_people),
    }
    if unnamed:
        result["why"] = f"{unit.get('unit', 'patient')}s without a source are compared by their number alone"
    return {**result, **copies, **unit}


def in_words(found: dict[str, Any]) -> str:
    """Return the result of `leakage` as one sentence."""
    unit = found.get("unit", "patient")
    if found.get("shared"):
        by = f" ({found['why']})" if "why" in found else ""
        count = f"{found['shared']} of {found['patients']} {unit}s"
        return f"WARNING, {count} were in the training data: the scores are inflated{by}"
    if found.get("copies"):
        return f"WARNING, {found['copies']} images are copies of training images: the scores are inflated"
    if not found["checked"]:
        return f"not checked, {found['why']}"
    if found["patients"] is None:
        return str(found["why"])
    return f"none, no {unit} here was in train or val"


def people(directory: Path, meta: Meta, where: PatientIds, splits: tuple[str, ...]) -> set[Person]:
    """Return the persons in these splits of a prepared directory; `where` gives their column. They never leave this
    process."""
    columns = pl.read_parquet_schema(directory / where.table)
    if missing := {where.column, "split"} - columns.keys():
        raise DataError(
            f"{directory / where.table} has no column {' and '.join(sorted(missing))}",
            "meta.json names it as the column of patients (patient_ids)",
            "fix the program that prepares this data",
        )
    rows = pl.scan_parquet(directory / where.table).filter(pl.col("split").is_in(splits))
    number = identifier(where.column, columns[where.column]).alias("number")
    if "source" in columns and _rows_name_source(meta):
        source = pl.col("source").cast(pl.String).fill_null(UNKNOWN)
        pairs = rows.select(source, number).drop_nulls().unique().collect()
        return {Person.of(source, number) for source, number in pairs.iter_rows()}
    numbers = rows.select(number).drop_nulls().unique().collect().to_series()
    valid_in = numberings(meta)
    if len(valid_in) > 1:  # resplit.py names the numbering in each identifier
        return {Person.parse(number) for number in numbers}
    return {Person.of(valid_in[0], number) for number in numbers}


def _rows_name_source(meta: Meta) -> bool:
    """Whether the scope of identifiers is the column `source` of their rows, as for images."""
    own = meta.source in BY_DIRECTORY or "+" in meta.source  # a pool names the source in each identifier
    return not (meta.numbering or meta.source == "synthetic" or own)


def describe_sources(metas: Iterable[Meta], scopes: Iterable[set[str]], unit: str = "patient") -> str:
    """Return what is known about shared patients (or what `unit` says) of two data sets whose identifiers have other
    scopes."""
    named = list(scopes)
    fitted, scored = (" and ".join(sorted(names)) for names in named)
    hospitals = [
        {HOSPITALS[name] for name in (*meta.source.split("+"), *names) if name in HOSPITALS}
        for meta, names in zip(metas, named, strict=True)
    ]
    if shared := hospitals[0] & hospitals[1]:
        return (
            f"cannot be checked by identifier ({fitted}; {scored}), and WARNING: both hold patients of "
            f"{' and '.join(sorted(shared))}: the same patient may be in both"
        )
    return f"another source ({fitted}; {scored}): other {unit}s, as far as identifiers can tell"


def _has_images(directory: Path) -> bool:
    return (directory / "images.npy").is_file() and (directory / "index.parquet").is_file()


def _thumbnails(directory: Path, splits: tuple[str, ...]) -> np.ndarray:
    rows = pl.scan_parquet(directory / "index.parquet").filter(pl.col("split").is_in(splits)).select("row").collect()
    return duplicates.thumbnails(np.load(directory / "images.npy", mmap_mode="r"), rows["row"].to_list())
