"""Processor, memory, disk and GPU of this node, sampled into an outbox.

The names are MLflow's own, so its UI shows them under System metrics.
"""

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from tracking.outbox import Outbox, read

log = logging.getLogger(__name__)


class SystemMonitor:
    """A daemon thread that appends a sample every `interval` seconds until `stop`.

    `node` distinguishes the nodes of one run: system/NODE/cpu_utilization_percentage. The step is the number of seconds
    since the outbox began, so a resumed run continues where it stopped.
    """

    def __init__(self, outbox: Outbox, interval: float = 10.0, node: str = "") -> None:
        self._outbox, self._interval = outbox, interval
        self._prefix = f"system/{node}/" if node else "system/"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        began = next((r["time"] for _, r in read(self._outbox.directory) if r), time.time_ns() // 1_000_000)
        gpus = _gpus()
        psutil.cpu_percent()  # the first call returns 0
        while not self._stopping.wait(self._interval):
            values = {self._prefix + name: value for name, value in (sample() | gpus()).items()}
            try:
                self._outbox.append({"kind": "metrics", "step": time.time() - began / 1000, "values": values})
            except OSError as error:
                log.warning("no more system metrics: %s", error)
                return


def sample() -> dict[str, float]:
    """Percentages of 100, megabytes of 1e6 bytes."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }


def _gpus() -> Callable[[], dict[str, float]]:
    """A function that samples the GPUs that NVIDIA's library sees; it returns {} if there are none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return dict  # nvidia-ml-py is optional
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        log.info("no GPU metrics: %s", error)
        return dict
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    def sample_gpus() -> dict[str, float]:
        values: dict[str, float] = {}
        for index, handle in enumerate(handles):
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
                values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
                values[f"gpu_{index}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
                values[f"gpu_{index}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
            except nvml.NVMLError as error:
                log.debug("GPU %d has no metrics: %s", index, error)  # a MIG slice has no utilisation
        return values

    return sample_gpus
