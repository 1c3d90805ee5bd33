"""A research object: finished runs as an RO-Crate 1.2, from which others see what was done and can repeat it.

A zip archive of `ro-crate-metadata.json`, the description in schema.org's terms; `provenance.json`, from which `raylab
rerun` repeats a run; and for each run, in `runs/NAME/`, its recipe, scores with intervals, ledger and model; figures
and a report where they are asked for. It holds no row of a patient: data is named by its hashes.
"""

import hashlib
import json
import re
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jobs.common import home, provenance
from jobs.common.model_inputs import KINDS
from jobs.common.outputs import is_report
from jobs.common.results import ScoresFile
from raylab import __version__
from raylab.data.prepared import sha256
from raylab.documents import read_document
from raylab.errors import DataError, UsageError
from raylab.evaluation.site_report import LIMIT, find_few, tell_count
from raylab.files import atomic_write
from raylab.score import Score
from raylab.tasks import find_task
from raylab.tasks.plugin_code import Code
from raylab.tasks.plugins import FOLDER, load_stored, load_trusted
from raylab.training import ledger
from raylab.training.model_note import PLACE
from tracking.provenance import CRATE_MEMBER, Provenance, render

# How RO-Crate names its version in a document; nothing is fetched from these addresses
CONTEXT, PROFILE = "https://w3id.org/ro/crate/1.2/context", "https://w3id.org/ro/crate/1.2"
METADATA, REPORT = "ro-crate-metadata.json", "report.html"
WEIGHTS = "model/model.safetensors"
EXPORTED = ("train", "transfer", "tune", "federate")  # kinds of runs that have a model
FORMATS = {
    ".json": "application/json",
    ".py": "text/x-python",
    ".jsonl": "application/x-ndjson",
    ".png": "image/png",
    ".html": "text/html",
    ".safetensors": "application/octet-stream",
}
FILES = {
    CRATE_MEMBER: "Hashes and recipes of all runs, from which `raylab rerun` repeats one",
    REPORT: "Report of `raylab compare`",
    "recipe.json": "All settings of the training",
    "metrics.json": "Scores by split and data, with 95% intervals",
    ledger.FILE: "One line per step, checkpoint and change of workers, chained by SHA-256",
    "model.safetensors": "Weights of the best epoch",
    "model.json": "Recipe and inputs of the network, with the statistics that normalise them",
}
"""what files are, by name"""
NO_LICENCE = "No licence is stated: ask those who handed it to you before you use it."
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member

Content = Path | bytes
Entity = dict[str, Any]


@dataclass(frozen=True)
class RunPart:
    """What a research object has of one run: `files` below runs/NAME/, and `scores` by split and hash of the data."""

    name: str
    origin: Provenance
    files: Mapping[str, Content]
    scores: Mapping[str, Mapping[str, Score]]
    started: float | None
    """Unix time in seconds"""


def list_runs(experiment: str) -> tuple[list[Path], list[str]]:
    """The finished runs of an experiment in this home that have a model of data of patients or places, and what else it
    has and why that is left out. Raises UsageError if there is none."""
    chosen, left_out = [], []
    for directory, record in home.records():
        if record.experiment != experiment:
            continue
        load_stored(directory)
        if record.kind not in EXPORTED:
            left_out.append(f"{directory.name}: a run of '{record.kind}' has no model of its own")
        elif not (directory / PLACE).is_file():
            left_out.append(f"{directory.name}: it is not finished")
        elif find_task(record.task).kind not in KINDS:
            left_out.append(f"{directory.name}: task '{record.task}' has no data of a site")
        elif home.original_of(directory) is not None:
            left_out.append(f"{directory.name}: it is a copy of another run")
        else:
            chosen.append(directory)
    if not chosen:
        raise UsageError(
            f"experiment '{experiment}' has no finished run with a model in {home.home()}",
            "; ".join(left_out),
            "name the runs, or set MLFLOW_EXPERIMENT_NAME",
        )
    return chosen, left_out


