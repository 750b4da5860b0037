"""What stands in for the newest releases of the stack behaves like them."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_embcomp.compat import copies_leave_ddp_out, fused_params, table_over


class TakesBuffers(nn.Module):
    """As FBGEMM 1.8 builds its tables."""

    def __init__(self, specs: list[Any], preallocated_host_buffers: dict[str, Tensor], eps: float) -> None:
        super().__init__()
        self.weights_host = nn.Parameter(preallocated_host_buffers["weights"])
        self.momentum1_host = nn.Parameter(preallocated_host_buffers["momentum1"])
        self.eps = eps


class MakesItsOwn(nn.Module):
    """As FBGEMM 1.6 builds them."""

    def __init__(self, specs: list[Any], eps: float) -> None:
        super().__init__()
        self.weights_host = nn.Parameter(torch.zeros(8))
        self.momentum1_host = nn.Parameter(torch.zeros(2))
        self.eps = eps


@pytest.mark.parametrize("table_type", [TakesBuffers, MakesItsOwn])
def test_tables_lie_over_the_given_tensors(table_type: type[Any]) -> None:
    buffers = {"weights": torch.arange(8.0), "momentum1": torch.ones(2)}
    table = table_over(table_type, [()], buffers, eps=0.5)
    assert table.eps == 0.5
    for name, tensor in buffers.items():
        assert getattr(table, f"{name}_host").data_ptr() == tensor.data_ptr()
    with torch.no_grad():
        table.weights_host.add_(1.0)
    assert torch.equal(buffers["weights"], torch.arange(8.0) + 1.0)


class Split(NamedTuple):
    """As FBGEMM says what it keeps where."""

    dev_size: int
    uvm_size: int
    host_size: int


class OnDevice(nn.Module):
    """As FBGEMM builds its tables on a GPU."""

    weights_dev: Tensor

    def __init__(self, specs: list[Any]) -> None:
        super().__init__()
        self._apply_split(Split(8, 0, 0), "weights", torch.float32)

    def _apply_split(self, split: Split, prefix: str, dtype: torch.dtype) -> None:
        self.register_buffer(f"{prefix}_dev", torch.zeros(split.dev_size, dtype=dtype, device="meta"))


def test_tables_elsewhere_take_the_given_tensors_and_let_them_go() -> None:
    weights = torch.empty(8, device="meta")
    held = weakref.ref(weights)
    table = table_over(OnDevice, [()], {"weights": weights})
    assert table.weights_dev is weights
    gc.disable()
    try:
        del table, weights
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("attribute", ["_sharder_data_map", "_sharder_map"])
def test_fused_parameters_of_either_planner(attribute: str) -> None:
    facts = {"a": SimpleNamespace(fused_params={"optimizer": 1}), "b": SimpleNamespace(fused_params=None)}
    enumerator = SimpleNamespace(**{attribute: facts})
    assert fused_params(enumerator, "a") == {"optimizer": 1}
    assert fused_params(enumerator, "b") == {}


def test_copies() -> None:
    assert not copies_leave_ddp_out(type("Old", (), {}))
    assert copies_leave_ddp_out(type("New", (), {"init_data_parallel": None}))
