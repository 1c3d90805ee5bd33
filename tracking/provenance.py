"""What a figure or a report says of its runs: identity, recipe and hashes, so that `raylab rerun` can repeat them.

In a PNG file it is the text chunk `raylab`, in an HTML page `<meta name="raylab">`, in a research object the file
`provenance.json`: a JSON list with one entry per run.
"""

import json
import logging
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter, ValidationError

from raylab.documents import Document, describe_problems
from raylab.errors import DataError

log = logging.getLogger(__name__)

KEY = "raylab"
AGAIN = "give the original file, or the name of the run"
CRATE_MEMBER = "provenance.json"
MOST_BYTES = 1 << 26  # of the JSON list in an archive


class Provenance(Document):
    """How a run came about. Hashes are SHA-256 in hexadecimal; empty: the run has not recorded it."""

    name: str
    run_id: str | None = None
    """id of the MLflow run"""
    key: str = ""
    """the run's tag raylab.idempotency_key, which it has from its start"""
    kind: str = ""
    task: str = ""
    synthetic: bool | None = None
    recipe: dict[str, Any] | None = None
    """the resolved recipe"""
    recipe_hash: str = ""
    """of recipe.json, as the run began"""
    data_source: str = ""
    data_hash: str = ""
    split_hash: str = ""
    datalad_id: str = ""
    """of the DataLad dataset with the data; empty if it is in none"""
    datalad_commit: str = ""
    """its commit, with "-dirty" if the data differed from it"""
    code_revision: str = ""
    lock_hash: str = ""
    image_digest: str = ""
    """of the container image; empty without one"""
    torch_version: str = ""
    cpus: tuple[str, ...] = ()
    """kinds of the CPUs that trained it"""
    weights_sha256: str = ""
    ledger_sha256: str = ""
    """head of the hash chain of its ledger"""
    parent: "Provenance | None" = None
    """of the run whose weights this one starts from, or whose model it scores"""

    @classmethod
    def of_tags(cls, name: str, run_id: str | None, tags: dict[str, str], **more: Any) -> "Provenance":
        """What the tags raylab.* of a run say; `more`: other fields."""
        names = ("kind", "task", "recipe_hash", "data_source", "data_hash", "split_hash", "datalad_id",
                 "datalad_commit", "code_revision", "lock_hash", "image_digest", "torch_version", "weights_sha256",
                 "ledger_sha256")  # fmt: skip
        facts: dict[str, Any] = {field: tags[f"raylab.{field}"] for field in names if f"raylab.{field}" in tags}
        synthetic = {"true": True, "false": False}.get(tags.get("raylab.synthetic", ""))
        cpus = tuple(tags["raylab.cpus"].split("; ")) if tags.get("raylab.cpus") else ()
        key = tags.get("raylab.idempotency_key", "")
        return cls(
            **{"name": name, "run_id": run_id, "key": key, "synthetic": synthetic, "cpus": cpus, **facts, **more}
        )


def render(of: Sequence[Provenance]) -> str:
    """The content of the chunk or element, in ASCII."""
    return json.dumps([one.to_json() for one in of])


def save_png(figure: Figure, file: Any, of: Sequence[Provenance], **options: Any) -> None:
    """Write a figure as PNG to a path or an open file, with the provenance of its runs; `options` of `savefig`."""
    figure.savefig(file, format="png", metadata={KEY: render(of)}, **options)


def keep_short(picture: Image.Image) -> PngInfo:
    """The text chunk for a smaller copy of a figure: its provenance without recipes, if it has any that is valid."""
    info, text = PngInfo(), picture.info.get(KEY)
    try:
        runs = TypeAdapter(tuple[Provenance, ...]).validate_json(text or "[]")
    except ValidationError:
        log.warning("left out of a copy: the provenance of a figure is damaged")
        return info
    if runs:
        info.add_text(KEY, render([run.model_copy(update={"recipe": None}) for run in runs]))
    return info


def read_provenance(path: Path) -> tuple[Provenance, ...]:
    """The provenance of the runs that a PNG file or an HTML page shows, or that a research object has.

    Raises DataError if the file is of another kind, has none (an earlier version wrote it, or a program has stripped
    it) or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\3\4":
            text = _read_crate(path)
        else:
            text = _read_png(path) if start == b"\x89PNG" else _read_html(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} could not be read", error.strerror or str(error), AGAIN) from error
    if text is None:
        raise DataError(
            f"{path} does not say from which runs it comes",
            "it is no PNG figure, HTML report or research object of raylab, or another program has written it again",
            AGAIN,
        )
    try:
        return TypeAdapter(tuple[Provenance, ...]).validate_json(text)
    except ValidationError as error:
        raise DataError(f"the provenance in {path} is damaged", describe_problems(error), AGAIN) from error


def _read_crate(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if CRATE_MEMBER not in archive.namelist():
                return None
            if archive.getinfo(CRATE_MEMBER).file_size > MOST_BYTES:
                raise DataError(f"{path}: {CRATE_MEMBER} is larger than {MOST_BYTES >> 20} MiB", do="copy it again")
            return archive.read(CRATE_MEMBER).decode(errors="replace")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} could not be read as a zip archive", str(error), "copy it again") from error


def _read_png(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            found = image.info.get(KEY)
    # ValueError: a text chunk beyond Pillow's limit
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} could not be read as PNG", str(error), AGAIN) from error
    return found if isinstance(found, str) else None


class _Meta(HTMLParser):
    """Finds the meta element."""

    def __init__(self) -> None:
        super().__init__()
        self.content: str | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        of = dict(attributes)
        if tag == "meta" and of.get("name") == KEY and self.content is None:
            self.content = of.get("content")


def _read_html(content: bytes) -> str | None:
    parser = _Meta()
    with suppress(AssertionError):  # of a declaration that no browser accepts; the element comes first in our pages
        parser.feed(content.decode(errors="replace"))
    return parser.content
