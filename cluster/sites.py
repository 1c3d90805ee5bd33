"""Sites: what raylab must know about a Slurm to start Ray clusters on it. Data in sites.toml and in the user's file."""

import os
import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from raylab.errors import UsageError, redact, unknown
from raylab.scratch import RAY_BYTES, SOCKET_BYTES

SHIPPED = Path(__file__).with_name("sites.toml")
BLANK = "<fill in:"

Text = Annotated[str, Field(min_length=1)]
Line = Annotated[str, Field(pattern=r"^[^\n\r]*$")]  # of a script
# A number with a unit, as people write it for a key that has its unit in its name
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)")
SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "days": 86400}
MEGABYTES = {"k": 1 / 1024, "m": 1, "g": 1024, "t": 1024**2}
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _not_head(kind: str) -> str:
    if kind == "head":
        raise ValueError("'head' is reserved for the head")
    return kind


def _is_time(text: str) -> str:
    try:
        seconds(text)
    except UsageError as error:
        raise ValueError(f"not a time limit; {error.do}") from None
    return text


# Part of a job's comment, whose parts are separated by colons; 'head' is Ray's type of the head
Kind = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$"), AfterValidator(_not_head)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NodeType(Part):
    """One type of node: what a job requests from Slurm, and which resources Ray is told."""

    cpus: int = Field(ge=1)
    memory_mb: int = Field(ge=1000)
    gpus: int = Field(0, ge=0)
    gpu_type: str | None = None  # as in --gres=gpu:TYPE:N
    pretended_gpus: bool = False  # of a test cluster: Slurm counts GPUs that no node has
    features: str | None = None  # as in --constraint
    partition: str | None = None  # else the site's
    max: int | None = Field(None, ge=1)  # maximum number of nodes of this type
    sbatch: tuple[Line, ...] = ()  # further options, e.g. "--exclusive"


class Billing(Part):
    """How the site charges jobs, where Slurm itself does not say so."""

    unit: Text = "core-hours"  # of `rate` and `budget`
    rate: dict[str, Annotated[Decimal, Field(ge=0, decimal_places=3)]] = {}  # by partition: of a whole node, per hour
    budget: Annotated[Decimal, Field(ge=0)] | None = None  # for all jobs of a RAYLAB_HOME together


