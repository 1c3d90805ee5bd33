"""Weights to start a network from: a file, or a name of torchvision's hub. Never a pickle; checked layer by layer.

A registered MLflow model (`models:/NAME/VERSION`) is made a file of by `jobs`, before a recipe with it comes here.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from raylab.errors import DataError

HUB = "torchvision:"  # as in torchvision:ResNet50_Weights.IMAGENET1K_V2
MOST = 6  # layers named in an error


def is_head(name: str) -> bool:
    """Whether a weight of this name belongs to the last layer, `head` in every network and in an ensemble's members."""
    parts = name.split(".")
    return parts[0] == "head" or (parts[0] == "members" and parts[2] == "head")


def start_from(model: nn.Module, weights: str) -> None:
    """Load the state dict `weights` into `model` as `fill` does. Raises DataError also when it cannot be read without
    running code."""
    fill(model, _state(weights), weights, own_head=True)


def by_name(
    own: dict[str, Tensor], state: dict[str, Tensor], mine: dict[str, list[str]], theirs: dict[str, list[str]]
) -> dict[str, Tensor]:
    """`state` with the inputs of `own`: of every weight in `mine` (its inputs by name, along the last dimension) the
    columns that `theirs` has too are taken, and the others stay as they are in `own`. An ensemble's members alike."""
    found = dict(state)
    for name, tensor in own.items():
        key = name.split(".", 2)[2] if name.startswith("members.") else name
        if key not in mine or name not in state or state[name].shape[:-1] != tensor.shape[:-1]:
            continue
        at = {label: place for place, label in enumerate(theirs[key])}
        shared = [(place, at[label]) for place, label in enumerate(mine[key]) if label in at]
        found[name] = tensor.clone()
        found[name][..., [to for to, _ in shared]] = state[name][..., [of for _, of in shared]]
    return found


def fill(model: nn.Module, state: dict[str, Tensor], weights: str, own_head: bool) -> None:
    """Load `state` into `model`; where its last layer `head` has another size or is not `own_head`, that stays new.

    It has this project's names, or torchvision's for the network inside `model.body`. Raises DataError, in which it is
    called `weights`, when its layers are not those of the network, with their names.
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
    wrong = [f"{name} {tuple(state[name].shape)}, here {tuple(own[name].shape)}" for name in own
             if name in state and state[name].shape != own[name].shape]  # fmt: skip
    missing = [f"{name} is not in it" for name in own if name not in state]
    extra = [f"{name} is not in the network" for name in state if name not in own]
    if told := wrong + missing + extra:
        more = f"; and {len(told) - MOST} more" if len(told) > MOST else ""
        raise DataError(
            f"the weights {weights} do not fit the network",
            f"{'; '.join(told[:MOST])}{more}",
            "give weights of the same network (model.name, model.width, model.depth)",
        )
    model.load_state_dict(state)


def _state(weights: str) -> dict[str, Tensor]:
    path = _of_hub(weights.removeprefix(HUB)) if weights.startswith(HUB) else Path(weights)
    if weights.startswith("models:/"):
        raise DataError(
            f"{weights} is not at hand", "MLflow is asked by the verbs only", "raylab train --set model.weights=..."
        )
    if not path.is_file():
        do = f"set model.weights to the path of a state dict, or to {HUB}NAME.VERSION of torchvision"
        raise DataError(f"no weights at {path}", do=do)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own ways to be damaged, and torch's text advises to unpickle it
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        do = "give a .safetensors file, or a state dict of tensors alone: anything else could run code"
        raise DataError(f"cannot read the weights {path}", why, do) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict", f"it holds a {type(state).__name__}", "save model.state_dict()")
    return state


def _of_hub(name: str) -> Path:
    """The file of torchvision's weights `name`: from torch's own cache, else fetched into it."""
    import torchvision

    try:
        known = torchvision.models.get_weight(name)
    except (KeyError, ValueError, AttributeError) as error:
        do = f"a name is MODEL_Weights.VERSION, for example {HUB}ResNet50_Weights.IMAGENET1K_V2"
        raise DataError(f"torchvision knows no weights '{name}'", str(error)[:200], do) from error
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / str(known.url).rpartition("/")[2]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(known.url, str(path), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the weights {name} could not be fetched",
            str(error).partition("\n")[0][:200],
            f"fetch {known.url} elsewhere and put it at {path}, or set model.weights to its path",
        ) from error
    return path
