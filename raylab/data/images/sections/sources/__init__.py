"""The sources of sections, by name. A new one is a file here and a line."""

from collections.abc import Callable

from raylab.data.images.sections.section import SectionRequest, SectionSource
from raylab.data.images.sections.sources import files, synthetic

SOURCES: dict[str, Callable[[SectionRequest], SectionSource]] = {"files": files.read, "synthetic": synthetic.read}
