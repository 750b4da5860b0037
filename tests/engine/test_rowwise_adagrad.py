"""Row-wise Adagrad of configure_optimizers: a row's number follows it, whatever its shape and whenever it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.optim import RowWiseAdagrad

from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings

from .engines import batch, full_weights, make_engine, plan_of
from .test_trained_rows import TABLE, parameter_of, train

RATE, EPS = 0.05, 1e-8


class LateAdagrad(torch.optim.Optimizer):
    """Counts steps of all parameters from the start, and keeps a number per row of those that have had a gradient."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["step"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None or not parameter.grad.any():
                continue
            state = self.state[parameter]
            state["step"] += 1
            if "momentum" not in state:
                state["momentum"] = parameter.new_zeros(parameter.shape[0])
            state["momentum"] += parameter.grad.square().mean(1)
            parameter -= RATE * parameter.grad / (state["momentum"].sqrt() + EPS)[:, None]


Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, str]] = {
    "torchrec": (lambda p: RowWiseAdagrad(p, lr=RATE, eps=EPS), "sum"),
    "late": (LateAdagrad, "momentum"),
}


def sums(engine: RoutedEmbeddings, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
    """State of every logical row, NaN where nothing is stored."""
    codes, slots = engine.router.read(0, 0, 40)
    found = torch.full((40,), torch.nan)
    for row, (code, slot) in enumerate(zip(codes.tolist(), slots.tolist(), strict=True)):
        if code:
            found[row] = optimizer.state[parameter_of(engine, code)][key].reshape(-1)[slot]
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_rows_train_as_numpy_does(name: str) -> None:
    make, key = OPTIMIZERS[name]
    engine = make_engine(None, tables=TABLE, features=(0,))
    optimizer = make(engine.parameters())
    rows, momentum = full_weights(TABLE)[0].double().numpy(), np.zeros(40)
    for step in range(10):
        train(engine, optimizer, step)
        ids, offsets, _ = batch(step, weighted=False, tables=TABLE, features=(0,))
        assert offsets is not None
        bags = np.repeat(np.arange(offsets.numel() - 1), np.diff(offsets.numpy()))
        pooled = np.zeros((offsets.numel() - 1, 16))
        np.add.at(pooled, bags, rows[ids.numpy()])
        grad = np.zeros_like(rows)
        np.add.at(grad, ids.numpy(), np.cos(pooled)[bags])
        momentum += (grad**2).mean(1)
        rows -= RATE * grad / (np.sqrt(momentum) + EPS)[:, None]
    np.testing.assert_allclose(engine.read_rows(0, 0, 40), rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums(engine, optimizer, key), momentum, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sums_follow_rows(name: str) -> None:
    make, key = OPTIMIZERS[name]
    before, after = torch.arange(40).remainder(5).byte(), torch.arange(40).flip(0).remainder(5).byte()
    engine = make_engine(None, [before], tables=TABLE, features=(0,))
    optimizer = make(engine.parameters())
    for step in range(4):
        train(engine, optimizer, step)
    shapes = {len(state[key].shape) for state in optimizer.state.values() if key in state}
    old = sums(engine, optimizer, key)
    assert old.nan_to_num().any()
    engine.move(plan_of([after]), [optimizer])
    new = sums(engine, optimizer, key)
    stayed = (before > 0) & (after > 0)
    assert torch.equal(new[stayed], old[stayed])
    assert not new[(before == 0) & (after > 0)].any()
    assert {len(state[key].shape) for state in optimizer.state.values() if key in state} == shapes
    for step in range(4, 8):
        train(engine, optimizer, step)
    assert bool((sums(engine, optimizer, key)[stayed] >= new[stayed]).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_no_batch_has_reached_move_with_sums_of_zero(name: str) -> None:
    """Their class has a count of steps and nothing else when rows with sums move in, and theirs move out."""
    make, key = OPTIMIZERS[name]
    codes = torch.where(torch.arange(40) < 20, 2, 4).byte()
    engine = make_engine(None, [codes], tables=TABLE, features=(0,))
    optimizer = make(engine.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        engine(torch.arange(20), torch.tensor([0, 20])).sum().backward()
        optimizer.step()
    old = sums(engine, optimizer, key) if name == "torchrec" else None
    engine.move(plan_of([torch.where(torch.arange(40) % 2 == 0, 4, 2).byte()]), [optimizer])
    new = sums(engine, optimizer, key)
    assert new[:20].all() and not new[20:].any()
    assert old is None or torch.equal(new, old)
    engine.move(FixedPlan([3]), [optimizer])
    assert torch.equal(sums(engine, optimizer, key), new)
    train(engine, optimizer, 0)
