"""The leakage check behind every score: do patients, or copies of images, of the scored rows also stand in what the
model was fitted on?"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from raylab.data import duplicates
from raylab.data.prepared import read_meta

HOSPITALS = dict.fromkeys(("physionet2012", "mimic3", "meds"), "Beth Israel Deaconess Medical Center")
"""Of sources that overlap: PhysioNet 2012 was drawn from MIMIC-II, MIMIC-III and IV are of the same hospital."""
TABLES = {"ards": ("samples.parquet", "subject_id"), "covidnet": ("index.parquet", "patient")}


def patients(directory: Path, task: str, splits: tuple[str, ...]) -> set[str]:
    """Identifiers of the patients in these splits of a prepared directory. They stay in this process."""
    table, column = TABLES[task]
    rows = pl.scan_parquet(directory / table).filter(pl.col("split").is_in(splits)).select(pl.col(column).unique())
    return set(rows.collect()[column].cast(pl.String))


def origin(meta: dict[str, Any]) -> tuple[Any, ...]:
    """Where identifiers are valid: a source; of drawn patients, one draw."""
    return (meta["source"], *((meta["seed"], meta.get("domain")) if meta["synthetic"] else ()))


def elsewhere(fitted_on: Path, scored_on: Path, task: str) -> str:
    """What can be said of patients of two sources, whose identifiers mean nothing to each other."""
    mine, theirs = (read_meta(directory, task)["source"] for directory in (fitted_on, scored_on))
    known = [{HOSPITALS[name] for name in source.split("+") if name in HOSPITALS} for source in (mine, theirs)]
    if shared := known[0] & known[1]:
        return (
            f"cannot be checked by identifier ({mine} and {theirs}), and WARNING: both hold patients of "
            f"{' and '.join(sorted(shared))}: the same patient may be in both"
        )
    return f"another source ({mine} and {theirs}): other patients, as far as identifiers can tell"


def leakage(task: str, fitted_on: Path, scored_on: Path, split: str) -> dict[str, Any]:
    """{"checked", "patients", "shared"}: how many patients of `split` in `scored_on` are in the train or val split of
    `fitted_on`; or {"checked": False, "why"}. For split "val", which picks epochs by design, train alone counts.

    Identifiers are compared within one origin only: the same number means another patient elsewhere. Real images are
    compared with each other wherever they come from: "copies" is how many of the scored rows are copies (duplicates.py)
    of an image that was fitted on.
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
    if origin(metas[0]) != origin(metas[1]):
        return {"checked": True, "patients": None, "shared": 0, "why": elsewhere(fitted_on, scored_on, task), **alike}
    mine = patients(scored_on, task, scored)
    return {"checked": True, "patients": len(mine), "shared": len(mine & patients(fitted_on, task, fitted)), **alike}


def _thumbnails(directory: Path, splits: tuple[str, ...]) -> np.ndarray:
    rows = pl.scan_parquet(directory / "index.parquet").filter(pl.col("split").is_in(splits)).select("row").collect()
    return duplicates.thumbnails(np.load(directory / "images.npy", mmap_mode="r"), rows["row"].to_list())