def collect(directory: Path, with_figures: bool) -> tuple[RunPart, list[str]]:
    """What a research object has of the finished run in `directory`, and what is left out of it and why.

    Scores rest on at least LIMIT patients and rows of each class. Figures of real data are left out unless
    `with_figures`, because the steps of a curve are single rows.
    """
    origin = provenance.describe(directory)
    name = directory.name
    files: dict[str, Content] = {"recipe.json": _encode(origin.recipe)}
    files |= {f"{FOLDER}/{path.name}": path for path in sorted((directory / FOLDER).glob("*.py"))}
    places = (ledger.FILE, WEIGHTS, PLACE.as_posix())
    files |= {place: directory / place for place in places if (directory / place).is_file()}
    told: dict[str, Any] = {}
    scores: dict[str, dict[str, Score]] = {}
    left_out = []
    for file in sorted((directory / "scores").glob("*.json")):
        kept = read_document(file, ScoresFile, f"raylab evaluate {origin.task} --run {name} ... writes it again")
        found, few = tell_scores(kept)
        if few:
            left_out.append(f"{name}, scores on {kept.split}: {'; '.join(few)}; the least is {LIMIT}")
            continue
        scores[file.stem] = found
        told[file.stem] = {
            "split": kept.split,
            "data_hash": kept.data,
            "rows": tell_count(kept.n),
            "patients": tell_count(kept.patients),
            "classes": {each: tell_count(n) for each, n in kept.classes.items()},
            "scores": {each: {"value": s.value, "low": s.low, "high": s.high} for each, s in found.items()},
        }
        if kept.data != origin.data_hash:
            continue
        figures = sorted((directory / "plots").glob(f"{kept.split}-*.png"))
        if any(0 < n < LIMIT for row in kept.confusion for n in row):
            shown = [figure for figure in figures if figure.stem != f"{kept.split}-confusion"]
            if len(shown) < len(figures):
                left_out.append(f"{name}, the confusion matrix of {kept.split}: it has counts below {LIMIT}")
            figures = shown
        if origin.synthetic or with_figures:
            files |= {f"plots/{figure.name}": figure for figure in figures}
        elif figures:
            left_out.append(f"{name}, {len(figures)} figures of {kept.split}: --figures adds them")
    files["metrics.json"] = _encode(told)
    starts = ledger.starts(ledger.read_ledger(directory / ledger.FILE))
    return RunPart(name, origin, files, scores, starts[0].time if starts else None), left_out


def tell_scores(kept: ScoresFile) -> tuple[dict[str, Score], list[str]]:
    """The scores of a file of scores/ that may leave a site, without those that compare few rows; and what of its rows
    is too few for any, in words."""
    if few := find_few(kept.n, kept.patients, kept.classes):
        return {}, few
    return {name: s for name, s in kept.scores().items() if s.n is None or min(s.n) >= LIMIT}, []


def check_report(path: Path) -> Path:
    """Return `path`; DataError if it is not a report of `raylab compare`. Pages of single stays are none."""
    if not path.is_file() or not is_report(path):
        raise DataError(f"{path} is not a report of raylab compare", do="raylab compare --out report.html")
    return path


def load_code(path: Path, name: str) -> None:
    """Load the plugins of the run `name` in a research object. UsageError for code that this user has never named;
    nothing of it is executed then."""
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            place = Path(member)
            if place.parent == Path("runs") / name / FOLDER and place.suffix == ".py":
                code = Code(place.name, archive.read(member).decode(errors="replace"))
                load_trusted(code, path, place, f"unpack {path.name} and read it")


