"""Settings of the codecs of embedding collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_embcomp.methods.dct.config import VALUE_TYPES, ValueType

CommCodec = Literal["fp32", "fp16", "bf16", "int8", "topk"]
"""What pooled embeddings travel as."""

BackwardCodec = Literal["fp32", "fp16", "bf16", "int8", "topk", "kept"]
"""What their gradients travel as."""

_LARGEST_ROW = 2**15


@dataclass(frozen=True, kw_only=True)
class PooledThresholding:
    """Which entries of embeddings, and of their gradients, cross between processes.

    Both directions are cut into rows of ``row_dim`` consecutive columns of one sample. Of a row of N columns ``topk``
    sends the K = density · N entries of largest magnitude, as K positions (1 byte each up to 256 columns, else 2) and
    K values; the rest arrive as zero, and nothing is carried over to a later step. There is no error feedback: a
    sample's embedding does not come back.

    Args:
        forward: Codec of the embeddings: ``topk``, or for comparison ``fp32`` (as is), ``fp16``, ``bf16``, ``int8``
            (one scale and offset per row).
        backward: Codec of their gradients. ``kept`` sends the gradients of the entries that forward kept and no
            positions, since both sides know them: the exact gradient of what forward computes, up to
            ``backward_values``. ``topk`` sends the largest gradients of all, whether forward kept the entry or not;
            the others send all gradients, so that entries that forward dropped learn as if they had been sent.
        row_dim: Columns per row, at most 32768; for ``topk``, ``kept`` and ``int8``. It must divide the number of
            columns that each process sends per sample; a divisor of every table's dim always does. A longer row gives
            ``topk`` more to choose from.
        forward_density: Fraction of a row that ``forward="topk"`` sends, over 0 and at most 1.
        backward_density: The same for ``backward="topk"``.
        forward_values: Type of the values that ``forward="topk"`` sends. Finite values beyond fp16 become its largest.
        backward_values: Type of the values that ``backward="kept"`` or ``"topk"`` sends. Gradients of a mean over a
            large batch are often too small for fp16.

    Raises:
        ValueError: If a setting is missing, out of range, or has no effect.

    Example:
        >>> config = PooledThresholding(row_dim=64, forward_density=0.05)
        >>> config.forward_kept, config.backward_kept
        (3, 3)
        >>> PooledThresholding(forward="fp16", backward="bf16").forward_kept
    """

    forward: CommCodec = "topk"
    backward: BackwardCodec = "kept"
    row_dim: int | None = None
    forward_density: float | None = None
    backward_density: float | None = None
    forward_values: ValueType = "fp16"
    backward_values: ValueType = "bf16"

    def __post_init__(self) -> None:
        _check_choice("forward", self.forward, get_args(CommCodec))
        _check_choice("backward", self.backward, get_args(BackwardCodec))
        _check_choice("forward_values", self.forward_values, VALUE_TYPES)
        _check_choice("backward_values", self.backward_values, VALUE_TYPES)
        if self.backward == "kept" and self.forward != "topk":
            raise ValueError(
                f"backward='kept' sends the gradients of entries that forward='topk' kept, but forward is "
                f"{self.forward!r}: choose backward 'topk', 'fp32', 'fp16', 'bf16' or 'int8'"
            )
        uses_rows = not {self.forward, self.backward}.isdisjoint({"topk", "int8"})
        if self.row_dim is None and uses_rows:
            raise ValueError(
                "'topk' and 'int8' work on rows: give row_dim, a number of columns that divides every table's dim"
            )
        if self.row_dim is not None and not uses_rows:
            raise ValueError(f"row_dim has no effect with forward={self.forward!r} and backward={self.backward!r}")
        if self.row_dim is not None and not 1 <= self.row_dim <= _LARGEST_ROW:
            raise ValueError(f"row_dim must be from 1 to {_LARGEST_ROW}, not {self.row_dim}")
        _check_density("forward", self.forward, self.forward_density, self.row_dim)
        _check_density("backward", self.backward, self.backward_density, self.row_dim)

    @property
    def forward_kept(self) -> int | None:
        """Entries per row that forward sends; None unless it is ``topk``."""
        return _kept(self.forward_density, self.row_dim)

    @property
    def backward_kept(self) -> int | None:
        """Entries per row that backward sends; None unless it is ``topk`` or ``kept``."""
        return self.forward_kept if self.backward == "kept" else _kept(self.backward_density, self.row_dim)


def _kept(density: float | None, row_dim: int | None) -> int | None:
    """Nearest whole number of entries, halves upwards."""
    return None if density is None or row_dim is None else int(density * row_dim + 0.5)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_density(direction: str, codec: str, density: float | None, row_dim: int | None) -> None:
    name = f"{direction}_density"
    if codec != "topk":
        if density is not None:
            hint = "; 'kept' sends what forward kept" if codec == "kept" else ""
            raise ValueError(f"{name} has no effect with {direction}={codec!r}{hint}")
        return
    if density is None:
        raise ValueError(f"{direction}='topk' needs {name}, the fraction of entries to send")
    if not 0 < density <= 1:
        percent = f"; for {density} % write {density / 100}" if 1 < density <= 100 else ""
        raise ValueError(f"{name} must be over 0 and at most 1, not {density}{percent}")
    if _kept(density, row_dim) == 0:
        raise ValueError(
            f"{name}={density} of row_dim={row_dim} columns keeps no entry: give a density of at least "
            f"{0.5 / (row_dim or 1):g}, or longer rows"
        )
