"""Energy counters of this process's hardware: GPUs by NVIDIA's library, processors by RAPL. What cannot be read is
missing, never estimated."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pynvml

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
ReadJoules = Callable[[], dict[str, float]]
"""Returns joules since the counters were opened, by "gpu" and "cpu"; what cannot be read is missing."""


def open_counters(gpus: bool, share: float) -> ReadJoules:
    """Counters of what this process uses: the GPUs that it sees, if `gpus`, and its `share` of the processors.

    Processors count only in a Slurm job that has all CPUs of its node: elsewhere others compute on them as well.
    """
    counters: dict[str, Callable[[], float]] = {}
    if gpus and (read_gpus := open_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))):
        counters["gpu"] = read_gpus
    if has_whole_node(os.environ) and (packages := list_packages(POWERCAP)):
        read_packages = count_packages(packages)
        counters["cpu"] = lambda: read_packages() * share
    return lambda: {name: read() for name, read in counters.items()}


def has_whole_node(environment: Mapping[str, str]) -> bool:
    """Whether this process is in a Slurm job to which all CPUs of this node belong."""
    return int(environment.get("SLURM_CPUS_ON_NODE", 0)) >= (os.cpu_count() or 1)


def open_gpus(visible: str | None) -> Callable[[], float] | None:
    """A counter of the joules of the GPUs in `visible` (CUDA_VISIBLE_DEVICES), of all GPUs if it is None.

    None where one of them has no such counter: older than Volta, or a slice of a GPU.
    """
    try:
        pynvml.nvmlInit()
        handles = [_handle(name) for name in _names(visible)]
        first = [int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles]
    except pynvml.NVMLError as error:
        log.info("the energy of GPUs is not measured: %s", error)
        return None
    last = list(first)

    def read() -> float:
        for at, handle in enumerate(handles):
            try:
                last[at] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            except pynvml.NVMLError as error:
                log.warning("the energy of a GPU is counted up to now only: %s", error)
        return sum(now - then for now, then in zip(last, first, strict=True)) / 1000  # from mJ

    return read if handles else None


def _names(visible: str | None) -> list[str]:
    if visible is None:
        return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [name.strip() for name in visible.split(",") if name.strip()]


def _handle(name: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def list_packages(powercap: Path) -> list[Path]:
    """The RAPL directories of the processor packages whose counters this user may read; none if one is unreadable."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
    return packages if all(os.access(zone / "energy_uj", os.R_OK) for zone in packages) else []


def count_packages(packages: list[Path]) -> Callable[[], float]:
    """A counter of the joules of these packages. It must be read before one of theirs has wrapped around twice."""

    def read_all() -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in packages]

    ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in packages]
    last, total = read_all(), 0

    def read() -> float:
        nonlocal last, total
        now = read_all()
        total += sum((new - old) % range for new, old, range in zip(now, last, ranges, strict=True))
        last = now
        return total / 1e6

    return read
