"""The leakage check behind every score: do patients, or copies of images, of the scored rows also stand in what the
model was fitted on?"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from raylab.data import duplicates
from raylab.data.identifiers import UNKNOWN, People, Person
from raylab.data.prepared import read_meta

HOSPITALS = dict.fromkeys(("physionet2012", "mimic3", "meds"), "Beth Israel Deaconess Medical Center")
"""Of sources that overlap: PhysioNet 2012 was drawn from MIMIC-II, MIMIC-III and IV are of the same hospital."""
TABLES = {"ards": ("samples.parquet", "subject_id"), "covidnet": ("index.parquet", "patient")}


def numberings(meta: dict[str, Any]) -> list[str]:
    """Within what the patients' identifiers of a prepared directory mean one person each; of drawn patients, one draw.
    Several where directories were pooled. Directories made by an earlier version say only their source."""
    if "numbering" in meta:
        return meta["numbering"]  # type: ignore[no-any-return]
    if meta["synthetic"]:
        return [" ".join(word for word in ("synthetic", meta.get("domain"), f"seed {meta['seed']}") if word)]
    return meta["source"].split("+")  # type: ignore[no-any-return]


def people(directory: Path, task: str, splits: tuple[str, ...], meta: dict[str, Any]) -> set[Person]:
    """Who is in these splits of a prepared directory. They stay in this process."""
    table, column = TABLES[task]
    earlier = "numbering" not in meta and meta["source"] in ("meds", "yaib")
    by_row = not meta["synthetic"] and (task == "covidnet" or earlier)
    names = [column, "source"] if by_row else [column]
    rows = pl.scan_parquet(directory / table).filter(pl.col("split").is_in(splits)).select(names).unique().collect()
    numbers = rows[column].cast(pl.String).to_list()
    if by_row:  # each row names its source
        return {Person.of(source, number) for number, source in zip(numbers, rows["source"], strict=True)}
    valid_in = numberings(meta)
    if len(valid_in) > 1:  # resplit.py names the numbering in each identifier
        return {Person.parse(number) for number in numbers}
    return {Person.of(valid_in[0], number) for number in numbers}


def elsewhere(metas: Iterable[dict[str, Any]], numbered: Iterable[set[str]]) -> str:
    """What can be said of patients of two data sets whose identifiers mean nothing to each other."""
    mine, theirs = (" and ".join(sorted(names)) for names in numbered)
    known = [{HOSPITALS[name] for name in meta["source"].split("+") if name in HOSPITALS} for meta in metas]
    if shared := known[0] & known[1]:
        return (
            f"cannot be checked by identifier ({mine}; {theirs}), and WARNING: both hold patients of "
            f"{' and '.join(sorted(shared))}: the same patient may be in both"
        )
    return f"another source ({mine}; {theirs}): other patients, as far as identifiers can tell"


def leakage(task: str, fitted_on: Path, scored_on: Path, split: str) -> dict[str, Any]:
    """{"checked", "patients", "shared"}: how many patients of `split` in `scored_on` are in the train or val split of
    `fitted_on`; or {"checked": False, "why"}. For split "val", which picks epochs by design, train alone counts.

    Identifiers are compared within one source only: the same number means another patient elsewhere. Images without a
    source are compared by number alone, which may find too many. Real images are compared with each other wherever they
    come from: "copies" is how many of the scored rows are copies (duplicates.py) of an image that was fitted on.
    """
    if task not in TABLES:
        return {"checked": False, "why": "rows of a sweep are points of a design, not patients"}
    if not (fitted_on / "meta.json").is_file():
        return {"checked": False, "why": f"the training data is no longer at {fitted_on}"}
    scored, fitted = (
        (("train", "val", "test") if split == "all" else (split,)),
        ("train", "val")[: 1 + (split != "val")],
    )
    metas = read_meta(fitted_on, task), read_meta(scored_on, task)
    alike = {}
    if task == "covidnet" and not any(meta["synthetic"] for meta in metas):
        pairs = duplicates.pairs(_thumbnails(scored_on, scored), _thumbnails(fitted_on, fitted))
        alike = {"copies": len({row for row, _, _ in pairs})}
    fitted_people, scored_people = people(fitted_on, task, fitted, metas[0]), people(scored_on, task, scored, metas[1])
    known = People(fitted_people)
    shared = sum(person in known for person in scored_people)
    sources = {person.source for person in fitted_people}, {person.source for person in scored_people}
    unnamed = UNKNOWN in sources[0] | sources[1]
    if not unnamed and not sources[0] & sources[1]:
        why = elsewhere(metas, sources)
        return {"checked": True, "patients": None, "shared": 0, "why": why, **alike}
    said = {"why": "patients without a source are compared by their number alone"} if unnamed else {}
    return {"checked": True, "patients": len(scored_people), "shared": shared, **said, **alike}


def _thumbnails(directory: Path, splits: tuple[str, ...]) -> np.ndarray:
    rows = pl.scan_parquet(directory / "index.parquet").filter(pl.col("split").is_in(splits)).select("row").collect()
    return duplicates.thumbnails(np.load(directory / "images.npy", mmap_mode="r"), rows["row"].to_list())
