"""The sources of scenes, by name. A new one is a file here and a line."""

from collections.abc import Callable

from raylab.data.images.scenes.scene import SceneRequest, SceneSource
from raylab.data.images.scenes.sources import bigearthnet, eurosat, statlog, synthetic

SOURCES: dict[str, Callable[[SceneRequest], SceneSource]] = {
    "statlog": statlog.read,
    "eurosat": eurosat.read,
    "bigearthnet": bigearthnet.read,
    "synthetic": synthetic.read,
}
