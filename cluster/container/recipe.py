"""Renders the recipe (Dockerfile) for Apptainer: a definition file, and the files that Apptainer expects in an image.

python -m cluster.container.recipe > cluster/container/raylab.def
"""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from raylab.errors import UsageError

DOCKERFILE = Path(__file__).with_name("Dockerfile")
HEADER = """\
# raylab for Apptainer, rendered from Dockerfile by `python -m cluster.container.recipe`: do not edit. Built from the
# repository's root, and named as `image` of a site (docs/sites.md):
#   apptainer build raylab.sif cluster/container/raylab.def
"""


@dataclass
class Recipe:
    """A Dockerfile in Apptainer's terms. `files`: (path in the repository, path in the image)."""

    base: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, str]] = field(default_factory=list)
    post: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def parse(text: str) -> Recipe:
    """The recipe of a Dockerfile. Raises UsageError for an instruction that has no counterpart in Apptainer."""
    recipe, directory = Recipe(), PurePosixPath("/")
    for name, value in _instructions(text):
        match name:
            case "ARG":
                recipe.arguments |= _pairs(value)
            case "FROM":
                recipe.base = value
            case "ENV":
                recipe.environment |= _pairs(value)
                recipe.post += [f"export {shlex.quote(pair)}" for pair in shlex.split(value)]
            case "LABEL":
                recipe.labels |= _pairs(value)
            case "WORKDIR":
                directory /= value
                recipe.post += [f"mkdir -p {directory}", f"cd {directory}"]
            case "COPY" if len(paths := value.split()) == 2:
                recipe.files.append((paths[0], str(directory / paths[1])))
            case "RUN":
                command = re.sub(r"^(--mount=\S+\s+)+", "", value)
                recipe.post.append(f"( {command} ) || exit 1")  # `set -e` overlooks what fails before &&
            case "ENTRYPOINT":
                recipe.entrypoint = json.loads(value)
            case "CMD":
                recipe.command = json.loads(value)
            case "USER":  # Apptainer runs an image as its caller
                pass
            case _:
                raise UsageError(
                    f"the Dockerfile's '{name} {value}' cannot be rendered for Apptainer",
                    do="write it with other instructions, or teach cluster/container/recipe.py this one",
                )
    return recipe


def definition(recipe: Recipe) -> str:
    """Apptainer's definition file."""
    base = re.sub(r"\$\{(\w+)\}", r"{{ \1 }}", recipe.base)
    sections = {
        "arguments": [f"{name}={value}" for name, value in recipe.arguments.items()],
        "files": [f"{source} {target}" for source, target in recipe.files],
        "post": ["set -e", *recipe.post],
        "environment": _exports(recipe),
        "runscript": _run_lines(recipe),
        "labels": [f"{name} {value}" for name, value in recipe.labels.items()],
    }
    blocks = ["\n".join([f"%{name}", *(f"    {line}" for line in lines)]) for name, lines in sections.items()]
    return "\n\n".join([f"{HEADER}Bootstrap: docker\nFrom: {base}", *blocks]) + "\n"


def runtime_files(recipe: Recipe) -> dict[str, str]:
    """{path: text} of the scripts that `apptainer run` looks for in an image, for one that Apptainer did not build."""
    return {
        "/.singularity.d/env/90-environment.sh": "\n".join(["#!/bin/sh", *_exports(recipe), ""]),
        "/.singularity.d/runscript": "\n".join(["#!/bin/sh", *_run_lines(recipe), ""]),
    }


def _exports(recipe: Recipe) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in recipe.environment.items()]


def _run_lines(recipe: Recipe) -> list[str]:
    return [f"[ $# -gt 0 ] || set -- {shlex.join(recipe.command)}", f'exec {shlex.join(recipe.entrypoint)} "$@"']


def _instructions(text: str) -> list[tuple[str, str]]:
    """(name, value) of every instruction, without comments; an instruction's lines are joined."""
    lines = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", lines)
    return [(name.upper(), value.strip()) for name, _, value in (line.partition(" ") for line in joined.splitlines())]


def _pairs(value: str) -> dict[str, str]:
    """{name: value} of NAME=VALUE..."""
    return dict(pair.split("=", 1) for pair in shlex.split(value))


if __name__ == "__main__":
    print(definition(parse(DOCKERFILE.read_text())), end="")
