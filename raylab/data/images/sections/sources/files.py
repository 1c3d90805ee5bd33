"""A folder of images of one brain's sections, and a table: a CSV file with the columns `file` (name in the folder),
`section` (its number in the brain, an integer), the depth, and, if sizes differ, `um_per_px` (micrometres a pixel).

All images need the same bands, bits and resolution. The resolution is the table's, or that of the files (TIFF, pixels
per centimetre); where neither says it, images of several sizes are refused, because they may have several resolutions.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data.images.sections.image import PICTURES, TIFFS, ImageHeader, read_blocks, read_header
from raylab.data.images.sections.section import Blocks, Section, SectionRequest, SectionSource
from raylab.errors import DataError, UsageError

NAMES = {1: ("grey",), 3: ("red", "green", "blue")}
SAME = 0.01  # relative difference up to which resolutions are one
MOST = 5  # rows or files named in an error


def read(request: SectionRequest) -> SectionSource:
    folder = request.path
    if folder is None or not folder.is_dir():
        raise UsageError("the source files needs --path DIR", do="give the folder with the images of the sections")
    manifest = request.manifest or next(
        (path for path in (folder / "sections.csv", folder.parent / "sections.csv") if path.is_file()), None
    )
    if manifest is None:
        raise UsageError(f"there is no sections.csv in or beside {folder}", do="give the table with --manifest FILE")
    table = read_table(manifest, request.depth)
    images = {path.name for path in folder.iterdir() if path.suffix.lower() in (*PICTURES, *TIFFS)}
    if missing := [name for name in table["file"] if not (folder / name).is_file()]:
        raise DataError(
            f"{manifest} names {len(missing)} files that {folder} does not have: {_some(missing)}",
            do="restore them, or take their rows out",
        )
    known = table.filter(pl.col("depth").is_not_null())
    if known.is_empty():
        raise DataError(f"no section of {manifest} has a {request.depth}", do="name the column with --depth COLUMN")
    headers = [read_header(folder / name, request.level) for name in known["file"]]
    um_per_px = check_headers(known, headers)
    pairs = "\n".join(f"{name}\t{number}" for name, number in table.select("file", "section").iter_rows())
    unnamed = len(images - set(table["file"]))
    return SectionSource(
        name="sections",
        scope=f"brain {hashlib.sha256(pairs.encode()).hexdigest()[:12]}",
        bands=NAMES.get(headers[0].bands, tuple(f"band {k}" for k in range(1, headers[0].bands + 1))),
        bits=headers[0].bits,
        depth_name=request.depth,
        sections=[
            Section(name, number, depth, header.width, header.height, _Reader(folder / name, request.level))
            for (name, number, depth), header in zip(
                known.select("file", "section", "depth").iter_rows(), headers, strict=True
            )
        ],
        um_per_px=um_per_px,
        attrition=(
            ("images in the folder", len(images)),
            ("in the table", table.height),
            ("with a depth", known.height),
        ),
        warnings=(f"{unnamed} images are not in the table and were not read",) if unnamed else (),
    )


class _Reader:
    """The function `read` of a section in a file."""

    def __init__(self, path: Path, level: int) -> None:
        self.path, self.level = path, level

    def __call__(self, blocks: Blocks) -> Iterator[NDArray[np.unsignedinteger]]:
        return read_blocks(self.path, self.level, blocks)


def read_table(path: Path, depth: str) -> pl.DataFrame:
    """Return file, section, depth (null if empty) and um_per_px (null without the column), by section; DataError for
    rows that cannot be used, by line."""
    try:
        text = pl.read_csv(path, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"cannot read {path}", str(error).partition("\n")[0], "give a CSV file") from error
    for name in ("file", "section", depth):
        if name not in text.columns:
            do = "name the column of the depth with --depth" if name == depth else "add it"
            raise DataError(f"{path} has no column '{name}'", f"it has {', '.join(text.columns)}", do)
    columns = {"file": "file", "section": "section", depth: "depth", "um_per_px": "um_per_px"}
    rows = text.select(
        pl.col(name).str.strip_chars().replace("", None).alias(new)
        for name, new in columns.items()
        if name in text.columns
    )
    if "um_per_px" not in rows.columns:
        rows = rows.with_columns(um_per_px=pl.lit(None, pl.String))
    typed = rows.with_columns(
        pl.col("section").cast(pl.Int64, strict=False), pl.col("depth", "um_per_px").cast(pl.Float64, strict=False)
    )
    for name, kind in (("file", "a file name"), ("section", "an integer"), ("depth", "a number"),
                       ("um_per_px", "a positive number")):  # fmt: skip
        empty_is_wrong = name in ("file", "section")
        for line, (given, value) in enumerate(zip(rows[name], typed[name], strict=True), 2):
            wrong = value is None or (isinstance(value, float) and not isfinite(value))
            wrong |= name == "um_per_px" and value is not None and value <= 0
            if wrong and (given is not None or empty_is_wrong):
                column = depth if name == "depth" else name
                raise DataError(f"{path}, line {line}: {column} is {given!r}", f"it must be {kind}", "correct it")
    for name in ("file", "section"):
        if twice := [value for value, n in Counter(typed[name]).items() if n > 1]:
            raise DataError(
                f"{path} has several rows with the {name} {_some(sorted(map(str, twice)))}",
                "a table is of one brain, and each of its sections has one row",
                "correct it, or split the table by brain",
            )
    return typed.sort("section")


def check_headers(table: pl.DataFrame, headers: Sequence[ImageHeader]) -> float | None:
    """Return the micrometres a pixel, None if unknown; DataError if images differ in bands, bits or resolution."""
    names = table["file"].to_list()
    _only(names, [(header.bands, header.bits) for header in headers], "bands and bits",
          lambda form: f"{form[0]} of {form[1]} bits", "convert them to one form")  # fmt: skip
    um = [given or header.um_per_px for given, header in zip(table["um_per_px"], headers, strict=True)]
    one_resolution = "give one resolution: resample the others, use --level, or prepare them on their own"
    if all(value is None for value in um):
        _only(names, [(header.width, header.height) for header in headers], "sizes in pixels",
              lambda size: f"{size[0]} x {size[1]}",
              "nothing says that they have one resolution: add the column um_per_px")  # fmt: skip
        return None
    if None in um:
        without = [name for name, value in zip(names, um, strict=True) if value is None]
        raise DataError(
            f"the resolution of {len(without)} of {len(names)} images is unknown: {_some(without)}",
            "the others have one",
            "fill the column um_per_px",
        )
    first = float(um[0] or 0)
    close = [first if value is not None and abs(value / first - 1) <= SAME else value for value in um]
    _only(names, close, "resolutions in um a pixel", lambda value: f"{value:.4g}", one_resolution)
    return first


def _only(names: Sequence[str], forms: Sequence[Any], what: str, words: Callable[[Any], str], do: str) -> None:
    """Raise DataError if `forms`, one of each file, are not all the same."""
    counts = Counter(forms).most_common()
    if len(counts) == 1:
        return
    other = next(name for name, form in zip(names, forms, strict=True) if form != counts[0][0])
    shown = ", ".join(f"{n} images of {words(form)}" for form, n in counts[:MOST])
    raise DataError(f"the images have {len(counts)} {what}: {shown}", f"one of the fewer is {other}", do)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{', '.join(names[:MOST])}{more}"
