"""The kind of CPU that computes: on two of one kind, the same training ends with the same bits."""

from functools import lru_cache
from pathlib import Path

import torch

WIDTH = 96  # bytes of a kind, which is cut beyond


@lru_cache(maxsize=1)
def cpu_kind() -> str:
    """Model name and the vector instructions that torch uses here: "AMD EPYC 7763, AVX2". ATEN_CPU_CAPABILITY limits
    the latter."""
    name = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def encode_kind(kind: str) -> list[int]:
    """The kind as WIDTH numbers, for a collective."""
    return list(kind.encode("ascii", "replace")[:WIDTH].ljust(WIDTH, b"\0"))


def decode_kind(numbers: list[int]) -> str:
    """The inverse of `encode_kind`."""
    return bytes(numbers).rstrip(b"\0").decode("ascii")
