"""The files of a search's trials; without Ray."""

from pathlib import Path
from typing import Any

from raylab.config.old_names import rename_fields
from raylab.documents import read_json
from raylab.errors import DataError
from raylab.files import write_json
from raylab.training import run_result

PARAMS = "params.json"


class Trials:
    """The trials of a search, read from its directory. `planned`: the total number of trials.

    A trial whose params.json cannot be read is left out, and another is drawn in its place; one whose end.json cannot
    be read runs again, from its newest checkpoint. `damaged` says so.
    """

    def __init__(self, directory: Path, planned: int) -> None:
        self.directory, self.planned = directory, planned
        directory.mkdir(parents=True, exist_ok=True)
        self.params: dict[int, dict[str, Any]] = {}
        self.ended: dict[int, dict[str, Any]] = {}
        self.damaged: list[str] = []
        for number in sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()):
            self._read(number)
        self.begun = [n for n in self.params if n not in self.ended]

    def _read(self, number: int) -> None:
        path = self.path(number)
        try:
            if (path / PARAMS).is_file():
                self.params[number] = rename_fields(read_json(path / PARAMS, dict[str, Any], "the trial is left out"))
                if (path / run_result.END).is_file():
                    end = run_result.read_end(path)
                    self.ended[number] = {**end, "params": rename_fields(end.get("params", {}))}
        except DataError as error:
            self.damaged.append(str(error))

    def path(self, number: int) -> Path:
        return self.directory / f"{number:03d}"

    @property
    def next_number(self) -> int:
        """The number of the trial that `new` would add."""
        # a killed search may have left an empty directory: a trial exists once it has params.json
        number = max(self.params, default=-1) + 1
        while (self.path(number) / PARAMS).exists():  # that of a trial that is left out
            number += 1
        return number

    def new(self, params: dict[str, Any]) -> int:
        number = self.next_number
        self.params[number] = params
        self.path(number).mkdir(exist_ok=True)
        write_json(self.path(number) / PARAMS, params)
        return number

    def end(self, number: int, facts: dict[str, Any]) -> None:
        self.ended[number] = facts
        write_json(self.path(number) / run_result.END, facts)
