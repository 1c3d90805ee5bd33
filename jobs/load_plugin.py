"""raylab.load_plugin: one's own models, sources and tasks in Python."""

from pathlib import Path

from jobs.common.environment import verb_environment
from raylab.tasks.plugins import load_file


@verb_environment()
def load_plugin(path: Path | str) -> None:
    """Execute the plugin in a Python file; its models, sources and tasks are then known by name (docs/extend.md).

    Loaded again after a change, it replaces what it was. Runs keep a copy of the code that they use. Raises UsageError
    if the file cannot be read or executed, or if one of its names is taken.
    """
    load_file(Path(path))
