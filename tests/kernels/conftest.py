"""Every kernel test runs on both twins."""

from collections.abc import Iterator

import pytest

from lightning_embcomp.kernels.dispatch import force_backend

from .cases import CASES, Case


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with force_backend(request.param):
        yield request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]
