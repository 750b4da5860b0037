"""What differs between the supported releases of TorchRec and FBGEMM (:data:`lightning_embcomp.stack.KNOWN_STACKS`).

Everything else is written for the newest of them. The functions here look at what a release offers, not at its number.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

_Table = TypeVar("_Table", bound=nn.Module)


def table_over(
    table_type: type[_Table], specs: Sequence[Any], buffers: Mapping[str, Tensor], **options: object
) -> _Table:
    """Build an FBGEMM training table over tensors in host memory that exist already.

    FBGEMM 1.6 cannot be given them: its own, which take no memory since nobody has touched them, are put aside.

    Args:
        table_type: FBGEMM's class.
        specs: Its table specifications.
        buffers: ``weights`` and the states of the optimizer by FBGEMM's names, flat.
        options: Its other arguments.
    """
    build: Any = table_type
    if "preallocated_host_buffers" in inspect.signature(table_type.__init__).parameters:
        built: _Table = build(list(specs), preallocated_host_buffers=dict(buffers), **options)
        return built
    table: _Table = build(list(specs), **options)
    for name, tensor in buffers.items():
        getattr(table, f"{name}_host").data = tensor
    return table


def fused_params(enumerator: object, key: str) -> Mapping[str, Any]:
    """Fused parameters that an ``EmbeddingEnumerator`` found for a module type in its last enumeration.

    Args:
        enumerator: TorchRec's enumerator.
        key: ``module_type_key`` of a sharding option.
    """
    facts: Any = getattr(enumerator, "_sharder_data_map", None)
    if facts is None:  # TorchRec 1.6 keeps the sharders themselves
        facts = enumerator._sharder_map  # type: ignore[attr-defined]
    found: Mapping[str, Any] = facts[key].fused_params or {}
    return found


def copies_leave_ddp_out(collection_type: type) -> bool:
    """Whether a subclass of TorchRec's sharded collection can keep copies of tables equal by itself.

    TorchRec 1.6 puts DDP around copies in its constructor, which fails for tables that are no parameters.

    Args:
        collection_type: ``ShardedEmbeddingBagCollection``.
    """
    return hasattr(collection_type, "init_data_parallel")
