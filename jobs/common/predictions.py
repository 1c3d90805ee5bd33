"""The probabilities behind a run's scores, which `compare` needs for paired differences.

They stay in the run's directory, predictions/SPLIT-DATA.npz, for its owner alone, and name no patient: patients are
running numbers, and the identifiers of the rows are a hash.
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.errors import DataError
from raylab.files import atomic_write
from raylab.tasks.evaluation import Evaluation


@dataclass(frozen=True)
class KeptPredictions:
    """Probabilities p [N] or [N, outputs] of rows with the outcome y and the patient group [N], or what `unit` says.

    `rows` is the SHA-256 of the rows' identifiers, in their order; `classes` are the names of the outputs.
    """

    y: NDArray[Any]
    p: NDArray[Any]
    group: NDArray[np.int64]
    rows: str
    classes: list[str]
    unit: str = "patient"

    @property
    def patients(self) -> int:
        return len(np.unique(self.group))

    def is_of_rows(self, other: "KeptPredictions") -> bool:
        """Whether both are of the same rows, with the same outcomes and patients."""
        pairs = ((self.y, other.y), (self.group, other.group))
        return self.rows == other.rows and self.classes == other.classes and all(np.array_equal(*two) for two in pairs)


def path(directory: Path, split: str, data_hash: str) -> Path:
    return directory / "predictions" / f"{split}-{data_hash[:12]}.npz"


def keep(directory: Path, scored: Evaluation) -> None:
    """Write the predictions of an evaluation into the run's directory."""
    y, p = scored.task.outcome.kept(scored.samples, scored.p)
    rows = hashlib.sha256("\0".join(map(str, scored.samples.ids)).encode()).hexdigest()
    target = path(directory, scored.split, scored.meta.data_hash)
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target) as beside, beside.open("wb") as file:
        group = np.unique(scored.samples.group, return_inverse=True)[1].astype(np.int64)
        classes = np.array(scored.samples.spec["classes"], dtype=str)
        np.savez_compressed(
            file, y=y, p=p, group=group, rows=np.array(rows), classes=classes, unit=np.array(scored.meta.unit)
        )


def read(directory: Path, split: str, data_hash: str, again: str) -> KeptPredictions:
    """Return the predictions of the run in `directory`; DataError if there are none, or if they are damaged. `again`:
    the command that writes them."""
    file = path(directory, split, data_hash)
    if not file.is_file():
        why = "paired differences need the predictions that an evaluation keeps"
        raise DataError(f"run {directory.name} has no predictions of the {split} split", why, again)
    try:
        with np.load(file, allow_pickle=False) as found:
            kept = KeptPredictions(
                found["y"],
                found["p"],
                found["group"],
                str(found["rows"]),
                [str(name) for name in found["classes"]],
                str(found["unit"]) if "unit" in found else "patient",  # kept before units were
            )
        lengths = {len(kept.y), len(kept.p), len(kept.group)}
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} is damaged", str(error), again) from error
    is_number = np.issubdtype(kept.p.dtype, np.floating) and kept.p.ndim in (1, 2) and np.isfinite(kept.p).all()
    if len(lengths) > 1 or not is_number:
        raise DataError(f"{file} is damaged", "it does not have one probability or more for each row", again)
    return kept
