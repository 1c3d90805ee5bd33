"""JSON documents of a known type: checked when they are read, with an error that names the file and the field."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from raylab.errors import DataError


class Document(BaseModel):
    """Frozen. Fields that this version does not know, of a file that another one wrote, are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True, ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, Any]:
        """The document as it is written: the fields that were given, in the order of their declaration."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


D = TypeVar("D", bound=Document)


def to_plain(value: Any) -> Any:
    """`value` with what has a `to_json`, however deep in dictionaries and lists, as it is written."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, dict):
        return {name: to_plain(one) for name, one in value.items()}
    return [to_plain(one) for one in value] if isinstance(value, list | tuple) else value


def read_document(path: Path, kind: type[D], do: str = "") -> D:
    """The document of type `kind` in the JSON file `path`.

    Raises DataError, with `do` as the next step, when the file is missing or no JSON, or when a field is missing or
    has a wrong value.
    """
    try:
        return parse_document(json.loads(path.read_text()), kind, path, do)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} could not be read as JSON", str(error), do) from error


def parse_document(content: Any, kind: type[D], path: Path, do: str = "") -> D:
    """The document of type `kind` in parsed JSON that came from `path`; errors as of `read_document`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is damaged, or not a file of raylab", describe_problems(error), do) from error


def describe_problems(error: ValidationError) -> str:
    """`field: what is wrong; other.field: ...` of every field that does not fit."""
    problems = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'content'}: {one['msg']}" for one in problems)
