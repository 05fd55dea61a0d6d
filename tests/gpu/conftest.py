"""Tests that launch the kernels; without a Hopper GPU every one of them skips and says so."""

import pytest
import torch


def _missing() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, found none"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"needs compute capability 9.0 (Hopper), found {capability[0]}.{capability[1]}"
    return ""


def pytest_collection_modifyitems(items):
    if reason := _missing():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
