"""The provenance of a run from its directory, for its figures and for whoever repeats it."""

from pathlib import Path

from jobs.common import home
from raylab.documents import read_json
from raylab.training.model_note import PLACE, read_model_note
from raylab.training.run_record import RunRecord
from raylab.training.run_result import FILE as RESULT
from raylab.training.run_result import read_result
from tracking.provenance import Provenance

TRAINED = ("train", "transfer", "tune", "trial")


def describe(directory: Path, children: tuple[Path, ...] = ()) -> Provenance:
    """The provenance of the run in `directory`, with that of the runs whose weights it started from. A search is
    described by its best trial, whose model it has. `children`: runs that started from it."""
    record = home.note(directory)
    facts: dict[str, object] = {}
    if record.kind == "tune" and (directory / PLACE).is_file():
        facts["recipe"] = read_model_note(directory).recipe
    elif (directory / "recipe.json").is_file():
        facts["recipe"] = read_json(directory / "recipe.json", dict, "restore it: the run itself writes it")
    if record.kind in TRAINED and (directory / RESULT).is_file():
        result = read_result(directory)
        facts |= {name: result[name] for name in ("weights_sha256", "ledger_sha256") if name in result}
        facts["cpus"] = tuple(result.get("cpus", ()))
    if record.data_hash is not None:
        facts["data_hash"] = record.data_hash  # of work without training, the tag comes at its end
    if (parent := _describe_parent(record, (directory, *children))) is not None:
        facts["parent"] = parent
    return Provenance.of_tags(record.name, record.run_id, record.tags, **facts)


def _describe_parent(record: RunRecord, children: tuple[Path, ...]) -> Provenance | None:
    """The provenance of a run's parent; only its name and id if it is no longer in a home that can be read."""
    if record.parent is None:
        return None
    parent = home.find_parent(record)
    if parent is None or parent in children:  # a damaged record may name any run
        return Provenance(name=record.parent, run_id=record.tags.get("raylab.parent") or None)
    return describe(parent, children)
