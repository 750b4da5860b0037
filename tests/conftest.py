"""Fixtures shared by all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The tensors of the tests are tiny: more threads only wait for each other, badly so on a busy machine.
torch.set_num_threads(1)

_REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets: ``EMBCOMP_DATA``, or ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("EMBCOMP_DATA", _REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set EMBCOMP_DATA")
    return folder


_MADE_PER_DEVICE = {
    "lightning_embcomp.engine.bag_layout": "_pooled_layout",
    "lightning_embcomp.kernels.count.encoding": "_log_values",
    "lightning_embcomp.kernels.triton": "_constant",
}


@pytest.fixture(autouse=True)
def no_tensors_of_other_tests() -> Iterator[None]:
    """What is made once per device does not outlive a test: in some tests the GPU is not a real one."""
    yield
    for module, name in _MADE_PER_DEVICE.items():
        if module in sys.modules:
            getattr(getattr(sys.modules[module], name), "cache_clear", lambda: None)()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
