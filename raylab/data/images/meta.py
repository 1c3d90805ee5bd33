"""meta.json of directories prepared from chest X-rays."""

from pydantic import BaseModel, ConfigDict, Field

from raylab.data.identifiers import UNKNOWN
from raylab.data.prepared import Meta

Counts = dict[str, dict[str, int]]
NAMED = 3
"""the most sources that the name of data lists"""

MASKS = {
    "centre": "the lung field is blacked out: this is a control, not a classifier",
    "border": "all but the lung field is blacked out",
}
"""What a network does not see, by data.mask."""


class Duplicates(BaseModel):
    """Pairs of copies among the images."""

    model_config = ConfigDict(frozen=True)

    pairs: int
    of_different_patients: int
    of_different_classes: int
    most_alike: list[float]


class Published(BaseModel):
    """How the lists differ from a published data set."""

    model_config = ConfigDict(frozen=True)

    table: str
    differs: list[str]


class ImageMeta(Meta):
    """`counts` are of images by split and class."""

    kind: str
    classes: list[str]
    size: int
    """pixels a side"""
    crop: str
    """how the view was cut out, in words"""
    patients: dict[str, int] = Field({})
    sources: dict[str, Counts]
    """split -> source -> class -> images"""
    statistics: dict[str, float] | None
    """mean, std of the pixels of train / 255; none without train"""
    lists: dict[str, dict[str, str]] = Field({})
    manifest: str | None = None
    """its SHA-256"""
    listed: Counts = Field({})
    """split -> class -> lines of the lists"""
    published: Published | None = None
    val_carved_from_train: bool = False
    skipped: list[dict[str, str]] = Field([])
    contrast: dict[str, int] = Field({})
    duplicates: Duplicates | None = None

    @property
    def origin(self) -> str:
        """Of a manifest without lists, the sources that its rows name; none, or many, are `own images`."""
        if self.manifest is None or self.lists:
            return self.source
        names = sorted({name for of_split in self.sources.values() for name in of_split} - {UNKNOWN})
        return " + ".join(names) if 0 < len(names) <= NAMED else "own images"
