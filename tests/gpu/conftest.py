"""These tests want a real GPU and FlashInfer; elsewhere they are collected, and skipped with a line for each file."""

from pathlib import Path

import pytest

from ferrum_rt.runtime.loading.cuda_backend import what_cuda_lacks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = what_cuda_lacks()
    if lacking is None:
        return
    skip = pytest.mark.skip(reason=f"no GPU to test on: {lacking}")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