def write(
    path: Path,
    experiment: str,
    parts: Sequence[RunPart],
    authors: Sequence[str],
    licence: str | None,
    report: Path | None,
) -> int:
    """Write the research object of `parts`; returns the number of its files. UsageError for two runs of one name."""
    if len({part.name for part in parts}) < len(parts):
        raise UsageError("two of the runs have the same name", do="leave one out")
    members: dict[str, Content] = {CRATE_MEMBER: render([part.origin for part in parts]).encode()}
    members |= {f"runs/{part.name}/{name}": content for part in parts for name, content in part.files.items()}
    members |= {} if report is None else {REPORT: report}
    document = describe(experiment, parts, [_describe_file(name, of) for name, of in members.items()], authors, licence)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        directories = {f"runs/{part.name}/": b"" for part in parts}
        for name, content in {METADATA: _encode(document), **directories, **members}.items():
            info = zipfile.ZipInfo(name, EPOCH)
            if isinstance(content, bytes):
                archive.writestr(info, content)
                continue
            info.file_size = content.stat().st_size
            with content.open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return 1 + len(members)


def describe(
    experiment: str, parts: Sequence[RunPart], files: Sequence[Entity], authors: Sequence[str], licence: str | None
) -> Entity:
    """The content of ro-crate-metadata.json. Each run is a CreateAction: by the software, from recipe, data and parent,
    to the files in its directory, whose scores are PropertyValues with the ends of the 95% interval."""
    software = {_software_key(part.origin): f"#software-{place}" for place, part in enumerate(parts, 1)}
    people = [{"@id": f"#author-{place}", "@type": "Person", "name": name} for place, name in enumerate(authors, 1)]
    is_address = licence is not None and licence.startswith(("https:", "http:"))
    terms = {
        "@id": licence if is_address else "#licence",
        "@type": "CreativeWork",
        "name": licence or "not stated",
        "description": licence or NO_LICENCE,
    }
    runs = [_describe_run(part, files, software[_software_key(part.origin)], parts) for part in parts]
    actions, directories, scores = ([entity for run in runs for entity in run[k]] for k in range(3))
    synthetic = "SYNTHETIC data: its scores say nothing about patients. " * any(part.origin.synthetic for part in parts)
    tasks = ", ".join(sorted({part.origin.task for part in parts}))
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{experiment}: {len(parts)} runs of raylab",
        "description": f"{synthetic}Recipes, scores, ledgers and models of runs of {tasks}, written by raylab "
        f"{__version__}. It holds no row of a patient; data is named by its hashes. `raylab rerun FILE --run NAME "
        "--data DIR` repeats a run and compares its weights to the bit. Not for clinical use.",
        "datePublished": time.strftime("%Y-%m-%d", time.gmtime()),
        "license": {"@id": terms["@id"]},
        "hasPart": _refer(directories) + _refer(one for one in files if not one["@id"].startswith("runs/")),
        "mentions": _refer(actions),
    }
    descriptor = {
        "@id": METADATA,
        "@type": "CreativeWork",
        "conformsTo": {"@id": PROFILE},
        "about": {"@id": "./"},
    }
    data = {_data_id(part.origin): _describe_data(part.origin) for part in parts}
    origins = {_software_key(part.origin): part.origin for part in parts}
    programs = [_describe_software(origin, software[key]) for key, origin in origins.items()]
    graph = [descriptor, root | ({"author": _refer(people)} if people else {}), *people, terms]
    return {
        "@context": CONTEXT,
        "@graph": [*graph, *programs, *data.values(), *actions, *directories, *files, *scores],
    }


