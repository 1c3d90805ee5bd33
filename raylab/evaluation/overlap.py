"""The leakage check behind every score: do patients, or copies of images, of the scored rows also stand in what the
model was fitted on?

It asks the two prepared directories alone, so every task has it: meta.json says where patients are named
(prepared.find_patient_ids), or why they are not, and within what their identifiers mean one person (`numbering`).
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

HOSPITALS = dict.fromkeys(("physionet2012", "mimic3", "meds"), "Beth Israel Deaconess Medical Center")
"""Of sources that overlap: PhysioNet 2012 was drawn from MIMIC-II, MIMIC-III and IV are of the same hospital."""
BY_DIRECTORY = ("physionet2012", "mimic3")
"""Sources whose identifiers have one numbering whatever the rows call their source, in data of a raylab that did not
say `numbering`."""


def leakage(task: str, fitted_on: Path, scored_on: Path, split: str, fitted_hash: str | None = None) -> dict[str, Any]:
    """{"checked", "patients", "shared"}: how many patients of `split` in `scored_on` are in the train or val split of
    `fitted_on`; or {"checked": False, "why"}. For split "val", which picks epochs by design, train alone counts.

    Identifiers are compared within one numbering only: the same number means another patient elsewhere. Rows without a
    source are compared by number alone, which may find too many ("why"). Data without patients may name other units,
    such as points of a design ("unit"). Real images are compared with each other wherever they come from: "copies" is
    how many of the scored rows are copies (duplicates.py) of an image that was fitted on. `fitted_hash`: the data hash
    that `fitted_on` had when the model was fitted.
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
    alike = {}
    if all(_has_images(directory) for directory in (fitted_on, scored_on)) and not any(
        meta.synthetic for meta in metas
    ):
        pairs = duplicates.pairs(_thumbnails(scored_on, scored), _thumbnails(fitted_on, fitted))
        alike = {"copies": len({row for row, _, _ in pairs})}
    names: list[PatientIds] = []
    for directory, meta in zip((fitted_on, scored_on), metas, strict=True):
        where = meta.patient_ids or prepared.find_patient_ids(directory)
        if isinstance(where, NoPatientIds):
            why = f"{directory} does not name its patients: {where.none}"
            return {"checked": False, "why": why, **alike}
        names.append(where)
    unit = {"unit": names[1].unit} if "unit" in names[1].model_fields_set else {}
    trained_on = people(fitted_on, metas[0], names[0], fitted)
    mine = people(scored_on, metas[1], names[1], scored)
    for directory, found, splits in ((scored_on, mine, scored), (fitted_on, trained_on, fitted)):
        if not found:
            why = f"no row of {directory} in {' and '.join(splits)} names its {names[1].unit}"
            return {"checked": False, "why": why, **alike, **unit}
    sources = {person.source for person in trained_on}, {person.source for person in mine}
    unnamed = UNKNOWN in sources[0] | sources[1]
    if not unnamed and not sources[0] & sources[1]:
        return {"checked": True, "patients": None, "shared": 0, "why": elsewhere(metas, sources), **alike, **unit}
    known = People(trained_on)
    shared = sum(person in known for person in mine)
    said = {"why": f"{unit.get('unit', 'patient')}s without a source are compared by their number alone"}
    return {"checked": True, "patients": len(mine), "shared": shared, **(said if unnamed else {}), **alike, **unit}


def in_words(found: dict[str, Any]) -> str:
    """What `leakage` found, as one sentence."""
    unit = found.get("unit", "patient")
    if found.get("shared"):
        by = f" ({found['why']})" if "why" in found else ""
        return f"WARNING, {found['shared']} of {found['patients']} {unit}s were trained on: the scores flatter{by}"
    if found.get("copies"):
        return f"WARNING, {found['copies']} images are copies of images that were trained on: the scores flatter"
    if not found["checked"]:
        return f"not checked, {found['why']}"
    if found["patients"] is None:
        return str(found["why"])
    return f"none, no {unit} here was in train or val"


def people(directory: Path, meta: Meta, where: PatientIds, splits: tuple[str, ...]) -> set[Person]:
    """Who is in these splits of a prepared directory; `where` its rows name them. They stay in this process."""
    columns = pl.read_parquet_schema(directory / where.table)
    if missing := {where.column, "split"} - columns.keys():
        raise DataError(
            f"{directory / where.table} has no column {' and '.join(sorted(missing))}",
            "meta.json says that patients are named there (patient_ids)",
            "correct what prepares this data",
        )
    rows = pl.scan_parquet(directory / where.table).filter(pl.col("split").is_in(splits))
    number = identifier(where.column, columns[where.column]).alias("number")
    if "source" in columns and _rows_name_source(meta):
        source = pl.col("source").cast(pl.String).fill_null(UNKNOWN)
        found = rows.select(source, number).drop_nulls().unique().collect()
        return {Person.of(source, number) for source, number in found.iter_rows()}
    numbers = rows.select(number).drop_nulls().unique().collect().to_series()
    valid_in = numberings(meta)
    if len(valid_in) > 1:  # resplit.py names the numbering in each identifier
        return {Person.parse(number) for number in numbers}
    return {Person.of(valid_in[0], number) for number in numbers}


def _rows_name_source(meta: Meta) -> bool:
    """Whether identifiers mean one person within the column `source` of their rows, if there is one, as of images."""
    own = meta.source in BY_DIRECTORY or "+" in meta.source  # a pool names the source in each identifier
    return not (meta.numbering or meta.synthetic or own)


def elsewhere(metas: Iterable[Meta], numbered: Iterable[set[str]]) -> str:
    """What can be said of patients of two data sets whose identifiers mean nothing to each other."""
    mine, theirs = (" and ".join(sorted(names)) for names in numbered)
    known = [{HOSPITALS[name] for name in meta.source.split("+") if name in HOSPITALS} for meta in metas]
    if shared := known[0] & known[1]:
        return (
            f"cannot be checked by identifier ({mine}; {theirs}), and WARNING: both hold patients of "
            f"{' and '.join(sorted(shared))}: the same patient may be in both"
        )
    return f"another source ({mine}; {theirs}): other patients, as far as identifiers can tell"


def _has_images(directory: Path) -> bool:
    return (directory / "images.npy").is_file() and (directory / "index.parquet").is_file()


def _thumbnails(directory: Path, splits: tuple[str, ...]) -> np.ndarray:
    rows = pl.scan_parquet(directory / "index.parquet").filter(pl.col("split").is_in(splits)).select("row").collect()
    return duplicates.thumbnails(np.load(directory / "images.npy", mmap_mode="r"), rows["row"].to_list())
