"""TorchRec's own codecs with counted bytes, and codecs that refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, QuantizationContext, get_qcomm_codecs
from torchrec.distributed.types import QuantizedCommCodec

from lightning_embcomp.methods.dct.codecs.plan import UnsupportedShardingError
from lightning_embcomp.methods.dct.codecs.traffic import TrafficMeter


class IdentityCodec(QuantizedCommCodec[None]):
    """Send float32 as it is.

    TorchRec's own identity has a method for ``quantized_dtype`` where its planner reads a property.

    Example:
        >>> codec = IdentityCodec()
        >>> codec.encode(torch.ones(2)), codec.quantized_dtype, codec.calc_quantized_size(2)
        (tensor([1., 1.]), torch.float32, 2)
    """

    bytes_per_column = 4.0

    def __init__(self) -> None:
        self.meter = TrafficMeter()

    @property
    def quantized_dtype(self) -> torch.dtype:
        """Of what is sent."""
        return torch.float32

    def encode(self, input_tensor: Tensor, ctx: None = None) -> Tensor:
        """Return the tensor."""
        self.meter.count(input_tensor, input_tensor)
        return input_tensor

    def decode(self, input_grad: Tensor, ctx: None = None) -> Tensor:
        """Return the tensor."""
        return input_grad

    def calc_quantized_size(self, input_len: int, ctx: None = None) -> int:
        """Return the same length."""
        return input_len

    def create_context(self) -> None:
        """Nothing to remember."""

    def padded_size(
        self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: None
    ) -> tuple[int, int]:
        """Nothing is padded."""
        return (input_tensor.shape[0] if input_tensor.dim() == 1 else input_tensor.shape[1]), 0


class QuantizedCodec(QuantizedCommCodec[QuantizationContext]):
    """TorchRec's codec of a precision, with its bytes counted.

    Args:
        precision: fp16, bf16 or int8.
        row_dim: int8 only: columns that share a scale and an offset.
        forward: Whether it codes embeddings rather than gradients.
    """

    def __init__(self, precision: str, row_dim: int | None, *, forward: bool) -> None:
        codecs = get_qcomm_codecs(
            QCommsConfig(forward_precision=CommType(precision), backward_precision=CommType(precision))
        )
        self._codec: Any = codecs.forward if forward else codecs.backward
        self._row_dim = row_dim if precision == "int8" else None
        self.meter = TrafficMeter()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """TorchRec reads private attributes of its codecs."""
        if name == "_codec":
            raise AttributeError(name)
        return getattr(self._codec, name)

    @property
    def quantized_dtype(self) -> torch.dtype:
        """Of what is sent."""
        dtype: torch.dtype = self._codec.quantized_dtype
        return dtype

    @property
    def bytes_per_column(self) -> float:
        """Encoded bytes per float32 column; for int8 with the scale and the offset of each row."""
        row = self._row_dim or 1
        return self.calc_quantized_size(row, self.create_context()) * self.quantized_dtype.itemsize / row

    def create_context(self) -> QuantizationContext:
        """TorchRec's context; its int8 rows would otherwise have 32 columns."""
        return QuantizationContext() if self._row_dim is None else QuantizationContext(row_dim=self._row_dim)

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """Quantise."""
        encoded: Tensor = self._codec.encode(input_tensor, ctx)
        self.meter.count(input_tensor, encoded)
        return encoded

    def decode(self, input_grad: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """Dequantise."""
        decoded: Tensor = self._codec.decode(input_grad, ctx)
        return decoded

    def calc_quantized_size(self, input_len: int, ctx: QuantizationContext | None = None) -> int:
        """Length as encoded.

        Raises:
            ValueError: If int8 does not get whole rows.
        """
        if self._row_dim is not None and input_len % self._row_dim:
            raise ValueError(
                f"{input_len} columns to or from one process are not a multiple of row_dim={self._row_dim}: give a "
                "row_dim that divides the dim of every table, or of every column shard"
            )
        return int(self._codec.calc_quantized_size(input_len, ctx))

    def padded_size(
        self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: QuantizationContext
    ) -> tuple[int, int]:
        """Nothing is padded."""
        padded: tuple[int, int] = self._codec.padded_size(input_tensor, dim_per_rank, my_rank, qcomm_ctx)
        return padded


class RefusingCodec(IdentityCodec):
    """Raise as soon as something is to be sent.

    Args:
        reason: Why, and what to do.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def encode(self, input_tensor: Tensor, ctx: None = None) -> Tensor:
        """Raise.

        Raises:
            UnsupportedShardingError: Always.
        """
        raise UnsupportedShardingError(self.reason)
