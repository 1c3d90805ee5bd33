"""`prepare covidnet`: label lists and image files, or drawn phantoms -> `images.npy` + `index.parquet` + meta.json.

images.npy     uint8 [N, size, size], decoded once, read as a memory map; see `decode` for the pixel range and the view
index.parquet  row, id, patient, file, source, class, label, split; row i of it is image i
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data import prepared, splits
from raylab.data.covidx import CLASSES, Line, read_list
from raylab.data.decode import decode, frame
from raylab.data.sources import phantoms
from raylab.errors import DataError, UsageError, unknown

KIND = "cxr-frontal-u8"
CROP = "top 8 % cut off, central square, resized with antialiasing; uint8 0 (black, air) to 255"
SPLITS = ("train", "val", "test")
CARVED = 0.15  # share of the train patients that becomes val when no val list is given
CHUNK = 1024  # images held in memory at a time

Progress = Callable[[int, int], None]


def prepare_covidnet(
    out: Path,
    images: Path | None,
    train: Path | None,
    val: Path | None,
    test: Path | None,
    source: str = "covidx",
    size: int = 224,
    patients: int = 400,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
    domain: str = "A",
) -> dict[str, Any]:
    """Prepare the directory `out` and return its meta.

    source "covidx" reads the lists given and the files under `images`; "synthetic" draws `patients` phantoms of
    site `domain`. `progress(done, all)` is called after every image. With `skip_bad`, unreadable images are listed in
    meta["skipped"] instead of failing.
    """
    if size < 16:
        raise UsageError(f"--size {size} is too small", "the networks need at least 16 px", "use --size 224")
    if source == "covidx":
        lists = {name: path for name, path in zip(SPLITS, (train, val, test), strict=True) if path is not None}
        return prepared.publish(out, lambda work: _covidx(work, images, lists, size, seed, skip_bad, progress))
    if source == "synthetic":
        if patients < 30:
            raise UsageError(f"--patients {patients} is too few", "every split needs every class", "use at least 30")
        return prepared.publish(out, lambda work: _synthetic(work, patients, size, seed, domain, progress))
    raise unknown("source of chest X-rays", source, ("covidx", "synthetic"))


def _covidx(
    work: Path,
    images: Path | None,
    lists: dict[str, Path],
    size: int,
    seed: int,
    skip_bad: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    if not lists:
        raise UsageError("no label list given", "the lists say which images there are", "give --train, --val or --test")
    if images is None:
        raise UsageError("no images folder given", "the lists name files in it", "give --images")
    if not images.is_dir():
        raise DataError(f"no images folder at {images}", do="give --images the folder that the lists' names start from")
    attrition: list[dict[str, Any]] = []

    def tell(step: str, rows: dict[str, list[Line]]) -> None:
        kept = [line for lines in rows.values() for line in lines]
        attrition.append({"step": step, "images": len(kept), "patients": len({line.patient for line in kept})})

    rows = {name: read_list(path, images) for name, path in lists.items()}
    tell("lines in the lists", rows)
    rows = {name: _unique(lists[name], lines) for name, lines in rows.items()}
    tell("without duplicate lines", rows)
    for leaves, stays in (("train", "test"), ("val", "test"), ("train", "val")):
        if leaves in rows and stays in rows:
            rows[leaves] = _apart(rows[leaves], rows[stays])
            if not rows[leaves]:
                raise DataError(
                    f"every row of {lists[leaves]} has a patient or file that is also in {lists[stays]}",
                    "patients never cross splits, so nothing is left of it",
                    "give lists of different patients",
                )
            tell(f"without {leaves} rows whose patient or file is also in {stays}", rows)
    if carved := "train" in rows and "val" not in rows:
        rows |= _carve(rows["train"], seed)
        tell(f"{CARVED:.0%} of the train patients carved into val", rows)

    flat = [(name, line) for name in SPLITS for line in rows.get(name, [])]
    paths = _found(images, flat)
    bad = _decode_all(work / "images.npy", paths, size, progress)
    skipped = [{"file": flat[row][1].file, "reason": problem} for row, problem in bad.items()]
    if bad:
        if not skip_bad:
            raise DataError(
                f"{len(bad)} of {len(flat)} images cannot be used:\n" + _some(bad.values()),
                do="repair them or take them out of the lists; --skip-bad leaves them out and says so in meta.json",
            )
        if len(bad) == len(flat):
            raise DataError(f"none of the {len(flat)} images can be used:\n" + _some(bad.values()), do="check --images")
        keep = [row for row in range(len(flat)) if row not in bad]
        _compact(work / "images.npy", keep)
        flat = [flat[row] for row in keep]
        tell("without unreadable images", {n: [line for name, line in flat if name == n] for n in SPLITS})
    index = [
        {
            "id": line.file,
            "patient": line.patient,
            "file": line.file,
            "source": line.source,
            "class": line.label,
            "split": name,
        }
        for name, line in flat
    ]
    return {
        **_describe(work, index, size, seed, attrition),
        "source": "covidx",
        "synthetic": False,
        "lists": {name: {"file": path.name, "sha256": prepared.sha256(path)} for name, path in lists.items()},
        "val_carved_from_train": carved,
        "skipped": skipped,
    }


def _synthetic(
    work: Path, patients: int, size: int, seed: int, domain: str, progress: Progress | None
) -> dict[str, Any]:
    pixels, labels, numbers = phantoms.draw(patients, size, seed, domain)
    np.save(work / "images.npy", pixels)
    if progress:
        progress(len(pixels), len(pixels))
    names = [f"synthetic-{domain}-{number:05d}" for number in numbers]
    split = splits.assign(names, labels, {"train": 0.7, "val": 0.15, "test": 0.15}, seed)
    index = [
        {
            "id": f"{name}-{row}",
            "patient": name,
            "file": None,
            "source": f"synthetic-{domain}",
            "class": CLASSES[label],
            "split": part,
        }
        for row, (name, label, part) in enumerate(zip(names, labels, split, strict=True))
    ]
    attrition = [{"step": "drawn", "images": len(index), "patients": patients}]
    return {
        **_describe(work, index, size, seed, attrition),
        "source": "synthetic",
        "synthetic": True,
        "domain": domain,
        "skipped": [],
    }


def _unique(path: Path, lines: Sequence[Line]) -> list[Line]:
    """The first line of every file; two classes for one file are an error, because neither can be believed."""
    first: dict[str, Line] = {}
    for line in lines:
        known = first.setdefault(line.file, line)
        if known.label != line.label:
            raise DataError(
                f"{path}, line {line.number}: {line.file} is {line.label}, but {known.label} in line {known.number}",
                "one image cannot have two classes",
                "correct or remove one of the lines",
            )
    return list(first.values())


def _apart(leaves: Sequence[Line], stays: Sequence[Line]) -> list[Line]:
    patients, files = {line.patient for line in stays}, {line.file for line in stays}
    return [line for line in leaves if line.patient not in patients and line.file not in files]


def _carve(lines: Sequence[Line], seed: int) -> dict[str, list[Line]]:
    part = splits.assign(
        [line.patient for line in lines],
        [CLASSES.index(line.label) for line in lines],
        {"train": 1 - CARVED, "val": CARVED},
        seed,
    )
    return {n: [line for line, p in zip(lines, part, strict=True) if p == n] for n in ("train", "val")}


def _found(images: Path, flat: Sequence[tuple[str, Line]]) -> list[Path]:
    """The path of every image: below `images`, or below its folder of the split as COVIDx is unpacked."""
    paths, missing = [], []
    for name, line in flat:
        # A val that was carved from train lies in train/.
        places = [images / line.file, images / name / line.file, images / "train" / line.file]
        here = next((path for path in places if path.is_file()), None)
        if here:
            paths.append(here)
        else:
            missing.append(line.file)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(flat)} images are missing under {images}:\n" + _some(missing),
            "the lists name them",
            "check --images, or take the lines out of the lists",
        )
    return paths


def _some(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    lines = [f"  {name}" for name in names[:most]]
    return "\n".join([*lines, *([f"  ... and {len(names) - most} more"] if len(names) > most else [])])


def _decode_all(target: Path, paths: Sequence[Path], size: int, progress: Progress | None) -> dict[int, str]:
    """Decode every file into row i of `target`; the problems {row: what and why} of those that could not be."""
    cache = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(len(paths), size, size))

    def one(row: int) -> str | None:
        try:
            cache[row] = frame(decode(paths[row], size), size)
        except DataError as error:
            return f"{error.what}: {error.why}" if error.why else error.what
        return None

    bad = {}
    # Threads: the decoders release the interpreter lock, and each writes its own rows of the map.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row, problem in enumerate(pool.map(one, range(len(paths)))):
            if problem:
                bad[row] = problem
            if progress:
                progress(row + 1, len(paths))
    cache.flush()
    return bad


def _compact(path: Path, keep: Sequence[int]) -> None:
    """Rewrite the cache with the rows `keep` alone."""
    old = np.load(path, mmap_mode="r")
    part = path.with_suffix(".part")
    new = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(keep), *old.shape[1:]))
    for at in range(0, len(keep), CHUNK):
        new[at : at + CHUNK] = old[list(keep[at : at + CHUNK])]
    new.flush()
    part.replace(path)


def _describe(
    work: Path, index: list[dict[str, Any]], size: int, seed: int, attrition: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write index.parquet and return the part of meta that both sources share."""
    table = pl.DataFrame(index, schema_overrides={"file": pl.String}).with_row_index("row")
    table = table.with_columns(
        label=pl.col("class").replace_strict(list(CLASSES), range(len(CLASSES)), return_dtype=pl.Int64)
    )
    table.write_parquet(work / "index.parquet")
    here = {name: part for name in SPLITS if len(part := table.filter(pl.col("split") == name))}

    def classes(part: pl.DataFrame) -> dict[str, int]:
        return {name: part.filter(pl.col("class") == name).height for name in CLASSES}

    return {
        "task": "covidnet",
        "raylab": version("raylab"),
        "kind": KIND,
        "classes": list(CLASSES),
        "size": size,
        "crop": CROP,
        "counts": {name: classes(part) for name, part in here.items()},
        "patients": {name: part["patient"].n_unique() for name, part in here.items()},
        # Source x class in every split: where one source has one class only, a network may learn the source.
        "sources": {
            name: {s: classes(part.filter(pl.col("source") == s)) for s in sorted(set(part["source"]))}
            for name, part in here.items()
        },
        "attrition": attrition,
        "split_hash": prepared.split_hash(list(table.select("patient", "split").iter_rows())),
        "seed": seed,
        "statistics": _statistics(work / "images.npy", here["train"]["row"].to_numpy()) if "train" in here else None,
    }


def _statistics(path: Path, rows: NDArray[Any]) -> dict[str, float]:
    """Mean and standard deviation of pixels / 255 over `rows`, from their exact histogram."""
    images = np.load(path, mmap_mode="r")
    counts = np.zeros(256, dtype=np.int64)
    for at in range(0, len(rows), CHUNK):
        counts += np.bincount(images[rows[at : at + CHUNK]].ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = float((counts * values).sum() / counts.sum())
    return {"mean": mean, "std": float(np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum()))}
