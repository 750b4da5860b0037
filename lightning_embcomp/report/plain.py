"""Read the ordinary tables of a checkpoint: those of TorchRec's embedding collections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_embcomp.engine.memory import TableMemory
from lightning_embcomp.report.account import TableReport
from lightning_embcomp.report.optimizer_states import OptimizerStates, StateSize, state_size

FUSED_STATE_KEY = "fused_embedding_optimizer"
"""Where ``ClickModel`` puts the state of TorchRec's fused optimizers, which Lightning itself does not save."""

_COLLECTIONS = ("embedding_bags", "embeddings")


def report_plain(state: Mapping[str, Any], checkpoint: Mapping[str, Any], states: OptimizerStates) -> list[TableReport]:
    """Account for the tables of ``EmbeddingBagCollection``, ``EmbeddingCollection`` and their fused forms.

    Args:
        state: State dict of a module.
        checkpoint: The checkpoint that it is from.
        states: Optimizer states of the checkpoint; those of the tables are taken from them.

    Returns:
        One report per table; held and plain bytes are the same.
    """
    fused = checkpoint.get(FUSED_STATE_KEY)
    reports = []
    for key, weight in state.items():
        parts = key.rsplit(".", 3)
        if len(parts) < 3 or parts[-3] not in _COLLECTIONS or parts[-1] != "weight":
            continue
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        rows, dim = weight.shape
        size = _fused_state(fused, parts[-2], (rows, dim)) or (states.take([(rows, dim)]) or [StateSize()])[0]
        weights, optimizer_state = weight.numel() * weight.element_size(), size.bytes(rows, dim)
        memory = TableMemory(
            name=parts[-2],
            rows=rows,
            dim=dim,
            weights=weights,
            optimizer_state=optimizer_state,
            router=0,
            statistics=0,
            plain_weights=weights,
            plain_optimizer_state=optimizer_state,
        )
        host = key[: -len(f"{parts[-3]}.{parts[-2]}.weight")].removesuffix(".")
        reports.append(TableReport(host=host, memory=memory, live=(1.0,), layout="plain"))
    return reports


def _fused_state(fused: Any, table: str, shape: tuple[int, int]) -> StateSize | None:  # noqa: ANN401 - from a file
    if not isinstance(fused, Mapping):
        return None
    mine = [value for key, value in fused.items() if str(key).startswith(f"{table}.") and isinstance(value, Tensor)]
    return state_size(mine, shape)
