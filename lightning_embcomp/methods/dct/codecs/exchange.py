"""What both sides of one exchange remember of forward for its backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class Exchange:
    """Kept positions of one forward exchange; it lives as long as the exchange's autograd graph.

    TorchRec takes it for the context of a codec of its own and reads the two last fields.

    Args:
        sent: Positions that this process kept of what it sent, ``(M, K)``.
        received: Positions that the others kept of what arrived, ``(M', K)``.
        padded_dim_sum_per_rank: None: nothing is padded.
        row_dim: 0: no FP8 rows.
    """

    sent: Tensor | None = None
    received: Tensor | None = None
    padded_dim_sum_per_rank: list[int] | None = None
    row_dim: int = 0


def exchange_of_running_backward() -> Exchange:
    """Find the forward exchange whose backward runs in this thread.

    TorchRec hands a backward codec nothing of its forward. But its autograd function calls the codec, and keeps the
    request, and with it forward's context, until the gradients are on their way.

    Raises:
        RuntimeError: If no backward of a TorchRec exchange with top-K codecs runs.
    """
    node = torch._C._current_autograd_node()
    exchange = getattr(getattr(node, "myreq", None), "qcomm_ctx", None)
    if not isinstance(exchange, Exchange):
        raise RuntimeError(
            f"the codec 'kept' runs in the backward of a TorchRec all-to-all whose forward ran with the codec 'topk' "
            f"of the same registry, not in {type(node).__name__}; with another version of TorchRec use backward='topk'"
        )
    return exchange
