r"""FBGEMM's own frequency-aware SGD, for tables that the project's kernels do not serve.

FBGEMM keeps it inside row-wise Adagrad: 12 bytes of state per row (an accumulator that only the warm-up reads, a time
stamp, a float32 counter that stops at :math:`2^{24}`). Its update is :math:`w \leftarrow w - \eta g / (\sqrt c +
\epsilon)`, where the counter c is raised once per distinct row and step, before the update.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    CounterWeightDecayMode,
    LearningRateMode,
    WeightDecayMode,
)

from lightning_embcomp.engine.optimizer import FusedOptimizerSpec, UnsupportedOptimizerError
from lightning_embcomp.engine.row_class import WEIGHT, FusedRows

if TYPE_CHECKING:
    from lightning_embcomp.engine.host import EngineHost
    from lightning_embcomp.engine.routed import RoutedEmbeddings

_FOR_EVER = -1


def counter_sgd_fused_params(
    learning_rate: float,
    *,
    half_life: int | None = None,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> dict[str, Any]:
    r"""Parameters of FBGEMM's ``COUNTER_SGD``, for TorchRec's sharders and FBGEMM's tables.

    Args:
        learning_rate: Rate :math:`\eta` before the multiplier :math:`1 / \sqrt c`.
        half_life: Steps after which a step in which a row was looked up counts half; None counts for ever.
        warmup_steps: Steps of plain row-wise Adagrad before.
        weight_decay: Decoupled weight decay, weighted by the inverse frequency; needs a half-life.
        eps: Added to the root.

    Returns:
        Keyword arguments, to be given as ``fused_params``.

    Raises:
        ValueError: If the half-life is not a positive whole number, or weight decay has none.

    Example:
        >>> params = counter_sgd_fused_params(0.1, half_life=1000)
        >>> params["optimizer"].value, params["counter_based_regularization"].counter_halflife
        ('exact_row_wise_adagrad', 1000)
    """
    if half_life is not None and (half_life < 1 or half_life != int(half_life)):
        raise ValueError(f"COUNTER_SGD takes half-lives of a positive whole number of steps, not {half_life}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, not {warmup_steps}")
    if weight_decay and half_life is None:
        raise ValueError(
            f"COUNTER_SGD without a half-life cannot be combined with weight_decay={weight_decay}: FBGEMM multiplies"
            " the decay by half-life / counter with a half-life of -1, so that weights would grow. Set weight_decay=0,"
            " or give a half-life"
        )
    return {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": learning_rate,
        "eps": eps,
        "weight_decay": weight_decay,
        "weight_decay_mode": WeightDecayMode.COUNTER,
        "counter_based_regularization": CounterBasedRegularizationDefinition(
            counter_weight_decay_mode=CounterWeightDecayMode.DECOUPLE if weight_decay else CounterWeightDecayMode.NONE,
            counter_halflife=_FOR_EVER if half_life is None else int(half_life),
            adjustment_iter=warmup_steps if warmup_steps else -1,
            learning_rate_mode=LearningRateMode.COUNTER_SGD,
        ),
    }


def use_counter_sgd(host: EngineHost, name: str, *, half_life: int | None, warmup_steps: int) -> None:
    """Let FBGEMM's ``COUNTER_SGD`` train the rows of a module that has fused SGD; does nothing the second time.

    Args:
        host: The module; all of its tables change, on every process that makes this call.
        name: Name of a table, for messages.
        half_life: As in :func:`counter_sgd_fused_params`.
        warmup_steps: As in :func:`counter_sgd_fused_params`.

    Raises:
        UnsupportedOptimizerError: If the rows have no fused optimizer, or one other than SGD.
    """
    wanted = _counter_sgd(host.options.optimizer, name, half_life, warmup_steps)
    for engine in host.engines:
        spec = engine.options.optimizer
        if spec is not None and spec.kind == "counter_sgd":
            _counter_sgd(spec, name, half_life, warmup_steps)
        else:
            _exchange(engine, wanted)
    host.use_options(replace(host.options, optimizer=wanted))


def _counter_sgd(
    spec: FusedOptimizerSpec | None, name: str, half_life: int | None, warmup_steps: int
) -> FusedOptimizerSpec:
    """The optimizer that takes the place of another one."""
    if spec is None:
        raise UnsupportedOptimizerError(
            f"table {name!r} is trained from configure_optimizers, where FBGEMM has no say: use backend='lean'"
        )
    if spec.kind not in ("sgd", "counter_sgd"):
        raise UnsupportedOptimizerError(
            f"table {name!r} is trained by fused {spec.kind}; FBGEMM's COUNTER_SGD takes the place of SGD only. Use SGD"
            " for the tables (and tune its rate anew), or leave the table out"
        )
    params = counter_sgd_fused_params(
        float(spec.options.get("learning_rate", 0.01)),
        half_life=half_life,
        warmup_steps=warmup_steps,
        weight_decay=float(spec.options.get("weight_decay", 0.0)),
    )
    del params["optimizer"]
    if spec.kind == "sgd":
        return FusedOptimizerSpec(kind="counter_sgd", options={**spec.options, **params})
    if spec.options["counter_based_regularization"] != params["counter_based_regularization"]:
        raise UnsupportedOptimizerError(f"table {name!r} has COUNTER_SGD with other settings already")
    return spec


def _exchange(engine: RoutedEmbeddings, wanted: FusedOptimizerSpec) -> None:
    for rows in engine.classes:
        assert isinstance(rows, FusedRows)
        weight = rows.storages()[WEIGHT]
        rows.optimizer = wanted
        storages = {**rows.allocate(rows.rows, rows.device), WEIGHT: weight}
        for key, storage in storages.items():
            if key != WEIGHT:
                storage.tensor.zero_()
        rows.adopt(rows.rows, storages)
