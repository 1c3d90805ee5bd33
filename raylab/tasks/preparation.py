"""How a task's data is prepared: its options as checked fields, and the function that takes them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylab.data.prepared import Meta
from raylab.documents import describe_problems
from raylab.errors import UsageError, unknown

Progress = Callable[[int, int], None]
RunChunks = Callable[..., None]
"""raylab.distributed.map.run_chunks"""


class PrepareOptions(BaseModel):
    """Options of every `prepare`; descriptions are the help of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    source: str | None = None
    """where the data comes from"""
    path: Path | None = None
    """directory of the raw data"""
    seed: int = 0
    """of the splits and of synthetic data"""
    patients: int = Field(400, ge=1)
    """synthetic: how many"""


@dataclass(frozen=True)
class Resources:
    """What a preparation may use. `cluster` opens the nodes to decode on; None inside where there is no cluster."""

    progress: Progress | None
    cluster: Callable[[], AbstractContextManager[RunChunks | None]]


O = TypeVar("O", bound=PrepareOptions)  # noqa: E741
M = TypeVar("M", bound=Meta)


@dataclass(frozen=True)
class Preparation(Generic[O, M]):
    """`title` stands over the options in the help. `run` takes (task, out, options, replace, resources) and publishes
    at `out`; `describe` is what is said of the result, in lines."""

    title: str
    options: type[O]
    run: Callable[[str, Path, O, bool, Resources], M]
    describe: Callable[[M], list[str]]

    def parse(self, task: str, given: Mapping[str, Any]) -> O:
        """The options as given; UsageError for one that the task does not have, and for a wrong value."""
        for name in sorted(given.keys() - self.options.model_fields.keys()):
            raise unknown(f"option of prepare {task}", name, self.options.model_fields)
        try:
            return self.options.model_validate(dict(given))
        except ValidationError as error:
            raise UsageError(f"prepare {task}: {describe_problems(error)}", do="correct the option") from error


def attrition_lines(rows: list[dict[str, int | str]], indent: str = "  ") -> list[str]:
    """A table of what is left after each exclusion."""
    width = max(len(str(row["step"])) for row in rows)
    lines = []
    for row in rows:
        counts = "  ".join(f"{n:>7,} {what}" for what, n in row.items() if what != "step")
        lines.append(f"{indent}{row['step']:<{width}}  {counts}")
    return lines