class Site(Part):
    """A section of sites.toml."""

    name: str
    about: str = ""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Annotated[str, AfterValidator(_is_time)] = "02:00:00"  # of each job, as in --time
    lead_seconds: int = Field(120, ge=10)  # how long before its time limit a job is drained
    idle_seconds: int = Field(300, ge=5)  # after this time a node without work is released
    setup: tuple[str, ...] = ()  # shell lines before anything else: module load ..., source ...
    python: Text | None = None  # on the nodes; else the one that runs `raylab`
    image: Text | None = None  # an Apptainer image (SIF or squashfs) in which everything runs
    bind: tuple[str, ...] = ()  # further paths to mount into the image
    environment: dict[Variable, str] = {}  # for example a proxy
    scratch: Text = "/tmp"  # node-local and short: Ray's sockets are below it
    shared: Text | None = None  # storage that all nodes share; RAYLAB_HOME must be below it
    whole_nodes: bool = False  # a job is billed whole nodes: the head shares the node of the first worker
    interface: Text | None = None  # network interface between nodes, e.g. ib0
    # of the names that nodes have in the fast network, instead of `interface`
    hostname_suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")] | None = None
    ssh: bool = False  # compute nodes can be reached by ssh from the login node
    sbatch: tuple[Line, ...] = ()  # further options of every job
    billing: Billing = Billing()
    head: NodeType = NodeType(cpus=2, memory_mb=6000)  # Ray, the drivers of all jobs, MLflow
    nodes: dict[Kind, NodeType] = Field(min_length=1)

    @field_validator("hostname_suffix")
    @classmethod
    def _is_the_only_network(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("interface") is not None:
            raise ValueError("`interface` and `hostname_suffix` both name the network between nodes: remove one")
        return value


def own_file() -> Path:
    """The user's own sites: RAYLAB_SITES, else sites.toml in the configuration directory."""
    if chosen := os.environ.get("RAYLAB_SITES"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "raylab" / "sites.toml"


def site(name: str) -> Site:
    """The site `name`; the user's values override the shipped ones.

    Raises UsageError for an unknown site, an invalid key or value, or a blank that must be filled in.
    """
    merged, where = _section(name)
    if empty := blanks(name):
        raise UsageError(
            f"site '{name}' has blanks: " + "; ".join(f"{key}: {text}" for key, text in empty.items()),
            "these values are not publicly known, and raylab does not guess them",
            f"write them into [{name}] of {own_file()}",
        )
    try:
        found = Site.model_validate({"name": name, **merged})
    except ValidationError as error:
        raise _explain(error, name, where) from error
    secret = [f"environment.{key}" for key, value in found.environment.items() if _is_secret(key, value)]
    secret += [f"setup line {number}" for number, line in enumerate(found.setup, 1) if redact(line) != line]
    if secret:
        raise UsageError(
            f"site '{name}' holds credentials: {', '.join(secret)}",
            "job scripts and command lines of steps would contain these values, and others can read them",
            f"write the `export` lines into a file of mode 0600 and read it in `setup` of {where}: setup = ['. FILE']",
        )
    return found


def _is_secret(name: str, value: str) -> bool:
    return redact(value) != value or re.search(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY)$", name, re.IGNORECASE) is not None


def node_types(site: Site) -> dict[str, NodeType]:
    """The site's head, whose name no type can have, and its node types."""
    return {"head": site.head, **site.nodes}


def blanks(name: str) -> dict[str, str]:
    """Keys of the site that must be filled in, with a description. Raises UsageError for an unknown site or key."""
    section, where = _section(name)
    if "name" in section:
        raise unknown(f"key of [{name}] in {where}:", "name", Site.model_fields.keys() - {"name"})
    try:
        Site.model_validate({"name": name, **section})
    except ValidationError as error:
        if wrong := next((one for one in error.errors() if one["type"] == "extra_forbidden"), None):
            raise _unknown_key([str(part) for part in wrong["loc"]], name, where) from error
    return {key: text.removeprefix(BLANK).partition(">")[0].strip() for key, text in _blanks(section)}


def _section(name: str) -> tuple[dict[str, Any], Path]:
    """The section `name`, with the user's values over the shipped ones, and the file to correct."""
    shipped, own = read_file(SHIPPED), read_file(own_file())
    if name not in shipped | own:
        raise unknown("site", name, shipped | own)
    where = own_file() if name in own else SHIPPED
    if not isinstance(own.get(name, {}), dict):
        raise UsageError(f"'{name}' in {where} is not a section", do=f"write [{name}] and its keys below it")
    return _merge(shipped.get(name, {}), own.get(name, {})), where


def seconds(time: str) -> int:
    """Slurm's --time as seconds: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS. UsageError otherwise."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())
    if not match:
        raise UsageError(f"'{time}' is not a time limit", do="write for example 02:00:00 or 1-12:00:00")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, secs = (*numbers, 0, 0)[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + secs
    if len(numbers) == 3:
        return numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def check(site: Site, home: Path, time: str) -> None:
    """Raise UsageError for what would fail on the nodes, before anything is submitted."""
    if seconds(time) < 2 * site.lead_seconds:
        raise UsageError(
            f"a time limit of {time} is too short for site '{site.name}'",
            f"a node is drained {site.lead_seconds} s before its limit (lead_seconds); half its time is for work",
            f"--time of at least {2 * site.lead_seconds} s, or a smaller lead_seconds",
        )  # fmt: skip
    if len(site.scratch.encode()) + RAY_BYTES > SOCKET_BYTES:
        raise UsageError(
            f"scratch of site '{site.name}' is too long: {site.scratch}",
            f"Ray's sockets are below it, and their paths have at most {SOCKET_BYTES} bytes",
            f"choose a path of {SOCKET_BYTES - RAY_BYTES} bytes or fewer, e.g. /tmp",
        )
    if site.image is not None and not Path(site.image).is_file():
        raise UsageError(
            f"the image of site '{site.name}' does not exist: {site.image}",
            "it must be a file (SIF or squashfs) on storage that all nodes share",
            "make image, or apptainer build raylab.sif cluster/container/raylab.def, and correct `image` of the site",
        )
    if any(character in str(home) for character in "\\\n\r"):
        raise UsageError(
            f"{str(home)!r} has a backslash or a line break in its name",
            "Slurm cannot write a job's log below it",
            "export RAYLAB_HOME=DIRECTORY with another name",
        )
    if site.shared is not None and not home.resolve().is_relative_to(Path(site.shared).resolve()):
        raise UsageError(
            f"{home} is not on the shared storage of site '{site.name}', {site.shared}",
            "the nodes of a cluster could not read its runs",
            f"export RAYLAB_HOME={site.shared}/raylab",
        )


def read_file(path: Path) -> dict[str, Any]:
    """The sections of a sites file; none if it does not exist. Raises UsageError if it is not TOML."""
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML", str(error), "correct that line") from error


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _blanks(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += _blanks(value, f"{prefix}{key}.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and BLANK in text:
                found.append((prefix + key, text[text.index(BLANK) :]))
    return found


def _unknown_key(path: list[str], name: str, where: Path) -> UsageError:
    part: type[Part] = Site if len(path) == 1 else Billing if path[0] == "billing" else NodeType
    return unknown(f"key of [{name}] in {where}:", ".".join(path), part.model_fields.keys() - {"name"})


def _explain(error: ValidationError, name: str, where: Path) -> UsageError:
    lines = []
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"]]
        lines.append(f"{'.'.join(path)}: {problem['msg']}, got {problem.get('input')!r}{_correct(path[-1], problem)}")
    return UsageError(f"[{name}] in {where} is not valid: " + "; ".join(lines), do="docs/sites.md lists the keys")


def _correct(key: str, problem: Mapping[str, Any]) -> str:
    """The right value, if this one has the unit that the key's name has already, or another one; else nothing."""
    value = problem.get("input")
    match = QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "")
    if key.endswith("_mb"):
        if isinstance(value, int) and problem["type"] == "greater_than_equal":
            return f" (in MB; {value} GB are {value * 1024})"
        if megabytes := MEGABYTES.get(unit.removesuffix("b").removesuffix("i")):
            return f" (in MB: {key} = {number * megabytes:.0f})"
    elif span := number * SECONDS.get(unit, 0):
        if key.endswith("_seconds"):
            return f" (in seconds: {key} = {span:.0f})"
        if key == "time":
            return f' ({key} = "{int(span // 3600):02d}:{int(span % 3600 // 60):02d}:{int(span % 60):02d}")'
    return ""
