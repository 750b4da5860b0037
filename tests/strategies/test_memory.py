"""Tables are never whole in a process that needs a share of them."""

import sys

import pytest

from tests.strategies.launch import launch


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["deferred", "init", "fused_init"])
def test_peak(kind: str) -> None:
    launch("tests.strategies.memory", "peak", kind)
