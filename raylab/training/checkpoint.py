"""Checkpoints that are complete or absent: written elsewhere, renamed once, read only if the checksum matches.

checkpoints/step-00000120/state.pt       tensors and plain values, loadable with weights_only=True
                          sha256         of state.pt
"""

import hashlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raylab.data.prepared import sha256
from raylab.errors import CheckpointError
from raylab.storage import describe_cause

NAME = re.compile(r"step-\d{8}")


def save(
    directory: Path, step: int, state: dict[str, Any], keep: int = 2, check: Callable[[], None] = lambda: None
) -> Path:
    """Write the checkpoint of `step`, keep the `keep` newest up to it, and remove all others.

    `check` is called before anything is written, and when all is written and nothing has changed yet: what it raises
    leaves all as it was.
    Raises CheckpointError when the storage is full or not writable; earlier checkpoints are then untouched.
    """
    final = directory / f"step-{step:08d}"
    work = directory / f".step-{step:08d}.{os.getpid()}"
    try:
        check()
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".step-*"):  # of a writer that was killed, or expelled and is still writing
            shutil.rmtree(stale, ignore_errors=True)
        work.mkdir()
        with HashingFile(work / "state.pt") as file:  # given a path, torch would hold the GIL while it writes
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with (work / "sha256").open("w") as note:
            note.write(file.sha256.hexdigest())
            note.flush()
            os.fsync(note.fileno())
        check()
        if final.exists() and not is_valid(final):
            _remove(final)
        if final.exists():  # the same step again, after a restart from an earlier checkpoint
            shutil.rmtree(work)
        else:
            work.rename(final)
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        here = list_checkpoints(directory)
        old = [path for path in here if path <= final][keep:]
        # This run resumed from one before them. Valid ones are of those who went on while this process hung
        damaged = [path for path in here if path > final and not is_valid(path)]
        for path in [*old, *damaged]:
            _remove(path)
    except Exception as error:
        shutil.rmtree(work, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch wraps a failed write in RuntimeError
            raise
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {directory}",
            describe_cause(error),
            "free space or choose another RAYLAB_HOME, then: raylab resume NAME",
        ) from error
    return final


class HashingFile(io.BufferedWriter):
    """A file with the SHA-256 of what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return super().write(content)


def hash_state(state: dict[str, Any]) -> str:
    """Return the SHA-256 of what the further training depends on: all of a state but `rows`, the metrics on their way.

    It covers names, types, shapes and values; the layout of tensors in memory and the file format do not matter.
    """
    digest = hashlib.sha256()
    _hash_value(digest, {name: part for name, part in state.items() if name != "rows"})
    return digest.hexdigest()


def _hash_value(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=str):
            digest.update(f"key {key!r};".encode())
            _hash_value(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _hash_value(digest, item)
    elif isinstance(value, float):
        digest.update(f"float {float(value).hex()};".encode())
    elif value is None or isinstance(value, bool | int | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise TypeError(f"a state has no {type(value).__name__}")


def _remove(checkpoint: Path) -> None:
    """Remove it as one: a kill in the middle leaves no half of it under its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.old")
    checkpoint.rename(hidden)
    if hidden.is_dir():
        shutil.rmtree(hidden)
    else:
        hidden.unlink()


def list_checkpoints(directory: Path) -> list[Path]:
    """Return all checkpoints, newest first, whether valid or not. Other files and directories are left alone."""
    here = [path for path in directory.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(here, reverse=True)


def is_valid(path: Path) -> bool:
    state, note = path / "state.pt", path / "sha256"
    return state.is_file() and note.is_file() and sha256(state).encode() == note.read_bytes().strip()


def find_newest(directory: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest checkpoint whose checksum matches, and the damaged ones that are newer.

    Raises CheckpointError if there are checkpoints and all are damaged.
    """
    damaged: list[Path] = []
    for path in list_checkpoints(directory):
        if is_valid(path):
            return path, damaged
        damaged.append(path)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged",
            "no checksum matches: " + ", ".join(p.name for p in damaged),
            "start the run again under another name",
        )
    return None, []


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the state as saved, without executing any pickle (weights_only)."""
    try:
        state: dict[str, Any] = torch.load(path / "state.pt", map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message advises unpickling it anyway
        raise CheckpointError(f"{path} could not be read", "it contains more than tensors and plain values") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(f"{path} could not be read", str(error).partition("\n")[0]) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} could not be read", "it does not contain the state of a run")
    return state


def adopt(directory: Path, donor: Path) -> None:
    """Make the checkpoint `donor` (of another trial) the only one in `directory`."""
    state = load(donor)
    for old in list_checkpoints(directory):
        shutil.rmtree(old)
    save(directory, int(state["progress"]["step"]), state)
