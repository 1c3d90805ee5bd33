"""Typed JSON documents, validated when read; an error names the file and the field."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from raylab.errors import DataError
from raylab.files import parse_json


class Document(BaseModel):
    """A frozen JSON document. Fields that this version does not define, written by another version, are preserved."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True, ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, Any]:
        """Return the document as it is written to disk: the fields that were set, in declaration order."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


D = TypeVar("D", bound=Document)


def to_plain(value: Any) -> Any:
    """Return `value` with every object that has a `to_json` replaced by its result, at any depth."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_document(path: Path, kind: type[D], do: str = "") -> D:
    """Read the JSON file `path` as a document of type `kind`.

    Raises DataError, with `do` as the next step, if the file is missing or not JSON, or if a field is missing or
    invalid.
    """
    return parse_document(_read(path, do), kind, path, do)


def read_json(path: Path, kind: Any, do: str = "") -> Any:
    """Return the content of the JSON file `path` as it was written, if it is of type `kind`: a Document,
    `dict[str, int]`, ... Raises like `read_document`."""
    content = _read(path, do)
    try:
        TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise _damaged(path, error, do) from error
    return content


def _read(path: Path, do: str) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} could not be read as JSON", str(error), do) from error


def parse_document(content: Any, kind: type[D], path: Path, do: str = "") -> D:
    """Validate JSON `content`, read from `path`, as a document of type `kind`; raises like `read_document`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _damaged(path, error, do) from error


def _damaged(path: Path, error: ValidationError, do: str) -> DataError:
    return DataError(f"{path} is damaged, or not a raylab file", describe_problems(error), do)


def describe_problems(error: ValidationError) -> str:
    """Return `field: what is wrong; other.field: ...` for all invalid fields."""
    problems = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'content'}: {p['msg']}" for p in problems)
