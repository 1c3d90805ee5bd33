"""model/model.json of a run: the recipe and the inputs of its network, checked when read."""

from pathlib import Path
from typing import Any

from raylab.documents import Document, read_document

PLACE = Path("model") / "model.json"


class ModelNote(Document):
    recipe: dict[str, Any]
    """as `update_recipe` takes it: an earlier version may have written it"""
    spec: dict[str, Any]


def read_model_note(directory: Path) -> ModelNote:
    """Return model.json of the run in `directory`; DataError if it is damaged."""
    do = f"restore it; or remove the run's result.json, then: raylab resume {directory.name}"
    return read_document(directory / PLACE, ModelNote, do)
