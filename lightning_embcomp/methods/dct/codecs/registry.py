"""The codecs of all collectives of sharded embeddings, as TorchRec's sharders take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torchrec.distributed.types import CommOp, QuantizedCommCodec, QuantizedCommCodecs, ShardingPlan

from lightning_embcomp.methods.dct.codecs.config import PooledThresholding
from lightning_embcomp.methods.dct.codecs.plan import SUMS_REASON, check_plan
from lightning_embcomp.methods.dct.codecs.quantized import IdentityCodec, QuantizedCodec, RefusingCodec
from lightning_embcomp.methods.dct.codecs.topk import KeptCodec, TopKCodec
from lightning_embcomp.methods.dct.codecs.traffic import Traffic, TrafficMeter
from lightning_embcomp.methods.dct.config import ValueType

_DTYPES: dict[ValueType, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SUMMABLE = ("fp32", "fp16", "bf16")
_NAMES = {
    CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL: "pooled",
    CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL: "sequence",
    CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER: "pooled_sum",
}


class CodecRegistry(dict[str, QuantizedCommCodecs]):
    """Codecs by the name of their collective, for ``qcomm_codecs_registry`` of a TorchRec sharder.

    Args:
        config: What to build.
    """

    def __init__(self, config: PooledThresholding) -> None:
        super().__init__()
        self.config = config
        for op in _NAMES:
            self[op.name] = _codecs(config, op)

    def check_plan(self, plan: ShardingPlan, module: nn.Module) -> None:
        """Check that the codecs can serve a sharding plan, for every batch size.

        Args:
            plan: Of all embedding modules.
            module: What was planned, before or after sharding.

        Raises:
            UnsupportedShardingError: If tables are sharded by rows (table-row-wise, grid) and a codec cannot be summed,
                or if ``row_dim`` does not divide what a process sends; with table and what to change.
        """
        check_plan(plan, module, codec=_not_summable(self.config), row_dim=self.config.row_dim)

    def traffic(self) -> dict[str, Traffic]:
        """Bytes so far by ``collective/direction``, of those that ran: for example ``pooled/forward``."""
        return traffic_of([self])

    def reset_traffic(self) -> None:
        """Count from zero."""
        for _, meter in _meters(self):
            meter.reset()

    def bytes_per_column(self) -> dict[str, tuple[float, float]]:
        """Encoded bytes per float32 column, forward and backward, by the name of the collective.

        TorchRec's planner knows whole bytes per column only, through the codecs' dtype.
        """
        return {
            name: (_bytes_per_column(pair.forward), _bytes_per_column(pair.backward)) for name, pair in self.items()
        }


def traffic_of(registries: Iterable[Mapping[str, QuantizedCommCodecs]]) -> dict[str, Traffic]:
    """Bytes so far by ``collective/direction`` of all codecs that count them, each codec once; of those that ran.

    Args:
        registries: Codecs by the name of their collective, copies of a :class:`CodecRegistry` included.
    """
    totals: dict[str, Traffic] = {}
    seen: set[int] = set()
    for registry in registries:
        for name, meter in _meters(registry):
            traffic = meter.read()
            if id(meter) not in seen and traffic.exchanges:
                totals[name] = totals.get(name, Traffic()) + traffic
            seen.add(id(meter))
    return totals


def counts_traffic(registry: Mapping[str, QuantizedCommCodecs]) -> bool:
    """Whether the codecs are of :func:`comm_codecs`."""
    return any(True for _ in _meters(registry))


def _meters(registry: Mapping[str, QuantizedCommCodecs]) -> Iterator[tuple[str, TrafficMeter]]:
    for op, name in _NAMES.items():
        for direction in ("forward", "backward"):
            meter = getattr(getattr(registry.get(op.name), direction, None), "meter", None)
            if isinstance(meter, TrafficMeter):
                yield f"{name}/{direction}", meter


def comm_codecs(config: PooledThresholding) -> CodecRegistry:
    """Build the codecs of embedding collectives.

    They serve the all-to-all of pooled embeddings (``EmbeddingBagCollection`` sharded table-wise or column-wise) and
    that of sequences (``EmbeddingCollection``, any sharding: each id's row travels whole). The reduce-scatter of
    row-wise pooled tables gets fp32, fp16 and bf16, and raises for other codecs. With one process nothing is exchanged
    or rounded.

    Args:
        config: Codec of each direction.

    Returns:
        A ``dict`` for ``qcomm_codecs_registry``, with a check of sharding plans and the count of bytes.

    Example:
        >>> codecs = comm_codecs(PooledThresholding(row_dim=64, forward_density=0.05))
        >>> codecs.bytes_per_column()["POOLED_EMBEDDINGS_ALL_TO_ALL"]
        (0.140625, 0.09375)
        >>> codecs.traffic()
        {}
    """
    return CodecRegistry(config)


def _not_summable(config: PooledThresholding) -> str | None:
    return next((codec for codec in (config.forward, config.backward) if codec not in _SUMMABLE), None)


def _codecs(config: PooledThresholding, op: CommOp) -> QuantizedCommCodecs:
    refused = _not_summable(config)
    if op == CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER and refused is not None:
        reason = SUMS_REASON.format(codec=f"what {refused!r} sends")
        return QuantizedCommCodecs(forward=RefusingCodec(reason), backward=RefusingCodec(reason))
    return QuantizedCommCodecs(
        forward=_codec(config, config.forward, config.forward_kept, config.forward_values, forward=True),
        backward=_codec(config, config.backward, config.backward_kept, config.backward_values, forward=False),
    )


def _codec(
    config: PooledThresholding, name: str, kept: int | None, values: ValueType, *, forward: bool
) -> QuantizedCommCodec:
    if name == "fp32":
        return IdentityCodec()
    if kept is None:
        return QuantizedCodec(name, config.row_dim, forward=forward)
    assert config.row_dim is not None
    if name == "kept":
        return KeptCodec(config.row_dim, kept, _DTYPES[values])
    return TopKCodec(config.row_dim, kept, _DTYPES[values], remember=forward and config.backward == "kept")


def _bytes_per_column(codec: QuantizedCommCodec) -> float:
    return float(codec.bytes_per_column)