def _describe_run(
    part: RunPart, files: Sequence[Entity], software: str, parts: Sequence[RunPart]
) -> tuple[list[Entity], list[Entity], list[Entity]]:
    """The action, the directory and the scores of a run."""
    place, origin = f"runs/{quote(part.name)}/", part.origin
    own = [one for one in files if one["@id"].startswith(place)]
    recipe = [one for one in own if one["@id"] == f"{place}recipe.json"]
    code = [one for one in own if one["@id"].startswith(f"{place}{FOLDER}/")]
    scores = [
        {
            "@id": f"#{quote(f'{part.name}-{where}-{name}')}",
            "@type": "PropertyValue",
            "name": f"{name}, {where.partition('-')[0]} split",
            "value": score.value,
            "description": "95% confidence interval from minValue to maxValue",
            **{end: value for end, value in (("minValue", score.low), ("maxValue", score.high)) if value is not None},
        }
        for where, found in part.scores.items()
        for name, score in found.items()
        if score.value is not None
    ]
    parent = [
        {"@id": f"runs/{quote(other.name)}/{WEIGHTS}"}
        for other in parts
        if origin.parent is not None and other.origin.weights_sha256 == origin.parent.weights_sha256 != ""
    ]
    action: Entity = {
        "@id": f"#run-{quote(part.name)}",
        "@type": "CreateAction",
        "name": part.name,
        "description": f"{origin.kind} of task {origin.task}; weights SHA-256 {origin.weights_sha256}, ledger head "
        f"{origin.ledger_sha256}, recipe {origin.recipe_hash}; CPU {'; '.join(origin.cpus) or 'not recorded'}",
        "instrument": [{"@id": software}, *_refer(code)] if code else {"@id": software},
        "object": [*_refer(recipe), {"@id": _data_id(origin)}, *parent],
        "result": _refer(one for one in own if one not in (*recipe, *code)),
    }
    if part.started:
        action["startTime"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(part.started))
    directory = {
        "@id": place,
        "@type": "Dataset",
        "name": part.name,
        "description": f"Files of the run {part.name}",
        "hasPart": _refer(own),
        "variableMeasured": _refer(scores),
    }
    return [action], [directory], scores


def _describe_data(origin: Provenance) -> Entity:
    names = [f"sha256:{origin.data_hash}"]
    if origin.datalad_id:
        names.append(f"datalad:{origin.datalad_id}@{origin.datalad_commit}")
    return {
        "@id": _data_id(origin),
        "@type": "Dataset",
        "name": f"{origin.data_source}, prepared for task {origin.task}",
        "description": f"Not part of this research object. SHA-256 over all files {origin.data_hash}, over the split "
        f"of patients {origin.split_hash}.{' SYNTHETIC.' * bool(origin.synthetic)}",
        "identifier": names if len(names) > 1 else names[0],
    }


def _describe_software(origin: Provenance, id: str) -> Entity:
    needs = [f"torch {origin.torch_version}", f"lock file, SHA-256 {origin.lock_hash}"]
    needs += [f"container image, {origin.image_digest}"] if origin.image_digest else []
    revision = origin.code_revision
    is_commit = re.fullmatch("[0-9a-f]{40}", revision) is not None
    return {
        "@id": id,
        "@type": "SoftwareApplication",
        "name": "raylab",
        "version": revision,
        # RO-Crate demands one: a Software Heritage identifier where the code is a commit, else a name
        "url": f"swh:1:rev:{revision}" if is_commit else f"urn:raylab:{quote(revision or 'unknown')}",
        "softwareRequirements": needs,
    }


def _describe_file(name: str, content: Content) -> Entity:
    if isinstance(content, bytes):
        size, digest = len(content), hashlib.sha256(content).hexdigest()
    else:
        size, digest = content.stat().st_size, sha256(content)
    entity: Entity = {
        "@id": quote(name),
        "@type": "File",
        "name": name.removeprefix("runs/"),
        "description": FILES.get(Path(name).name, "Figure of the scores on a split"),
        "encodingFormat": FORMATS[Path(name).suffix],
        "contentSize": str(size),
        "sha256": digest,
    }
    if Path(name).suffix == ".py":
        entity |= {
            "@type": ["File", "SoftwareSourceCode"],
            "description": "Code of the run's own model or task: a plugin of raylab, which executes it only if told to",
            "programmingLanguage": "Python",
        }
    return entity


def _software_key(origin: Provenance) -> tuple[str, ...]:
    return origin.code_revision, origin.lock_hash, origin.image_digest, origin.torch_version


def _data_id(origin: Provenance) -> str:
    return f"#data-{origin.data_hash[:16]}-{origin.split_hash[:8]}"


def _refer(entities: Any) -> list[Entity]:
    return [{"@id": one["@id"]} for one in entities]


def _encode(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
