"""Manifests of images, one CSV row per image, and folders that contain images with a manifest or COVIDx lists.

UTF-8 or Windows-1252 text, separated by commas, semicolons or tabs. Columns, by any of these names: the image (path,
file, filename), its class (label, class); optional: patient (patient, patientid, patient_id), source (the hospital or
collection within which that number means one person), group (rows that must stay together), split, domain, view. Paths
start from the manifest's own folder or from the images folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import polars as pl

from raylab.data.identifiers import UNKNOWN, one_identifier
from raylab.data.images.covidx import CLASSES, Line, patient_of
from raylab.data.text import decode, separator
from raylab.errors import DataError

COLUMNS = {
    "file": ("path", "file", "filename"),
    "label": ("label", "class"),
    "patient": ("patient", "patientid", "patient_id"),
    "group": ("group",),
    "source": ("source",),
    "split": ("split",),
    "domain": ("domain",),
    "view": ("view",),
}
WORDS = {"covid": "COVID-19", "covid19": "COVID-19", "healthy": "normal"} | {name.lower(): name for name in CLASSES}
SPLITS = ("train", "val", "test")


def read_manifest(
    path: Path, images: Path, domain: str | None = None, classes: Sequence[str] = CLASSES
) -> dict[str, list[Line]]:
    """{split: lines}, files relative to `images`; only of `domain` if given. `classes` may have any letter case in it.

    A manifest without a split column is an external set: all its rows are test. Raises DataError for missing columns,
    unknown classes or splits, and paths outside of the folder, with the line.
    """
    try:
        text, _ = decode(path.read_bytes(), str(path))
        mark = separator(text.partition("\n")[0])
        table = pl.read_csv(text.encode(), infer_schema=False, separator=mark)
    except (OSError, pl.exceptions.PolarsError) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"cannot read the manifest {path}", why, "give a CSV file with a header") from error
    lower = {name.strip().lower(): name for name in table.columns}
    found = {ours: next((lower[n] for n in names if n in lower), None) for ours, names in COLUMNS.items()}
    if missing := [" or ".join(COLUMNS[name]) for name in ("file", "label") if found[name] is None]:
        do = "rename its columns (docs/data.md, manifests)"
        raise DataError(f"{path} has no column {', '.join(missing)}", f"it has {', '.join(table.columns)}", do)
    get = {name: table[column].to_list() for name, column in found.items() if column is not None}
    if domain is not None and "domain" not in get:
        raise DataError(f"{path} has no column domain", f"domain '{domain}' was requested", "remove --domain")
    words = WORDS if tuple(classes) == CLASSES else {name.lower(): name for name in classes}
    rows: dict[str, list[Line]] = {}
    for at in range(table.height):
        row = {name: (values[at] or "").strip() for name, values in get.items()}
        if domain is not None and row["domain"] != domain:
            continue
        split = row.get("split") or ("test" if found["split"] is None else "")
        label = words.get(row["label"].lower())
        if label is None:
            do = "correct the line, or name the classes of your data with --classes"
            raise DataError(f"{path}, line {at + 2}: class '{row['label']}'", f"known: {', '.join(words)}", do)
        if split not in SPLITS:
            raise DataError(f"{path}, line {at + 2}: split '{split}'", f"known: {', '.join(SPLITS)}")
        if not row["file"]:
            raise DataError(f"{path}, line {at + 2}: no file name", do="correct the line")
        file = _relative(row["file"], path, images)
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise DataError(
                f"{path}, line {at + 2}: the file {file} is outside of the images folder", do="correct the line"
            )
        patient = patient_of(row.get("patient", ""), file, f"{path}, line {at + 2}")
        group = one_identifier(row.get("group", "")) or ""
        line = Line(patient, file, label, row.get("source") or UNKNOWN, at + 2, row.get("view", ""), group)
        rows.setdefault(split, []).append(line)
    if not rows:
        domains = sorted({d for d in get.get("domain", []) if d})
        raise DataError(
            f"{path} has no rows" + (f" of domain '{domain}'" if domain else ""),
            f"its domains: {', '.join(domains)}" if domains else "",
        )
    return rows


def _relative(file: str, manifest: Path, images: Path) -> str:
    """`file` as a path below `images`; some manifests start it from their own folder (`images/a.png`)."""
    file = file.replace("\\", "/")
    absolute = (manifest.absolute().parent / file).absolute()
    if absolute.is_relative_to(images.absolute()) and not (images / file).exists():
        return absolute.relative_to(images.absolute()).as_posix()
    return file


def enriched(rows: Mapping[str, list[Line]], manifest: Mapping[str, list[Line]]) -> tuple[dict[str, list[Line]], int]:
    """The lines of lists with view and group from a manifest, and its source if the list has none; and the number of
    lines with another class in the manifest, where the list counts because the published experiment reads it."""
    known = {line.file: line for lines in manifest.values() for line in lines}
    out: dict[str, list[Line]] = {}
    differ = 0
    for split, lines in rows.items():
        out[split] = []
        for line in lines:
            if (more := known.get(line.file)) is not None:
                differ += more.label != line.label
                source = more.source if line.source == UNKNOWN else line.source
                line = replace(line, view=more.view, group=more.group, source=source)
            out[split].append(line)
    return out, differ


@dataclass(frozen=True)
class Folder:
    """The location of images, label lists and manifest of a delivered data set."""

    images: Path
    lists: dict[str, Path]
    manifest: Path | None


def discover(folder: Path, domain: str | None = None, splits: Sequence[str] = SPLITS) -> Folder:
    """Find the data set in `folder`: `images/` (else the folder itself), label lists `train*.txt`, `val*.txt`,
    `test*.txt` in it or in `labels/`, and `manifest.csv`. With `domain`, lists end in `_DOMAIN.txt`. Lists of other
    splits than `splits` are ignored.

    Raises DataError if there is neither list nor manifest, or more than one list for a split.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    images = folder / "images" if (folder / "images").is_dir() else folder
    manifest = folder / "manifest.csv"
    lists: dict[str, Path] = {}
    ending = "*.txt" if domain is None else f"*_{domain}.txt"
    for split in splits:
        here = sorted({*folder.glob(split + ending), *(folder / "labels").glob(split + ending)})
        if len(here) > 1:
            raise DataError(
                f"{folder} has {len(here)} {split} lists: {', '.join(p.name for p in here)}",
                "it is ambiguous which one is meant",
                f"raylab prepare TASK --path {folder} --domain {here[0].stem.rpartition('_')[2]} --out DIR "
                f"(the ending of the list), or --images DIR --{split} LIST",
            )
        if here:
            lists[split] = here[0]
    if not lists and not manifest.is_file():
        raise DataError(
            f"{folder} has no label list{f' of domain {domain}' if domain else ''} and no manifest.csv",
            f"looked for {', '.join(f'{split}*.txt' for split in splits)} here and in labels/",
            "give lists with --train, --val, --test, or with --manifest a table with columns path, label and split; "
            "and images with --images",
        )
    return Folder(images, lists, manifest if manifest.is_file() else None)
