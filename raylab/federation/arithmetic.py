"""The arithmetic of a site: exact sums are of use only where every site computes the same bits from the same numbers.

Libraries choose instructions by the CPU. `pin` limits them before torch is loaded; `describe_arithmetic` returns what
must be equal on all sites; `probe` is evidence: the bits of one forward and backward pass of the network itself.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylab.errors import RunError
from raylab.files import hash_files

if TYPE_CHECKING:
    from torch import nn

    from raylab.data.samples import Samples
    from raylab.tasks.base import Task

LIMITS: Mapping[str, Mapping[str, str]] = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"},
}
"""environment variables by capability: of torch, oneDNN and MKL"""
LIBRARY = Path(__file__).parents[1]
PROBE_ROWS = 32


def pin(capability: str) -> None:
    """Limit the vector instructions of torch and its libraries in this process; RunError if torch has chosen others,
    because it was loaded before."""
    os.environ.update(LIMITS[capability])
    if "torch" not in sys.modules:
        return
    import torch

    chosen = torch.backends.cpu.get_cpu_capability().lower()
    if chosen != capability:
        raise RunError(
            f"torch computes with {chosen} in this process, the agreement says {capability}",
            "it was loaded before `raylab federate`, or this CPU does not have these instructions",
            f"start it in a new process, or with ATEN_CPU_CAPABILITY={capability} from the beginning",
        )


def describe_arithmetic() -> dict[str, str]:
    """Return what must be equal on all sites, by name: the kind of CPU, its instructions, and the software."""
    import torch

    return {
        "kind of CPU": _kind_of_cpu(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "limits": " ".join(f"{name}={os.environ.get(name, '')}" for name in LIMITS["default"]),
        "libraries of torch": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "version of torch": version("torch"),
        "version of numpy": version("numpy"),
        **describe_code(),
    }


def describe_code() -> dict[str, str]:
    """Return what must be equal on all sites whatever they compute: the code of raylab."""
    return {"raylab code": hash_files(sorted(LIBRARY.rglob("*.py")), LIBRARY)[:16]}


def probe(task: "Task", model: "nn.Module", train: "Samples", seed: int) -> str:
    """Return the SHA-256 of the losses and gradients of `model` for random inputs, the same at every site.
    Changes its batch-norm statistics."""
    import torch

    from raylab.training.batchnorm import ShardStatistics
    from raylab.training.gradients import shard_gradient

    shape = train.batch(_first_row()).shape[1:]
    x = torch.randn(PROBE_ROWS, *shape, generator=torch.Generator().manual_seed(seed))
    classes = len(train.spec["classes"])
    y = torch.arange(PROBE_ROWS) % classes
    if train.y.ndim > 1:  # several labels
        y = (y[:, None] + torch.arange(classes)) % 2
    model.eval()
    for layer in ShardStatistics(model).layers:  # which compute otherwise in training
        layer.train()
    losses = task.outcome.loss(model(x).float(), y, None)
    gradient = shard_gradient(losses.sum(), [w for w in model.parameters() if w.requires_grad])
    return hashlib.sha256(losses.detach().numpy().tobytes() + gradient.numpy().tobytes()).hexdigest()


def _first_row() -> Any:
    import numpy as np

    return np.zeros(1, dtype=np.int64)


def _kind_of_cpu() -> str:
    """Vendor, family, model and stepping as Linux says them, else the name of the processor."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine()
    facts = dict(
        (name.strip(), value.strip())
        for name, colon, value in (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
        if colon
    )
    return " ".join(facts.get(name, "?") for name in ("vendor_id", "cpu family", "model", "stepping", "model name"))
