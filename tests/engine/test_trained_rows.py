"""Rows that an optimizer of the user trains: as in nn.EmbeddingBag, and with state that follows rows."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.optimizer_state import UnmovableStateError
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings

from .engines import batch, full_weights, make_engine, plan_of

TABLE = (LogicalTable(name="t", rows=40, dim=16, chunks=4),)
Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, bool]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=0.05), False),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True), False),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.05), False),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05), False),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), False),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.05), False),
    "sparse_adam": (lambda p: torch.optim.SparseAdam(list(p), lr=0.05), True),
    "sparse_adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.05), True),
    "sparse_sgd": (lambda p: torch.optim.SGD(p, lr=0.05), True),
}
ROW_STATE = {
    "adam": ["exp_avg", "exp_avg_sq"],
    "amsgrad": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "adamw": ["exp_avg", "exp_avg_sq"],
    "sgd": [],
    "momentum": ["momentum_buffer"],
    "adagrad": ["sum"],
    "sparse_adam": ["exp_avg", "exp_avg_sq"],
    "sparse_adagrad": ["sum"],
    "sparse_sgd": [],
}


def small_engine(name: str, codes: Tensor | None = None) -> tuple[RoutedEmbeddings, torch.optim.Optimizer]:
    make, sparse = OPTIMIZERS[name]
    engine = make_engine(None, None if codes is None else [codes], sparse=sparse, tables=TABLE, features=(0,))
    return engine, make(engine.parameters())


def train(engine: nn.Module, optimizer: torch.optim.Optimizer, seed: int, weighted: bool = False) -> Tensor:
    optimizer.zero_grad()
    ids, offsets, weights = batch(seed, weighted=weighted, tables=TABLE, features=(0,))
    arguments: dict[str, Any] = {"per_sample_weights": weights}
    out: Tensor = engine(ids, offsets, **arguments)
    out.sin().sum().backward()
    optimizer.step()
    return out.detach()


pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # Adagrad's, for sparse gradients


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_rows_equal_nn_embedding_bag(name: str, weighted: bool) -> None:
    engine, optimizer = small_engine(name)
    make, sparse = OPTIMIZERS[name]
    plain = nn.EmbeddingBag(40, 16, mode="sum", include_last_offset=True, sparse=sparse)
    with torch.no_grad():
        plain.weight.copy_(full_weights(TABLE)[0])
    theirs = make(plain.parameters())
    for step in range(30):
        found, wanted = train(engine, optimizer, step, weighted), train(plain, theirs, step, weighted)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(engine.read_rows(0, 0, 40), plain.weight.detach(), rtol=1e-5, atol=1e-6)


def parameter_of(engine: RoutedEmbeddings, code: int) -> nn.Parameter:
    return engine.get_parameter(f"class_{code - 1}")


def row_state(engine: RoutedEmbeddings, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
    """State of every logical row in full width, NaN where nothing is stored."""
    codes, slots = engine.router.read(0, 0, 40)
    state = torch.full((40, 16), torch.nan)
    for row, (code, slot) in enumerate(zip(codes.tolist(), slots.tolist(), strict=True)):
        if code:
            state[row, : 4 * code] = optimizer.state[parameter_of(engine, code)][key][slot]
    return state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_rows(name: str) -> None:
    before, after = torch.arange(40).remainder(5).byte(), torch.arange(40).flip(0).remainder(5).byte()
    engine, optimizer = small_engine(name, before)
    for step in range(4):
        train(engine, optimizer, step)
    states = {key: row_state(engine, optimizer, key) for key in ROW_STATE[name]}
    assert all(state.nan_to_num().any() for state in states.values())
    parameters = list(engine.parameters())
    engine.move(plan_of([after]), [optimizer])
    assert [id(p) for p in engine.parameters()] == [id(p) for p in parameters]
    for key, old in states.items():
        new = row_state(engine, optimizer, key)
        for row in range(40):
            shared, wide = 4 * min(int(before[row]), int(after[row])), 4 * int(after[row])
            assert torch.equal(new[row, :shared], old[row, :shared])
            assert not new[row, shared:wide].any()
    for step in range(4, 8):
        train(engine, optimizer, step)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_classes_that_were_empty_train_as_if_they_never_were(name: str) -> None:
    """All rows go from class 4 to class 2 to class 4: beyond the columns cut off, nothing may differ from class 2."""
    there, there_optimizer = small_engine(name)
    for step in range(3):
        train(there, there_optimizer, step)
    there.move(FixedPlan([2]), [there_optimizer])
    narrow = [{k: v.clone() for k, v in there_optimizer.state[parameter_of(there, 2)].items() if isinstance(v, Tensor)}]
    there.move(FixedPlan([4]), [there_optimizer])
    there.move(FixedPlan([2]), [there_optimizer])
    again = there_optimizer.state[parameter_of(there, 2)]
    assert all(torch.equal(again[key], value) for key, value in narrow[0].items())
    if ROW_STATE[name]:
        assert {"step"} <= set(again) or "momentum" in name
    before = there.read_rows(0, 0, 40)
    train(there, there_optimizer, 3)
    assert not torch.equal(before, there.read_rows(0, 0, 40))


@pytest.mark.parametrize("name", ["adam", "momentum", "sparse_adam"])
def test_rows_that_were_never_looked_up_have_zero_state(name: str) -> None:
    codes = torch.where(torch.arange(40) < 20, 2, 4).byte()
    engine, optimizer = small_engine(name, codes)
    for _ in range(3):
        optimizer.zero_grad()
        engine(torch.arange(20), torch.tensor([0, 20])).sum().backward()
        optimizer.step()
    engine.move(FixedPlan([2]), [optimizer])
    for key in ROW_STATE[name]:
        state = row_state(engine, optimizer, key)
        assert state[:20, :8].all() and not state[20:, :8].any()


def test_an_optimizer_that_has_not_stepped_yet_has_nothing_to_move() -> None:
    engine, optimizer = small_engine("adam")
    engine.move(FixedPlan([2]), [optimizer])
    train(engine, optimizer, 0)
    assert optimizer.state[parameter_of(engine, 2)]["exp_avg"].shape == (40, 8)


def test_optimizer_state_dict_round_trip_after_moves() -> None:
    engine, optimizer = small_engine("adam", torch.arange(40).remainder(5).byte())
    for step in range(3):
        train(engine, optimizer, step)
    engine.move(FixedPlan([3]), [optimizer])
    train(engine, optimizer, 3)
    other, theirs = small_engine("adam")
    other.load_state_dict({key: value.clone() for key, value in engine.state_dict().items()})
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(4, 7):
        assert torch.equal(train(engine, optimizer, step), train(other, theirs, step))
    assert torch.equal(engine.read_rows(0, 0, 40), other.read_rows(0, 0, 40))


def test_state_without_rows_is_refused_and_nothing_moves() -> None:
    engine = make_engine(None, tables=TABLE, features=(0,))
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
    optimizer.state[parameter_of(engine, 4)] = {"ok": torch.zeros(40, 16), "factored": torch.zeros(16)}
    before = {key: value.clone() for key, value in engine.state_dict().items()}
    with pytest.raises(UnmovableStateError, match=r"'factored' of shape \(16,\).*\(40, 16\)"):
        engine.move(FixedPlan([2]), [optimizer])
    after = engine.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_fused_rate_is_not_theirs() -> None:
    engine, _ = small_engine("adam")
    with pytest.raises(RuntimeError, match="set the rate there"):
        engine.set_learning_rate(0.1)


@pytest.mark.parametrize("code", [0, 2])
def test_a_batch_without_storage_trains_nothing(code: int) -> None:
    engine, optimizer = small_engine("adam", torch.full((40,), code).byte() * (torch.arange(40) > 30))
    optimizer.zero_grad()
    out = engine(torch.tensor([1, 2]), torch.tensor([0, 2]))
    out.sum().backward()
    optimizer.step()
    assert not out.any()
