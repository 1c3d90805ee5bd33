"""Pretrained weights: from a file or torchvision's hub, checked layer by layer, never unpickled.

For a registered MLflow model (`models:/NAME/VERSION`), `jobs` downloads it and puts its file into the recipe first.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from raylab.errors import DataError

HUB = "torchvision:"  # as in torchvision:ResNet50_Weights.IMAGENET1K_V2
MOST = 6  # maximum layers named in an error


def is_head(name: str) -> bool:
    """Whether a weight belongs to the last layer, which every network and every member of an ensemble calls `head`."""
    parts = name.split(".")
    return parts[0] == "head" or (parts[0] == "members" and parts[2] == "head")


def start_from(
    model: nn.Module,
    weights: str,
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state,
) -> None:
    """Load the state dict at `weights`, changed by `adapt`, into `model` with `fill`; DataError also if reading it
    would require running code."""
    fill(model, adapt(_state(weights)), weights, own_head=True)


def match_inputs(
    own: dict[str, Tensor],
    state: dict[str, Tensor],
    own_inputs: dict[str, list[str]],
    state_inputs: dict[str, list[str]],
) -> dict[str, Tensor]:
    """Return `state` with its input columns reordered to those of `own`.

    `own_inputs` and `state_inputs` give the input names of a weight along its last dimension. Columns of inputs that
    both have come from `state`, the others from `own`. The members of an ensemble are handled the same way.
    """
    matched = dict(state)
    for name, tensor in own.items():
        key = name.split(".", 2)[2] if name.startswith("members.") else name
        if key not in own_inputs or name not in state or state[name].shape[:-1] != tensor.shape[:-1]:
            continue
        column = {label: place for place, label in enumerate(state_inputs[key])}
        shared = [(place, column[label]) for place, label in enumerate(own_inputs[key]) if label in column]
        matched[name] = tensor.clone()
        matched[name][..., [to for to, _ in shared]] = state[name][..., [of for _, of in shared]]
    return matched


def fill(model: nn.Module, state: dict[str, Tensor], weights: str, own_head: bool) -> None:
    """Load `state` into `model`; the last layer `head` stays new if its size differs or `own_head` is false.

    The layers have this project's names, or torchvision's names for the network inside `model.body`. Raises DataError,
    naming the source `weights` and the layers, if the layers are not those of the network.
    """
    own = model.state_dict()
    if not any(name in own for name in state):  # torchvision's names: body.* without the prefix, and its own classifier
        inside = {name.removeprefix("body.") for name in own if name.startswith("body.")}
        last = getattr(model, "replaced", None)
        state = {
            f"body.{k}": v for k, v in state.items() if k in inside or last is None or not k.startswith(f"{last}.")
        }
        own_head = False
    heads = [name for name in own if is_head(name)]
    if not own_head or any(name not in state or state[name].shape != own[name].shape for name in heads):
        state = {name: tensor for name, tensor in state.items() if not is_head(name)} | {
            name: own[name] for name in heads
        }
    wrong = [f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}" for name in own
             if name in state and state[name].shape != own[name].shape]  # fmt: skip
    missing = [f"{name} is missing" for name in own if name not in state]
    extra = [f"{name} is not in the network" for name in state if name not in own]
    if problems := wrong + missing + extra:
        more = f"; and {len(problems) - MOST} more" if len(problems) > MOST else ""
        raise DataError(
            f"the weights {weights} do not fit the network",
            f"{'; '.join(problems[:MOST])}{more}",
            "use weights of the same network (model.name, model.width, model.depth)",
        )
    model.load_state_dict(state)


def _state(weights: str) -> dict[str, Tensor]:
    path = _of_hub(weights.removeprefix(HUB)) if weights.startswith(HUB) else Path(weights)
    if weights.startswith("models:/"):
        raise DataError(
            f"{weights} was not downloaded", "only the verbs access MLflow", "raylab train --set model.weights=..."
        )
    if not path.is_file():
        do = f"set model.weights to the path of a state dict, or to {HUB}NAME.VERSION of torchvision"
        raise DataError(f"no weights file at {path}", do=do)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way, and torch's message advises unpickling
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        do = "use a .safetensors file, or a state dict of tensors only: anything else could run code"
        raise DataError(f"cannot read the weights {path}", why, do) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(
            f"{path} is not a state dict of tensors", f"it contains a {type(state).__name__}", "save model.state_dict()"
        )
    return state


def _of_hub(name: str) -> Path:
    """Return the file of torchvision's weights `name` in torch's cache, after downloading it if necessary."""
    import torchvision

    try:
        entry = torchvision.models.get_weight(name)
    except (KeyError, ValueError, AttributeError) as error:
        do = f"use a name such as {HUB}ResNet50_Weights.IMAGENET1K_V2 (MODEL_Weights.VERSION)"
        raise DataError(f"torchvision has no weights '{name}'", str(error)[:200], do) from error
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / str(entry.url).rpartition("/")[2]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the weights {name} could not be downloaded",
            str(error).partition("\n")[0][:200],
            f"download {entry.url} on another machine and copy it to {path}, or set model.weights to its path",
        ) from error
    return path
