"""Codecs that send few entries of every row."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.distributed.types import QuantizedCommCodec

from lightning_embcomp.kernels.topk import place_entries, position_dtype, top_entries
from lightning_embcomp.methods.dct.codecs.exchange import Exchange, exchange_of_running_backward
from lightning_embcomp.methods.dct.codecs.functional import (
    as_bytes,
    cast_values,
    from_bytes,
    pack_entries,
    unpack_entries,
)
from lightning_embcomp.methods.dct.codecs.traffic import TrafficMeter


class RowCodec(QuantizedCommCodec[Exchange]):
    """Base: float32 rows of ``row_dim`` columns in, a fixed number of bytes per row out.

    Args:
        row_dim: Columns per row.
        kept: Entries K sent per row.
        dtype: What values travel as: float32, float16 or bfloat16.
    """

    def __init__(self, row_dim: int, kept: int, dtype: torch.dtype) -> None:
        self.row_dim, self.kept, self.dtype = row_dim, kept, dtype
        self.meter = TrafficMeter()

    @property
    def row_bytes(self) -> int:
        """Encoded bytes per row."""
        raise NotImplementedError

    @property
    def quantized_dtype(self) -> torch.dtype:
        """Bytes. TorchRec's planner takes this for one byte per column; :attr:`bytes_per_column` is the true figure."""
        return torch.uint8

    @property
    def bytes_per_column(self) -> float:
        """Encoded bytes per float32 column."""
        return self.row_bytes / self.row_dim

    def calc_quantized_size(self, input_len: int, ctx: Exchange | None = None) -> int:
        """Encoded length of ``input_len`` columns; it does not depend on the data.

        Raises:
            ValueError: If they are not whole rows.
        """
        if input_len % self.row_dim:
            raise ValueError(
                f"{input_len} columns to or from one process are not a multiple of row_dim={self.row_dim}: give a "
                "row_dim that divides the dim of every table, or of every column shard"
            )
        return input_len // self.row_dim * self.row_bytes

    def padded_size(
        self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: Exchange | None
    ) -> tuple[int, int]:
        """Nothing is padded: TorchRec would not pad the backward exchange."""
        return (input_tensor.shape[0] if input_tensor.dim() == 1 else input_tensor.shape[1]), 0

    def _rows(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            raise TypeError(
                f"top-K codecs take float32 embeddings and gradients, not {tensor.dtype}: leave output_dtype of the "
                "sharded tables at its default"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "top-K codecs work in TorchRec's asynchronous collectives only: synchronous ones (torch_use_sync_"
                "collectives, as for compiled models) would lose the gradient"
            )
        self.calc_quantized_size(tensor.numel())
        return tensor.reshape(-1, self.row_dim)


class TopKCodec(RowCodec):
    """Send the K entries of largest magnitude of every row with their positions.

    NaN and infinity count as largest and arrive as they are, so that a diverged run is seen by every process. Of more
    than K such entries in a row, the left ones arrive.

    Args:
        row_dim: Columns per row.
        kept: Entries K sent per row.
        dtype: What values travel as: float32, float16 or bfloat16.
        remember: Whether the backward exchange needs the positions (:class:`KeptCodec`); they take K bytes per row,
            or twice that for rows of over 256 columns, on either side until backward has run.

    Example:
        >>> codec = TopKCodec(row_dim=4, kept=1, dtype=torch.float16)
        >>> encoded = codec.encode(torch.tensor([0.0, -3.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
        >>> encoded.numel(), codec.decode(encoded).tolist()
        (6, [0.0, -3.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, row_dim: int, kept: int, dtype: torch.dtype, remember: bool = False) -> None:
        super().__init__(row_dim, kept, dtype)
        self.remember = remember

    @property
    def row_bytes(self) -> int:
        """Encoded bytes per row."""
        return self.kept * (position_dtype(self.row_dim).itemsize + self.dtype.itemsize)

    def create_context(self) -> Exchange | None:
        """What backward will need."""
        return Exchange() if self.remember else None

    def encode(self, input_tensor: Tensor, ctx: Exchange | None = None) -> Tensor:
        """Select and pack; flat uint8."""
        positions, values = top_entries(self._rows(input_tensor), self.kept)
        if ctx is not None:
            ctx.sent = positions
        encoded = pack_entries(positions, cast_values(values, self.dtype)).view(-1)
        self.meter.count(input_tensor, encoded)
        return encoded

    def decode(self, input_grad: Tensor, ctx: Exchange | None = None) -> Tensor:
        """Put entries into rows of zeros; flat float32."""
        positions, values = unpack_entries(input_grad, self.kept, self.row_dim, self.dtype)
        if ctx is not None:
            ctx.received = positions
        return place_entries(positions, values, self.row_dim).view(-1)


class KeptCodec(RowCodec):
    """Send the gradients of the entries that forward's :class:`TopKCodec` kept; both sides know where they belong.

    Other entries arrived as zero whatever their value was, so their gradient is none of forward's and is not sent, NaN
    included.

    Args:
        row_dim: Columns per row, as in forward.
        kept: Entries K sent per row, as in forward.
        dtype: What values travel as: float32, float16 or bfloat16.
    """

    @property
    def row_bytes(self) -> int:
        """Encoded bytes per row."""
        return self.kept * self.dtype.itemsize

    def create_context(self) -> Exchange:
        """Forward's context."""
        return exchange_of_running_backward()

    def encode(self, input_tensor: Tensor, ctx: Exchange | None = None) -> Tensor:
        """Gather the gradients of what arrived; flat uint8."""
        rows = self._rows(input_tensor)
        ctx = ctx or exchange_of_running_backward()
        positions = _left_by_forward(ctx.received, rows.shape[0], "gradients to send")
        values = rows.gather(1, positions.long())
        ctx.received = None
        encoded = as_bytes(cast_values(values, self.dtype)).view(-1)
        self.meter.count(input_tensor, encoded)
        return encoded

    def decode(self, input_grad: Tensor, ctx: Exchange | None = None) -> Tensor:
        """Put the gradients where what was sent came from; flat float32."""
        values = from_bytes(input_grad.view(-1, self.row_bytes), self.dtype).float()
        ctx = ctx or exchange_of_running_backward()
        positions = _left_by_forward(ctx.sent, values.shape[0], "gradients that arrived")
        rows = place_entries(positions, values, self.row_dim)
        ctx.sent = None
        return rows.view(-1)


def _left_by_forward(positions: Tensor | None, rows: int, what: str) -> Tensor:
    """The positions, if forward left them for as many rows."""
    if positions is None or positions.shape[0] != rows:
        left = "none" if positions is None else f"those of {positions.shape[0]}"
        raise RuntimeError(f"the codec 'kept' needs positions for {rows} rows of {what}, but forward left {left}")
    return positions
