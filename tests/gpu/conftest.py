"""Tests of what holds on a GPU, with the real card. Each is skipped, with the reason, where there is none.

RAYLAB_GPU_TESTS_ON=cpu runs what can be run without a card on the CPU instead, to check the tests themselves.
"""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    if device := os.environ.get("RAYLAB_GPU_TESTS_ON"):
        return device
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return "cuda"


@pytest.fixture
def card(device: str) -> torch.device:
    """For what only a card has: streams that the host may wait for, and memory of its own."""
    if device != "cuda":
        pytest.skip("only a CUDA device has this")
    return torch.device(device)
