"""What differs between the supported releases of TorchRec and FBGEMM (:data:`lightning_embcomp.stack.KNOWN_STACKS`).

Everything else is written for the newest of them. The functions here look at what a release offers, not at its number.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

_Table = TypeVar("_Table", bound=nn.Module)


def table_over(
    table_type: type[_Table], specs: Sequence[Any], buffers: Mapping[str, Tensor], **options: object
) -> _Table:
    """Build an FBGEMM training table over tensors that exist already.

    FBGEMM 1.6 cannot be given tensors in host memory: its own, which take no memory since nobody has touched them, are
    put aside. No release can be given tensors on a GPU, where its own would take memory: they are never allocated.

    Args:
        table_type: FBGEMM's class.
        specs: Its table specifications, of one table.
        buffers: ``weights`` and the states of the optimizer by FBGEMM's names, flat, all in host memory or none.
        options: Its other arguments.

    Raises:
        ValueError: If a tensor on a GPU is not the one that FBGEMM would have allocated.
    """
    build: Any = table_type
    if any(tensor.device.type != "cpu" for tensor in buffers.values()):
        given = dict(buffers)
        build = _handing_over(table_type, given)
        on_device: _Table = build(list(specs), **options)
        given.clear()  # a class is part of a cycle, which would keep the tensors until the garbage is collected
        return on_device
    if "preallocated_host_buffers" in inspect.signature(table_type.__init__).parameters:
        built: _Table = build(list(specs), preallocated_host_buffers=dict(buffers), **options)
        return built
    table: _Table = build(list(specs), **options)
    for name, tensor in buffers.items():
        getattr(table, f"{name}_host").data = tensor
    return table


def _handing_over(table_type: type[_Table], buffers: Mapping[str, Tensor]) -> type[_Table]:
    """FBGEMM's class, which puts these tensors where it would otherwise allocate its own."""
    allocate = cast(Any, table_type)._apply_split

    def apply_split(self: nn.Module, split: Any, prefix: str, dtype: Any, **rest: Any) -> None:  # noqa: ANN401
        given = buffers.get(prefix)
        if given is None:
            allocate(self, split, prefix, dtype, **rest)
            return
        where, size = next((part, n) for part in ("dev", "uvm", "host") if (n := getattr(split, f"{part}_size")))
        if (given.numel(), given.dtype) != (size, dtype):
            raise ValueError(
                f"FBGEMM keeps {size} numbers of {dtype} in {prefix}_{where}, not {given.numel()} of {given.dtype}"
            )
        allocate(self, split._replace(dev_size=0, uvm_size=0, host_size=0), prefix, dtype, **rest)
        setattr(self, f"{prefix}_{where}", given)

    made: type[_Table] = type(table_type.__name__, (table_type,), {"_apply_split": apply_split})
    return made


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
