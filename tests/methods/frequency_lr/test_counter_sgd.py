"""FBGEMM's COUNTER_SGD against the same NumPy reference, alone and inside the engine."""

from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from lightning_embcomp.engine.counter_sgd import counter_sgd_fused_params, use_counter_sgd
from lightning_embcomp.engine.host import OneEngine
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec, UnsupportedOptimizerError
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions

from .reference import NumpySGD
from .test_rates import DIM, LR, ROWS, STEPS, TABLES, batch, make_engine, references, run


def fbgemm(params: dict[str, Any]) -> Any:
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=[0, 0, 1],
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu"),
        **params,
    )
    for t, weight in enumerate(table.split_embedding_weights()):
        weight.copy_(make_engine("fused").read_rows(t, 0, ROWS[t]))
    return table


@pytest.mark.parametrize("half_life", [None, 1, 7, 100])
def test_fbgemm_itself(half_life: int | None) -> None:
    table = fbgemm(counter_sgd_fused_params(LR, half_life=half_life))
    numpy = references(make_engine("fused"), {"form": "running", "half_life": half_life})
    run(table, numpy, None)
    for weight, state, reference in zip(
        table.split_embedding_weights(), table.split_optimizer_states(), numpy, strict=True
    ):
        np.testing.assert_allclose(weight.numpy(), reference.weight, rtol=1e-4, atol=1e-5)
        # FBGEMM decays a counter when its row is looked up, the reference at every step.
        seen = reference.count > 0
        assert np.array_equal(state[2].numpy() > 0, seen)
        if half_life is None:
            np.testing.assert_array_equal(state[2].numpy(), reference.count)


@pytest.mark.parametrize("half_life", [None, 7])
def test_inside_the_engine(half_life: int | None) -> None:
    engine = make_engine("fused")
    use_counter_sgd(OneEngine(engine), "t0", half_life=half_life, warmup_steps=0)
    numpy = references(engine, {"form": "running", "half_life": half_life})
    run(engine, numpy, None)
    for t, reference in enumerate(numpy):
        np.testing.assert_allclose(engine.read_rows(t, 0, ROWS[t]).numpy(), reference.weight, rtol=1e-4, atol=1e-5)
    assert sorted(engine.get_optimizer_state()[1]) == ["momentum1", "prev_iter", "row_counter"]


def test_half_precision_tables_inside_the_engine() -> None:
    spec = FusedOptimizerSpec(kind="sgd", options={"learning_rate": LR})
    engine = RoutedEmbeddings(TABLES, (0, 0, 1), options=RoutedOptions(optimizer=spec, dtype=torch.float16))
    engine.move(FixedPlan([2, 2]))
    for t, rows in enumerate(ROWS):
        engine.load_rows(t, 0, torch.full((rows, DIM), 0.5))
    use_counter_sgd(OneEngine(engine), "t0", half_life=None, warmup_steps=0)
    numpy = references(engine, {"form": "running"})
    run(engine, numpy, None)
    for t, reference in enumerate(numpy):
        found = engine.read_rows(t, 0, ROWS[t]).float().numpy()
        np.testing.assert_allclose(found, reference.weight, rtol=0.1, atol=0.1)


class NumpyAdagrad(NumpySGD):
    """Row-wise Adagrad for the first steps; counters run all the time."""

    warmup = 30

    def step(self, ids: Any, grads: np.ndarray) -> None:
        """Update with one gradient per occurrence."""
        if not hasattr(self, "moment"):
            self.moment = np.zeros(len(self.weight))
        before = self.weight.copy()
        super().step(ids, grads)
        for row in sorted(set(ids)):
            summed = sum(grads[i] for i in range(len(ids)) if ids[i] == row)
            self.moment[row] += float(np.mean(np.square(summed)))
            if self.t <= self.warmup:
                self.weight[row] = before[row] - self.lr * summed / np.sqrt(self.moment[row])


def test_warm_up_with_adagrad() -> None:
    table = fbgemm(counter_sgd_fused_params(LR, warmup_steps=NumpyAdagrad.warmup))
    numpy: list[NumpySGD] = [
        NumpyAdagrad(make_engine("fused").read_rows(t, 0, rows).numpy(), lr=LR) for t, rows in enumerate(ROWS)
    ]
    run(table, numpy, None)
    for weight, reference in zip(table.split_embedding_weights(), numpy, strict=True):
        np.testing.assert_allclose(weight.numpy(), reference.weight, rtol=1e-3, atol=1e-4)


def test_counters_inside_the_engine_are_restored_bit_for_bit() -> None:
    def steps(engine: RoutedEmbeddings, first: int, last: int) -> None:
        for step in range(first, last):
            engine(*batch(step)).sin().sum().backward()

    through, half, other = (make_engine("fused") for _ in range(3))
    for engine in (through, half, other):
        use_counter_sgd(OneEngine(engine), "t0", half_life=9, warmup_steps=10)
    steps(through, 0, STEPS)
    steps(half, 0, 30)
    saved = {key: value.clone() for key, value in half.state_dict().items()}
    other.load_state_dict(saved)
    steps(other, 30, STEPS)
    one, two = through.state_dict(), other.state_dict()
    assert any("row_counter" in key for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_weight_decay_without_a_half_life_is_refused() -> None:
    with pytest.raises(ValueError, match="half-life of -1, so that weights would grow. Set weight_decay=0"):
        counter_sgd_fused_params(LR, weight_decay=0.1)
    assert counter_sgd_fused_params(LR, weight_decay=0.1, half_life=5)["weight_decay"] == 0.1


@pytest.mark.parametrize("half_life", [0, -1, 2.5])
def test_half_lives_are_whole_and_positive(half_life: Any) -> None:
    with pytest.raises(ValueError, match="positive whole number of steps"):
        counter_sgd_fused_params(LR, half_life=half_life)


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(UnsupportedOptimizerError, match="trained from configure_optimizers"):
        use_counter_sgd(OneEngine(make_engine("trained")), "t0", half_life=None, warmup_steps=0)
    spec = FusedOptimizerSpec(kind="rowwise_adagrad")
    engine = RoutedEmbeddings(TABLES, (0, 0, 1), options=RoutedOptions(optimizer=spec))
    with pytest.raises(UnsupportedOptimizerError, match="takes the place of SGD only. Use SGD"):
        use_counter_sgd(OneEngine(engine), "t0", half_life=None, warmup_steps=0)
