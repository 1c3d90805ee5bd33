"""Functions of bash that complete the runs of a home, and the fields and models of recipes."""

from collections.abc import Iterable, Iterator, Mapping
from shlex import quote
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from raylab.config.recipe import Model, Part, model_names
from raylab.models import vision
from raylab.tasks import TASKS
from raylab.tasks.recipes import parse_recipe

RUNS, FIELDS, MODELS = "_raylab_runs", "_raylab_fields", "_raylab_models"

# `completing_word` and `current_option_strings` are variables of shtab's function, which calls these. bash cuts the
# words of a command line at "=", so that `optim.lr=1` is three of them.
SCRIPT = """
_raylab_options() {
  [[ $completing_word == -* ]] && compgen -W "${current_option_strings[*]}" -- "$completing_word"
}

_raylab_runs() {
  _raylab_options && return
  local record name
  for record in "${RAYLAB_HOME:-.raylab}"/runs/*/run.json; do
    name=${record%/run.json}
    printf -v name %q "${name##*/}"
    [[ -e $record && $name == "$1"* ]] && printf '%s\\n' "$name"
  done
}

_raylab_task() {
  local word
  for word in "${COMP_WORDS[@]}"; do
    case $word in @TASKS@) printf %s "$word"; return;; esac
  done
}

_raylab_model() {
  local at
  for ((at = 2; at < COMP_CWORD; at++)); do
    [[ ${COMP_WORDS[at - 2]} == model.name && ${COMP_WORDS[at - 1]} == = ]] && printf %s "${COMP_WORDS[at]}" && return
  done
}

_raylab_model_names() {
  case $1 in
@MODELS@
  esac
}

_raylab_field_names() {
  case $1 in
@FIELDS@
  esac
}

_raylab_values() {
  case $1 in
@VALUES@
  esac
}

_raylab_models() {
  _raylab_options || compgen -W "$(_raylab_model_names "$(_raylab_task)")" -- "$1"
}

_raylab_fields() {
  _raylab_options && return
  local word=$1 before=${COMP_WORDS[COMP_CWORD - 1]} field=
  if [[ $word == = ]]; then
    field=$before word=
  elif [[ $before == = ]]; then
    field=${COMP_WORDS[COMP_CWORD - 2]}
  fi
  if [[ $field == model.name ]]; then
    compgen -W "$(_raylab_model_names "$(_raylab_task)")" -- "$word"
  elif [[ $field ]]; then
    compgen -W "$(_raylab_values "$field")" -- "$word"
  else
    compgen -S = -W "$(_raylab_field_names "$(_raylab_task):$(_raylab_model)")" -- "$word"
  fi
}
"""

# Behind shtab's own last line: no space follows `optim.lr=`
LAST = """
_raylab() {
  _shtab_raylab
  [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -F _raylab raylab
"""


def render_functions() -> str:
    """The functions RUNS, FIELDS and MODELS, with the names of today's tasks, fields and models."""
    models = {
        task: [name for family in of.full.families() for name in list_models(family)] for task, of in TASKS.items()
    }
    fields: dict[str, dict[str, None]] = {}
    values: dict[str, str] = {}
    for task, of in TASKS.items():
        for family in of.full.families():
            recipe = parse_recipe({"task": task, "model": {"name": list_models(family)[0]}})
            own = {path: kinds for path, kinds in walk_fields(recipe) if path != "task"}
            values |= {path: " ".join(kinds) for path, kinds in own.items() if kinds}
            for name in ("", *list_models(family)):
                fields[f"{task}:{name}"] = fields.get(f"{task}:{name}", {}) | dict.fromkeys(own)
    del values["model.name"]
    everything = dict.fromkeys(path for own in fields.values() for path in own)
    by_names: dict[str, list[str]] = {}
    for key, paths in fields.items():
        by_names.setdefault(" ".join(paths), []).append(key)
    cases = {
        "TASKS": "|".join(TASKS),
        "MODELS": render_cases({task: " ".join(names) for task, names in models.items()} | {"*": join(models)}),
        "FIELDS": render_cases(
            {"|".join(keys): names for names, keys in by_names.items()} | {"*": " ".join(everything)}
        ),
        "VALUES": render_cases(values),
    }
    script = SCRIPT
    for name, text in cases.items():
        script = script.replace(f"@{name}@", text)
    return script


def list_models(family: type[Model]) -> list[str]:
    return list(model_names(family)) or vision.names()


def walk_fields(part: Part, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """(dotted path, values that its type lists) of every field of a recipe."""
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, Part):
            yield from walk_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list_values(field.annotation)


def list_values(kind: Any) -> list[str]:
    """The values of a type, as --set takes them; none of a type that does not list them."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) in (Union, UnionType):
        return [value for one in get_args(kind) for value in list_values(one)]
    return ["none"] if kind is type(None) else []


def join(models: Mapping[str, Iterable[str]]) -> str:
    return " ".join(dict.fromkeys(name for names in models.values() for name in names))


def render_cases(answers: Mapping[str, str]) -> str:
    return "\n".join(f"    {pattern}) printf %s {quote(answer)};;" for pattern, answer in answers.items())
