"""`prepare covidnet`: label lists and image files, or drawn phantoms -> `images.npy` + `index.parquet` + meta.json.

images.npy     uint8 [N, size, size], decoded once, read as a memory map; see `decode` for pixel range and view
index.parquet  row, id, patient, group, file, source, view, class, label, split; row i of it is image i

Rows of one `group` never cross splits: those of a patient, of its copies under other names (duplicates.py), and what a
manifest groups.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data import prepared, splits
from raylab.data.identifiers import UNKNOWN, People, look_alike
from raylab.data.images import duplicates, phantoms, published
from raylab.data.images.covidx import CLASSES, Line, read_list
from raylab.data.images.decode import frame, read_picture
from raylab.data.images.grey import UNFIT
from raylab.data.images.manifest import enriched, read_manifest
from raylab.data.images.meta import Duplicates, ImageMeta, Published
from raylab.data.text import not_utf8, read_text
from raylab.errors import DataError, UsageError, unknown

KIND = "cxr-frontal-u8"
CROP = "top 8 % cut off, central square, resized with antialiasing; uint8 0 (black, air) to 255"
SPLITS = ("train", "val", "test")
CARVED = 0.15  # fraction of the train patients that becomes val if no val list is given
CHUNK = 256  # images decoded and held in memory at a time
# where lists overlap, the row leaves the first split of the pair
APART = (("train", "test"), ("val", "test"), ("train", "val"))
FRONTAL = ("PA", "AP", "FRONTAL")  # prefixes of frontal views: AP Supine, PA erect
DULL = 24  # grey levels; the middle 90% of pixels span at least 39 in 2,146 X-rays of four collections
ASPECT = (0.75, 1.9)  # width / height; 2,146 frontal images of four collections are within 0.78 to 1.87

Progress = Callable[[int, int], None]
Spread = Callable[[Callable[[Any, Path], None], Mapping[Path, Any], float, Progress | None], None]
"""raylab.distributed.map.run_chunks: (work, {path: argument}, cpus, tell)."""


def prepare_images(
    task: str,
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
    domain: str | None = None,
    manifest: Path | None = None,
    apart_from: Sequence[Path] = (),
    spread: Spread | None = None,
    replace: bool = False,
    classes: Sequence[str] = (),
) -> ImageMeta:
    """Prepare the directory `out` for `task` and return its meta. Existing prepared X-rays are replaced only with
    `replace`.

    source "covidx" reads the given lists, or the rows of `manifest` (only of its `domain` if given), and the files
    under `images`; "synthetic" draws `patients` phantoms of site `domain`, A by default. Rows that are copies of an
    image in one of the prepared directories `apart_from` are left out. `progress(done, all)` is called as images are
    decoded. With `skip_bad`, unreadable images are listed in meta["skipped"] instead of failing. `spread` decodes
    chunks elsewhere (raylab.distributed.map.run_chunks), by default this process does. `classes` are those of lists and
    manifest, in the order of the labels; CLASSES unless given.
    """
    classes = check_classes(classes)
    if size < 16:
        raise UsageError(f"--size {size} is too small", "the networks need at least 16 px", "use --size 224")
    if source == "covidx":
        lists = {name: path for name, path in zip(SPLITS, (train, val, test), strict=True) if path is not None}
        what = _input(images, lists, manifest, domain, apart_from, classes)

        def write(work: Path) -> ImageMeta:
            return _covidx(task, work, what, size, seed, skip_bad, progress, spread)

        raw = dict.fromkeys(path for path in (images, manifest, *lists.values()) if path is not None)
        return prepared.publish(out, write, task, replace, list(raw))
    if source == "synthetic":
        if classes != CLASSES:
            raise UsageError(f"phantoms have the classes {', '.join(CLASSES)}", do="leave --classes out")
        if patients < 30:
            raise UsageError(f"--patients {patients} is too few", "every split needs every class", "use at least 30")

        def draw(work: Path) -> ImageMeta:
            return _synthetic(task, work, patients, size, seed, domain or "A", progress)

        return prepared.publish(out, draw, task, replace)
    raise unknown("source of chest X-rays", source, ("covidx", "synthetic"))


@dataclass(frozen=True)
class Input:
    """The sources of images and labels."""

    images: Path
    lists: dict[str, Path]
    manifest: Path | None
    domain: str | None
    apart_from: tuple[Path, ...]
    classes: tuple[str, ...]


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """The classes, or CLASSES if there are none; UsageError for names that cannot be told apart or written."""
    if not classes:
        return CLASSES
    if len({name.lower() for name in classes}) < len(classes) or len(classes) < 2:
        raise UsageError(f"--classes {' '.join(classes)}", "it takes at least two names that differ", "correct it")
    if wrong := [name for name in classes if not re.fullmatch(r"[\w.\- ]+", name)]:
        why = "scores and columns are named after classes"
        raise UsageError(f"--classes: '{wrong[0]}'", why, "use letters, digits, spaces, and . _ -")
    return tuple(classes)


def _input(
    images: Path | None,
    lists: dict[str, Path],
    manifest: Path | None,
    domain: str | None,
    apart_from: Sequence[Path],
    classes: tuple[str, ...],
) -> Input:
    if not lists and manifest is None:
        do = "give --train, --val or --test, or --manifest"
        raise UsageError("no label list given", "the lists name the images", do)
    if lists and (wrong := [name for name in classes if " " in name]):
        why = "the words of a label list are separated by spaces"
        raise UsageError(f"--classes: '{wrong[0]}'", why, "write it without spaces there, or give a --manifest")
    if images is None:
        raise UsageError("no images folder given", "the lists name files in it", "give --images")
    if not images.is_dir():
        raise DataError(
            f"no images folder at {images}", do="set --images to the folder to which the lists' names are relative"
        )
    return Input(images, lists, manifest, domain, tuple(apart_from), classes)


def _covidx(
    task: str,
    work: Path,
    what: Input,
    size: int,
    seed: int,
    skip_bad: bool,
    progress: Progress | None,
    spread: Spread | None,
) -> ImageMeta:
    others = {path: _others(path) for path in what.apart_from}  # before anything is decoded
    rows, warnings = _rows(what)
    listed = {name: dict(Counter(line.label for line in lines)) for name, lines in rows.items()}
    attrition: list[dict[str, int | str]] = []

    def tell(step: str, rows: dict[str, list[Line]]) -> None:
        kept = [line for lines in rows.values() for line in lines]
        attrition.append({"step": step, "images": len(kept), "patients": len({line.person for line in kept})})

    tell("lines in the lists" if what.lists else "rows of the manifest", rows)
    rows = {name: _unique(_origin(what, name), lines) for name, lines in rows.items()}
    tell("without duplicate lines", rows)
    for leaves, stays in APART:
        if leaves in rows and stays in rows:
            people = People(line.person for line in rows[stays])
            files = {line.file for line in rows[stays]}
            kept = [line for line in rows[leaves] if line.person not in people and line.file not in files]
            rows[leaves] = _left(what, leaves, stays, kept)
            tell(f"without {leaves} rows whose patient or file is also in {stays}", rows)

    flat = [(name, line) for name in SPLITS for line in rows.get(name, [])]
    paths = _found(what.images, flat)
    bad, shapes, views, contrasts, dull = _decode_all(work, paths, size, progress, spread)
    skipped = [{"file": flat[row][1].file, "reason": problem} for row, problem in sorted(bad.items())]
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} of {len(flat)} images cannot be used:\n" + _some(bad[row] for row in sorted(bad)),
            do="repair them or remove them from the lists; --skip-bad skips them and lists them in meta.json",
        )
    if len(bad) == len(flat):
        raise DataError(f"none of the {len(flat)} images can be used:\n" + _some(bad.values()), do="check --images")
    keep = [row for row in range(len(flat)) if row not in bad]

    def of_splits(kept: list[int], split: dict[int, str] | None = None) -> dict[str, list[Line]]:
        placed = split or {row: flat[row][0] for row in kept}
        return {name: [flat[row][1] for row in kept if placed[row] == name] for name in SPLITS}

    if bad:
        tell("without unreadable images", of_splits(keep))
    small = duplicates.thumbnails(np.load(work / "images.npy", mmap_mode="r"), keep)
    for path, there in others.items():
        copies = {i for i, _, _ in duplicates.pairs(small, there)}
        stay = [at for at in range(len(keep)) if at not in copies]
        keep, small = [keep[at] for at in stay], small[stay]
        if not keep:
            raise DataError(f"every image is a copy of one in {path}", "--apart-from leaves out copies")
        tell(f"without copies of images in {path.name}", of_splits(keep))
    copies_found = [(keep[i], keep[j], ncc) for i, j, ncc in duplicates.pairs(small)]
    group = _groups(flat, paths, keep, copies_found)
    for leaves, stays in APART:
        if leaves in rows and stays in rows:
            held = {group[row] for row in keep if flat[row][0] == stays}
            gone = {row for row in keep if flat[row][0] == leaves and group[row] in held}
            if gone:
                keep = [row for row in keep if row not in gone]
                _left(what, leaves, stays, [flat[row][1] for row in keep if flat[row][0] == leaves])
                tell(f"without {leaves} rows that are copies of, or belong with, rows of {stays}", of_splits(keep))
    split = {row: flat[row][0] for row in keep}
    if carved := "train" in rows and "val" not in rows:
        mine = [row for row in keep if split[row] == "train"]
        labels = [what.classes.index(flat[row][1].label) for row in mine]
        parts = splits.assign([group[row] for row in mine], labels, {"train": 1 - CARVED, "val": CARVED}, seed)
        split |= dict(zip(mine, parts, strict=True))
        keep = [row for name in SPLITS for row in keep if split[row] == name]
        tell(f"{CARVED:.0%} of the train patients carved into val", of_splits(keep, split))
    if keep != list(range(len(flat))):
        _compact(work / "images.npy", keep)
    index = [
        {
            "id": flat[row][1].file,
            "patient": flat[row][1].patient,  # within its source
            "group": group[row],
            "file": flat[row][1].file,
            "source": flat[row][1].source,
            "view": flat[row][1].view or views.get(row) or None,
            "class": flat[row][1].label,
            "split": split[row],
        }
        for row in keep
    ]
    sources = {str(row["source"]).strip().lower() for row in index}
    if "synthetic" in sources and len(sources) > 1:
        raise DataError(
            "images of the source 'synthetic' beside those of others",
            f"{len(sources) - 1} other sources",
            "prepare them in directories of their own",
        )
    meta = _describe(
        task, work, index, what.classes, size, seed, attrition, "covidx", synthetic=sources == {"synthetic"}
    )
    warnings += _unidentified([line for _, line in flat], what)
    warnings += _unusual(index, [shapes[row] for row in keep])
    contrast = Counter(contrasts[row] for row in keep)
    if unfit := sum(n for name, n in contrast.items() if name.endswith(UNFIT)):
        warnings.append(f"{unfit} DICOM files have a window that does not suit their pixels; it was not applied")
    if faint := [flat[row][1].file for row in keep if row in dull]:
        warnings.append(
            f"{len(faint)} images show 90% of their pixels in less than {DULL} of 256 grey levels: check "
            f"whether a very bright or dark object determines their contrast\n{_some(faint)}"
        )
    warnings += [f"no {name} in train" for name, n in meta.counts.get("train", {}).items() if n == 0]
    conflicts = [(i, j) for i, j, _ in copies_found if flat[i][1].label != flat[j][1].label]
    if conflicts:
        pairs = _some(f"{flat[i][1].file} and {flat[j][1].file}" for i, j in conflicts)
        warnings.append(f"{len(conflicts)} pairs of copies carry different classes:\n{pairs}")
    table = published.table_of([path.name for path in what.lists.values()]) if what.classes == CLASSES else None
    facts = {
        "lists": {name: {"file": path.name, "sha256": prepared.sha256(path)} for name, path in what.lists.items()},
        "manifest": None if what.manifest is None else prepared.sha256(what.manifest),
        "listed": listed,
        "published": None if table is None else Published(table=table, differs=published.differences(table, listed)),
        "val_carved_from_train": carved,
        "skipped": skipped,
        "contrast": dict(contrast),
        "duplicates": Duplicates(
            pairs=len(copies_found),
            of_different_patients=sum(flat[i][1].person != flat[j][1].person for i, j, _ in copies_found),
            of_different_classes=len(conflicts),
            most_alike=sorted((round(ncc, 3) for _, _, ncc in copies_found), reverse=True)[:10],
        ),
        "warnings": warnings,
    }
    return meta.model_copy(update=facts)


def _rows(what: Input) -> tuple[dict[str, list[Line]], list[str]]:
    """{split: lines} of the lists, else of the manifest, and warnings about them."""
    texts = [*what.lists.values(), *([what.manifest] if what.manifest else [])]
    told = [not_utf8(path.name, lines) for path in texts if (lines := read_text(path)[1])]
    names: dict[Any, Any] = {}
    if not what.lists:
        alone = read_manifest(what.manifest or Path(), what.images, what.domain, what.classes)
        return _name_once(alone, what.images, names), told
    lists = {name: read_list(path, what.images, what.classes) for name, path in what.lists.items()}
    rows = _name_once(lists, what.images, names)
    if what.manifest is None:
        return rows, told
    manifest = _name_once(read_manifest(what.manifest, what.images, None, what.classes), what.images, names)
    described = {line.file for lines in manifest.values() for line in lines}
    listed = [line.file for lines in rows.values() for line in lines]
    if absent := sum(file not in described for file in listed):
        if absent == len(listed):
            raise DataError(
                f"none of the {absent} files of the lists is among the {len(described)} of {what.manifest}",
                "next to lists, a manifest provides views, groups and sources by file name",
                "leave --manifest out, or write its paths as the lists do",
            )
        told.append(f"{absent} of {len(listed)} files of the lists are not in the manifest: no view and no group")
    rows, differ = enriched(rows, manifest)
    if differ:
        told.append(f"{differ} lines have another class in the manifest; the class of the lists is used")
    return rows, told


def _name_once(rows: Mapping[str, list[Line]], images: Path, names: dict[Any, Any]) -> dict[str, list[Line]]:
    """The lines with one name for each file, and one file for each name.

    The first name read for a file stays: `./a.png` and a link to it are `a.png` as well. Different files of the same
    name in the folders of splits become `test/a.png`. `names` maps device and inode to names, and back.
    """

    def name(split: str, file: str) -> str:
        file = PurePosixPath(file).as_posix()
        path = _place(images, split, file)
        if path is None:
            return file
        status = path.stat()
        inode = (status.st_dev, status.st_ino)
        if inode not in names:
            if file in names:
                file = path.relative_to(images).as_posix()
            names[inode], names[file] = file, inode
        return str(names[inode])

    return {split: [replace(line, file=name(split, line.file)) for line in lines] for split, lines in rows.items()}


def _place(images: Path, split: str, file: str) -> Path | None:
    """The path of a list's file below `images`, or below the folder of the split as in COVIDx; None if it is
    missing."""
    # Files of a val split that was cut from train are in train/.
    places = (images / file, images / split / file, images / "train" / file)
    return next((path for path in places if path.is_file()), None)


def _origin(what: Input, split: str) -> Path:
    return what.lists[split] if what.lists else what.manifest or Path()


def _left(what: Input, leaves: str, stays: str, kept: list[Line]) -> list[Line]:
    if not kept:
        raise DataError(
            f"every {leaves} row of {_origin(what, leaves)} has a patient, file or copy that is also in "
            f"{stays} of {_origin(what, stays)}",
            "patients never cross splits, so no row is left",
            "give lists of different patients",
        )
    return kept


def _others(directory: Path) -> NDArray[np.uint8]:
    prepared.read_meta(directory, None, ImageMeta)
    return duplicates.thumbnails(np.load(directory / "images.npy", mmap_mode="r"))


def _groups(
    flat: Sequence[tuple[str, Line]],
    paths: Sequence[Path],
    keep: Sequence[int],
    copies: Iterable[tuple[int, int, float]],
) -> dict[int, str]:
    """The group of every kept row: its patient, merged with those of its copies and with the groups of a manifest."""
    # `~` sorts after other names, so that groups are named after a patient
    names = {
        row: [str(line.person), f"~file {paths[row]}", *([f"~group {line.group}"] if line.group else [])]
        for row, (_, line) in ((row, flat[row]) for row in keep)
    }
    for i, j, _ in copies:
        names[i].append(str(flat[j][1].person))
    return dict(zip(keep, duplicates.merged([names[row] for row in keep]), strict=True))


def _unidentified(lines: Sequence[Line], what: Input) -> list[str]:
    """Warnings about lines whose patient is uncertain."""
    told = []
    if without := sum(line.person.source == UNKNOWN for line in lines):
        told.append(
            f"{without} of {len(lines)} images name no source: a patient number is assumed to mean the same "
            "person as the same number elsewhere. Add the hospital or collection of each image in a column source"
        )
    if without := sum(line.patient == line.file for line in lines):
        told.append(f"{without} of {len(lines)} images name no patient: each counts as a patient of its own")
    numbers: dict[str, set[str]] = {}
    for line in lines:
        numbers.setdefault(line.person.source, set()).add(line.patient)
    if alike := sum(look_alike(of) for of in numbers.values()):
        told.append(
            f"{alike} patient numbers differ from another one of their source only in letter case or "
            "leading zeros: they count as different people"
        )
    return told


def _unusual(index: list[dict[str, Any]], shapes: list[tuple[int, int]]) -> list[str]:
    """Warnings about images that may not be frontal radiographs, by their stated view and by aspect ratio."""
    told = []
    views = Counter(row["view"] for row in index if row["view"] and not row["view"].upper().startswith(FRONTAL))
    if views:
        files = _some(row["file"] for row in index if row["view"] in views)
        listed = ", ".join(f"{n} {name}" for name, n in sorted(views.items()))
        told.append(f"{views.total()} images do not have a frontal view ({listed}):\n{files}")
    odd = [row["file"] for row, (h, w) in zip(index, shapes, strict=True) if not ASPECT[0] <= w / h <= ASPECT[1]]
    if odd:
        told.append(
            f"{len(odd)} images are narrower or wider than chest radiographs (width / height outside "
            f"{ASPECT[0]} to {ASPECT[1]}): lateral views, CT slices or figures?\n{_some(odd)}"
        )
    return told


def _synthetic(
    task: str, work: Path, patients: int, size: int, seed: int, domain: str, progress: Progress | None
) -> ImageMeta:
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
            "group": name,
            "file": None,
            "source": f"synthetic-{domain}",
            "view": None,
            "class": CLASSES[label],
            "split": part,
        }
        for row, (name, label, part) in enumerate(zip(names, labels, split, strict=True))
    ]
    attrition: list[dict[str, int | str]] = [{"step": "drawn", "images": len(index), "patients": patients}]
    meta = _describe(task, work, index, CLASSES, size, seed, attrition, "synthetic", synthetic=True)
    return meta.model_copy(update={"domain": domain, "skipped": [], "warnings": []})


def _unique(path: Path, lines: Sequence[Line]) -> list[Line]:
    """The first line of every file. Two classes for one file are an error, because neither can be trusted."""
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


def _found(images: Path, flat: Sequence[tuple[str, Line]]) -> list[Path]:
    """The path of every image."""
    paths, missing = [], []
    for name, line in flat:
        if here := _place(images, name, line.file):
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


def _decode_all(
    work: Path, paths: Sequence[Path], size: int, progress: Progress | None, spread: Spread | None
) -> tuple[dict[int, str], list[tuple[int, int]], dict[int, str], dict[int, str], set[int]]:
    """Decode every file into row i of `work`/images.npy, chunk by chunk.

    Returns the problems {row: what and why} of unusable files, (height, width) of every file, the views stated in
    DICOM files {row: view}, how the brightness of the others was obtained {row: contrast}, and the rows of images that
    use few grey levels.
    """
    parts = work / "parts"
    parts.mkdir()
    cuts = range(0, len(paths), CHUNK)
    chunks = {parts / f"{at:08d}.npz": ([str(p) for p in paths[at : at + CHUNK]], size) for at in cuts}
    cache = np.lib.format.open_memmap(work / "images.npy", mode="w+", dtype=np.uint8, shape=(len(paths), size, size))
    bad: dict[int, str] = {}
    views: dict[int, str] = {}
    contrasts: dict[int, str] = {}
    dull: set[int] = set()
    shapes: list[tuple[int, int]] = []

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(min(done * CHUNK, len(paths)), len(paths))

    if spread is not None:
        spread(decode_chunk, chunks, 1.0, told)
    for done, (path, argument) in enumerate(chunks.items(), 1):
        if spread is None:
            decode_chunk(argument, path)
            told(done, len(chunks))
        with np.load(path) as part:
            at = (done - 1) * CHUNK
            cache[at : at + len(part["images"])] = part["images"]
            said = json.loads(str(part["said"]))
        bad |= {at + int(row): problem for row, problem in said["bad"].items()}
        views |= {at + int(row): name for row, name in said["views"].items()}
        contrasts |= {at + int(row): name for row, name in said["contrasts"].items()}
        dull |= {at + row for row in said["dull"]}
        shapes += [(h, w) for h, w in said["shapes"]]
        path.unlink()
    parts.rmdir()
    cache.flush()
    return bad, shapes, views, contrasts, dull


def decode_chunk(argument: tuple[list[str], int], path: Path) -> None:
    """Decode files (paths, size) into the archive `path`: images uint8 [n, size, size], and JSON with the findings."""
    files, size = argument
    images = np.zeros((len(files), size, size), dtype=np.uint8)
    said: dict[str, Any] = {"bad": {}, "views": {}, "contrasts": {}, "dull": [], "shapes": [(1, 1)] * len(files)}

    def one(row: int) -> None:
        file = Path(files[row])
        try:
            picture = read_picture(file, size)
            images[row], said["shapes"][row] = frame(picture.grey, size), picture.grey.shape
            said["contrasts"][row] = picture.contrast
            if is_dull(images[row]):
                said["dull"].append(row)
            if picture.view:
                said["views"][row] = picture.view
        except DataError as error:
            what = f"{error.what}: {error.why}" if error.why else error.what
            said["bad"][row] = f"{what}; {error.do}" if error.do else what

    # Threads, because the decoders release the interpreter lock and each writes its own rows.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(one, range(len(files))):
            pass
    beside = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez(beside, images=images, said=json.dumps(said))
    beside.replace(path)


def is_dull(view: NDArray[np.uint8]) -> bool:
    """Whether a view uses few grey levels."""
    return bool(np.subtract(*np.percentile(view[::4, ::4], (95, 5))) < DULL)


def _compact(path: Path, keep: Sequence[int]) -> None:
    """Rewrite the cache with only the rows `keep`."""
    old = np.load(path, mmap_mode="r")
    part = path.with_suffix(".part")
    new = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(keep), *old.shape[1:]))
    for at in range(0, len(keep), CHUNK):
        new[at : at + CHUNK] = old[list(keep[at : at + CHUNK])]
    new.flush()
    part.replace(path)


def _describe(
    task: str,
    work: Path,
    index: list[dict[str, Any]],
    classes: tuple[str, ...],
    size: int,
    seed: int,
    attrition: list[dict[str, int | str]],
    source: str,
    synthetic: bool,
) -> ImageMeta:
    """Write index.parquet and return the part of meta that both sources share."""
    table = pl.DataFrame(index, schema_overrides={"file": pl.String, "view": pl.String}).with_row_index("row")
    table = table.with_columns(
        label=pl.col("class").replace_strict(list(classes), range(len(classes)), return_dtype=pl.Int64)
    )
    table.write_parquet(work / "index.parquet")
    here = {name: part for name in SPLITS if len(part := table.filter(pl.col("split") == name))}

    def count(part: pl.DataFrame) -> dict[str, int]:
        return {name: part.filter(pl.col("class") == name).height for name in classes}

    return ImageMeta(
        source=source,
        synthetic=synthetic,
        task=task,
        raylab=version("raylab"),
        kind=KIND,
        classes=list(classes),
        size=size,
        crop=CROP,
        counts={name: count(part) for name, part in here.items()},
        patients={name: part.select(pl.struct("source", "patient").n_unique()).item() for name, part in here.items()},
        # Source x class in every split: if a source has one class only, a network may learn the source.
        sources={
            name: {s: count(part.filter(pl.col("source") == s)) for s in sorted(set(part["source"]))}
            for name, part in here.items()
        },
        attrition=attrition,
        split_hash=prepared.split_hash(list(table.select("group", "split").iter_rows())),
        seed=seed,
        statistics=_statistics(work / "images.npy", here["train"]["row"].to_numpy()) if "train" in here else None,
    )


def _statistics(path: Path, rows: NDArray[Any]) -> dict[str, float]:
    """Mean and standard deviation of pixels / 255 over `rows`, from their exact histogram."""
    images = np.load(path, mmap_mode="r")
    counts = np.zeros(256, dtype=np.int64)
    for at in range(0, len(rows), CHUNK):
        counts += np.bincount(images[rows[at : at + CHUNK]].ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = float((counts * values).sum() / counts.sum())
    return {"mean": mean, "std": float(np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum()))}
