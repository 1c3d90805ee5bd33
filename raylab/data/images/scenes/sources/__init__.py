"""The sources of scenes, by name. A new one is a file here and a line."""

from collections.abc import Callable

from raylab.data.images.scenes.scene import SceneRequest, SceneSource
from raylab.data.images.scenes.sources import statlog, synthetic

SOURCES: dict[str, Callable[[SceneRequest], SceneSource]] = {"statlog": statlog.read, "synthetic": synthetic.read}
