"""Fused Adam, LAMB and their partial forms, and stochastic rounding: in the engine, and from a user's module on."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec import optim as torchrec_optim
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import engine_bytes, table_memory
from lightning_embcomp.engine.optimizer import FusedKind, FusedOptimizerSpec, UnsupportedOptimizerError
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.rates import set_rates
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.surgery import build_host
from lightning_embcomp.tables import find_hosts
from tests.processes import run_processes

from .engines import (
    FEATURES,
    TABLES,
    assert_same_state,
    batch,
    full_weights,
    make_engine,
    plan_of,
    random_codes,
    read_all,
    snapshot,
    train,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions as it is imported
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

MOMENTS: tuple[FusedKind, ...] = ("adam", "lamb", "partial_rowwise_adam", "partial_rowwise_lamb")
OPTIONS: dict[str, Any] = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.02}
CPU = torch.device("cpu")


def stored_columns(codes: list[Tensor]) -> list[np.ndarray]:
    """1 where a row stores a column."""
    masks = []
    for table, mine in zip(TABLES, codes, strict=True):
        mask = np.zeros((table.rows, table.dim))
        for row, code in enumerate(mine.tolist()):
            for first, length in table.columns_of(code):
                mask[row, first : first + length] = 1
        masks.append(mask)
    return masks


class ByHand:
    """Tables of whole rows and their moments in float64; columns that are not stored stay zero."""

    def __init__(self, kind: str, codes: list[Tensor], rate: float) -> None:
        self.kind, self.rate, self.steps = kind, rate, 0
        self.stored = stored_columns(codes)
        self.weights = [w.double().numpy() * mask for w, mask in zip(full_weights(), self.stored, strict=True)]
        self.first = [np.zeros_like(w) for w in self.weights]
        self.second = [np.zeros(len(w)) if "partial" in kind else np.zeros_like(w) for w in self.weights]

    def step(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> None:
        """One step on the sum of the sines of the pooled rows."""
        self.steps += 1
        bounds, size = offsets.tolist(), (offsets.numel() - 1) // len(FEATURES)
        grads = [np.zeros_like(w) for w in self.weights]
        seen: list[set[int]] = [set() for _ in TABLES]
        for bag in range(len(bounds) - 1):
            t = FEATURES[bag // size]
            rows = ids[bounds[bag] : bounds[bag + 1]].tolist()
            shares = weights[bounds[bag] : bounds[bag + 1]].double().numpy()
            slope = np.cos(shares @ self.weights[t][rows])
            np.add.at(grads[t], rows, shares[:, None] * slope)
            seen[t].update(rows)
        for t, rows in enumerate(map(sorted, seen)):
            self._move(t, np.array(rows, np.int64), grads[t])

    def _move(self, t: int, rows: np.ndarray, grad: np.ndarray) -> None:
        stored = self.stored[t][rows]
        g, w = grad[rows] * stored, self.weights[t][rows]
        square = (g**2).sum(1) / np.maximum(stored.sum(1), 1) if "partial" in self.kind else g**2
        self.first[t][rows] = 0.8 * self.first[t][rows] + 0.2 * g
        self.second[t][rows] = 0.95 * self.second[t][rows] + 0.05 * square
        root = np.sqrt(self.second[t][rows] / (1 - 0.95**self.steps)) + 1e-6
        change = self.first[t][rows] / (1 - 0.8**self.steps) / (root[:, None] if root.ndim == 1 else root)
        change = (change + 0.02 * w) * stored
        if "lamb" in self.kind:
            here, there = np.linalg.norm(w, axis=1), np.linalg.norm(change, axis=1)
            change *= np.where(stored.any(1), here / np.where(there > 0, there, 1), 0)[:, None]
        self.weights[t][rows] = w - self.rate * change


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", MOMENTS)
def test_twenty_steps_equal_those_by_hand(kind: FusedKind, backend: str) -> None:
    codes = random_codes(1)
    wanted = ByHand(kind, codes, 0.05)
    with force_backend(backend):  # type: ignore[arg-type]
        engine = make_engine(kind, codes, **OPTIONS)
        for step in range(20):
            given = batch(step, weighted=True)
            assert given.weights is not None
            engine(*given).sin().sum().backward()
            wanted.step(given.ids, given.offsets, given.weights)
    for found, weights in zip(read_all(engine), wanted.weights, strict=True):
        np.testing.assert_allclose(found.numpy(), weights, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("optimizer", "decay"), [(torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.1)])
def test_rows_that_are_always_looked_up_equal_the_optimizer_of_pytorch(
    optimizer: type[torch.optim.Optimizer], decay: float
) -> None:
    table = LogicalTable(name="t", rows=7, dim=8, chunks=2)
    engine = make_engine("adam", tables=(table,), features=(0,), weight_decay=decay)
    plain = nn.EmbeddingBag.from_pretrained(full_weights((table,))[0], freeze=False, mode="sum")
    reference = optimizer(plain.parameters(), lr=0.05, weight_decay=decay)  # type: ignore[call-arg]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        ids = torch.cat([torch.randperm(7, generator=generator), torch.randint(7, (9,), generator=generator)])
        offsets = torch.tensor([0, 3, 5, 12, 16])
        engine(ids, offsets).sin().sum().backward()
        reference.zero_grad()
        plain(ids, offsets[:-1]).sin().sum().backward()
        reference.step()
    torch.testing.assert_close(read_all(engine)[0], plain.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [*MOMENTS, "sgd", "rowwise_adagrad"])
def test_resume_is_bit_for_bit(kind: FusedKind, dtype: torch.dtype) -> None:
    """Also where float16 is rounded at random: draws follow from the step."""
    rounding: dict[str, Any] = {"stochastic_rounding": dtype == torch.float16}
    engine = make_engine(kind, random_codes(1), dtype=dtype, **rounding)
    train(engine, 3)
    engine.move(plan_of(random_codes(2)))
    train(engine, 2, first=3)
    other = make_engine(kind, random_codes(3), dtype=dtype, **rounding)
    other.load_state_dict(snapshot(engine))
    for one in (engine, other):
        train(one, 4, first=5)
    assert_same_state(engine.state_dict(), other.state_dict())
    fresh = make_engine(kind, random_codes(3), dtype=dtype, **rounding)
    with pytest.raises(AssertionError):
        assert_same_state(engine.state_dict(), fresh.state_dict())


def state_of(engine: RoutedEmbeddings, t: int, name: str) -> list[Any]:
    """A state of every row: one number, or those of its columns by column; None without storage."""
    table = TABLES[t]
    codes, slots = engine.router.read(t, 0, table.rows)
    states = engine.get_optimizer_state()
    found: list[Any] = []
    for code, slot in zip(codes.tolist(), slots.tolist(), strict=True):
        if not code:
            found.append(None)
            continue
        values = states[engine.class_map.class_of_code[t][code]][name][slot].tolist()
        columns = [c for first, length in table.columns_of(code) for c in range(first, first + length)]
        found.append(dict(zip(columns, values, strict=True)) if isinstance(values, list) else values)
    return found


@pytest.mark.parametrize("kind", ["adam", "partial_rowwise_lamb"])
def test_both_moments_follow_their_rows(kind: FusedKind) -> None:
    engine = make_engine(kind, random_codes(1))
    train(engine, 5)
    before = {name: [state_of(engine, t, name) for t in range(3)] for name in ("momentum1", "momentum2")}
    engine.move(plan_of(random_codes(2)))
    for name, tables in before.items():
        assert any(value for rows in tables for value in rows)
        for t, rows in enumerate(tables):
            for was, now in zip(rows, state_of(engine, t, name), strict=True):
                if isinstance(now, float):
                    assert now == (was or 0.0)
                elif now is not None:
                    assert now == {c: (was or {}).get(c, 0.0) for c in now}


@pytest.mark.parametrize("kind", MOMENTS)
def test_all_bytes_are_counted(kind: FusedKind) -> None:
    codes = random_codes(1)
    engine = make_engine(kind, codes)
    memory = [table_memory(engine, t) for t in range(3)]
    assert sum(m.total for m in memory) == engine_bytes(engine)
    for table, mine, stored, m in zip(TABLES, codes, stored_columns(codes), memory, strict=True):
        rows, columns = int((mine > 0).sum()), int(stored.sum())
        state = 4 * (rows + columns) if "partial" in kind else 8 * columns
        assert m.optimizer_state == state
        assert m.plain_optimizer_state == table.rows * (4 * (table.dim + 1) if "partial" in kind else 8 * table.dim)


def test_a_fresh_start_begins_with_step_one() -> None:
    """Moments that begin at zero once more are corrected as young ones."""
    engine, other = (make_engine("adam", random_codes(1)) for _ in range(2))
    train(engine, 5)
    engine.clear_row_state()
    for t, weights in enumerate(full_weights()):
        engine.load_rows(t, 0, weights)
    for one in (engine, other):
        train(one, 3, first=7)
    assert_same_state(engine.state_dict(), other.state_dict())


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_float16_that_would_stand_still_moves(kind: FusedKind) -> None:
    """Steps far below the distance of two float16: only draws can add up to what float32 does."""
    ends = {}
    for dtype, rounding in ((torch.float32, False), (torch.float16, False), (torch.float16, True)):
        table = LogicalTable(name="t", rows=64, dim=64)
        engine = make_engine(kind, tables=(table,), features=(0,), dtype=dtype, stochastic_rounding=rounding)
        engine.load_rows(0, 0, torch.full((64, 64), 1.5))
        engine.set_learning_rate(1e-5)
        for _ in range(50):
            engine(torch.arange(64), torch.arange(65)).sum().backward()
        ends[dtype, rounding] = read_all(engine)[0].double()
    assert bool((ends[torch.float16, False] == 1.5).all())
    moved = {key: 1.5 - float(end.mean()) for key, end in ends.items()}
    assert moved[torch.float16, True] == pytest.approx(moved[torch.float32, False], rel=0.1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adam", {"gradient_clipping": True}, "fused adam does not have gradient_clipping: it takes beta1, beta2, eps"),
        ("lamb", {"use_rowwise_bias_correction": True}, "fused lamb does not have use_rowwise_bias_correction"),
        ("sgd", {"stochastic_rounding": True, "weight_decay": 0.1}, "fused sgd with weight_decay is run by FBGEMM"),
        ("adam", {"beta2": 1.0}, "beta2=1.0 must be from 0 to below 1"),
        ("adam", {"eps": -1.0}, "eps=-1.0 must not be negative"),
    ],
)
def test_options_that_there_are_not(kind: FusedKind, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedOptimizerSpec(kind=kind, options=options)


@pytest.mark.parametrize(
    ("optimizer", "options", "kind", "translated"),
    [
        (torch.optim.Adam, {}, "adam", {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0}),
        (torch.optim.Adam, {"betas": (0.5, 0.6), "fused": True}, "adam", {"beta1": 0.5, "beta2": 0.6}),
        (torch.optim.AdamW, {"lr": 0.1}, "adam", {"learning_rate": 0.1, "weight_decay": 0.01}),
        (torchrec_optim.Adam, {"lr": 0.1, "beta1": 0.5}, "adam", {"learning_rate": 0.1, "beta1": 0.5}),
        (torchrec_optim.LAMB, {"lr": 0.1, "weight_decay": 0.2}, "lamb", {"learning_rate": 0.1, "weight_decay": 0.2}),
        (torchrec_optim.PartialRowWiseAdam, {"eps": 0.1}, "partial_rowwise_adam", {"eps": 0.1}),
        (torchrec_optim.PartialRowWiseLAMB, {"lr": 0.3}, "partial_rowwise_lamb", {"learning_rate": 0.3}),
    ],
)
def test_optimizers_of_a_module_are_translated(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any], kind: str, translated: dict[str, float]
) -> None:
    configs = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, feature_names=["f"])]
    module = EmbeddingBagCollection(tables=configs, device=CPU)
    apply_optimizer_in_backward(optimizer, module.parameters(), options)
    host = build_host(find_hosts(nn.ModuleDict({"host": module}))[0], {}, CPU)
    assert isinstance(host, RoutedHost)
    spec = host.engine.options.optimizer
    assert spec is not None and spec.kind == kind
    assert {name: spec.options[name] for name in translated} == translated


def test_weights_of_samples_cannot_be_trained_on_the_cpu() -> None:
    engine = make_engine("adam")
    ids, offsets, weights = batch(0, weighted=True)
    assert weights is not None
    with pytest.raises(UnsupportedOptimizerError, match="rows with fused adam cannot.*Detach the weights"):
        engine(ids, offsets, weights.requires_grad_())
    rounded = make_engine("sgd", dtype=torch.float16, stochastic_rounding=True)
    with pytest.raises(UnsupportedOptimizerError, match="fused sgd and stochastic rounding cannot"):
        rounded(ids, offsets, weights)


def test_rates_by_frequency_are_refused() -> None:
    with pytest.raises(UnsupportedOptimizerError, match="'t' is trained by adam, which already divides"):
        set_rates(make_engine("adam"), 0, None, "t")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOptimizerError, match="'t' is rounded stochastically"):
        set_rates(make_engine("sgd", stochastic_rounding=True), 0, None, "t")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOptimizerError, match="fused SGD with option 'weight_decay', which only FBGEMM"):
        set_rates(make_engine("sgd", stochastic_rounding=False, weight_decay=0.1), 0, None, "t")  # type: ignore[arg-type]


def test_a_budget_pays_for_both_moments() -> None:
    table = LogicalTable(name="t", rows=100, dim=16, chunks=4)
    engine = make_engine("partial_rowwise_adam", tables=(table,), features=(0,))
    engine.move(FixedPlan([2]))
    spec = engine.options.optimizer
    assert spec is not None and (spec.per_row, spec.per_weight, spec.state_columns(8)) == (1, 1, 9)
    assert table_memory(engine, 0).optimizer_state == 100 * 4 * 9


def test_sharded_rows_have_both_moments(tmp_path: Path) -> None:
    """In training, and through checkpoints."""
    run_processes(2, "tests.engine.sharded.optimizer_worker", str(tmp_path))
