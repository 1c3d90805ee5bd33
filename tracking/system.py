"""Processor, memory, disk and GPUs of a run's nodes, sampled into its outbox.

The names are MLflow's own, so its UI shows them under System metrics.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import pynvml

from tracking.outbox import Outbox, read

log = logging.getLogger(__name__)


class SystemMonitor:
    """A daemon thread that appends a sample of this node every `interval` seconds until `stop`."""

    def __init__(self, outbox: Outbox, interval: float = 10.0) -> None:
        self._outbox, self._interval = outbox, interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        sample_gpus = open_gpus()
        psutil.cpu_percent()  # the first call has nothing to compare with
        while not self._stopping.wait(self._interval):
            try:
                append_sample(self._outbox, sample() | sample_gpus())
            except OSError as error:
                log.warning("no more system metrics: %s", error)
                return


class NodeSampler:
    """Samples the node on which it is called, for whoever reports from there: at most every `interval` seconds, and {}
    in between. It may be pickled and sent to other nodes; on the node where it was made, `SystemMonitor` samples."""

    def __init__(self, interval: float = 10.0) -> None:
        self.home, self.interval = socket.gethostname(), interval
        self.last: float | None = None
        self.sample_gpus: Callable[[], dict[str, float]] = dict

    def __call__(self) -> dict[str, float]:
        """{NODE.cpu_utilization_percentage: ..., ...}; with a slash, MLflow would give each node charts of its own."""
        node, now = socket.gethostname(), time.monotonic()
        if node == self.home or (self.last is not None and now - self.last < self.interval):
            return {}
        is_first, self.last = self.last is None, now
        if is_first:
            self.sample_gpus = open_gpus()
            psutil.cpu_percent()  # the first call has nothing to compare with
            return {}
        return {f"{node}.{name}": value for name, value in (sample() | self.sample_gpus()).items()}


def append_sample(outbox: Outbox, values: Mapping[str, float]) -> None:
    """Put a sample into a run's outbox. Its step is the number of seconds since the outbox began, so that a resumed run
    goes on where it was."""
    began = next((r["time"] for _, r in read(outbox.directory) if r), time.time_ns() // 1_000_000)
    named = {f"system/{name}": value for name, value in values.items()}
    seconds = max(0.0, time.time() - began / 1000)  # the clock may be set back
    outbox.append({"kind": "metrics", "step": seconds, "values": named})


def sample() -> dict[str, float]:
    """Percentages of 100."""
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": psutil.virtual_memory().percent,
        "disk_usage_percentage": psutil.disk_usage(os.sep).percent,
    }


def open_gpus() -> Callable[[], dict[str, float]]:
    """A function that samples the GPUs that NVIDIA's library sees here; it returns {} where there are none."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        log.info("no GPU metrics: %s", error)
        return dict

    def sample_gpus() -> dict[str, float]:
        values: dict[str, float] = {}
        for index, handle in enumerate(handles):
            for name, read_values in GPU_READINGS.items():
                try:
                    values |= {f"gpu_{index}_{unit}": value for unit, value in read_values(handle).items()}
                except pynvml.NVMLError as error:
                    log.debug("GPU %d has no %s: %s", index, name, error)  # a MIG slice has no utilisation
        return values

    return sample_gpus


def _memory(handle: Any) -> dict[str, float]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "memory_usage_megabytes": memory.used / 1e6,
        "memory_usage_percentage": 100 * memory.used / memory.total,
    }


GPU_READINGS: dict[str, Callable[[Any], dict[str, float]]] = {
    "memory": _memory,
    "utilisation": lambda handle: {"utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu},
    "power": lambda handle: {"power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000},
}
"""What is read of each GPU, one by one: a card or a part of one need not have all."""
