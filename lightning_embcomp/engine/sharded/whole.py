"""State of unsharded tables, read the way parts of distributed checkpoints are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_embcomp.checkpoints.slices import Slices, as_slices
from lightning_embcomp.engine import planes
from lightning_embcomp.engine.layout import LogicalTable


class WholeReader:
    """Full tensors of a state dict as a reader for sharded tables; see :class:`.storage.Reader`.

    Packed codes of an engine in one process appear as the codes of rows that sharded engines write.

    Args:
        state: State dict of the module, without prefix.
        tables: Its tables.

    Example:
        >>> reader = WholeReader({"x": torch.arange(4)}, [])
        >>> part = torch.empty(2, dtype=torch.int64)
        >>> reader.read_into({"x": Slices((4,), [((1,), part)])})
        >>> part.tolist()
        [1, 2]
    """

    def __init__(self, state: Mapping[str, Tensor], tables: Sequence[LogicalTable]) -> None:
        self._state = dict(state)
        for table in tables:
            key = f"engine.tables.{table.name}."
            if key + "codes" in self._state:
                self._state[key + "row_codes"] = planes.decode(self._state.pop(key + "codes"), table.rows)
            if key + "gain" in self._state:
                self._state[key + "gain"] = self._state[key + "gain"].view(1, 2)

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return set(self._state)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        return self._state[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._state[name].dtype

    def read_into(self, targets: Mapping[str, Slices | Tensor]) -> None:
        """Copy parts of tensors.

        Raises:
            ValueError: If a whole tensor has another shape.
        """
        for name, target in targets.items():
            wanted = as_slices(target)
            if wanted.shape != self._state[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(self._state[name].shape)} in the checkpoint, {tuple(wanted.shape)} here:"
                    " build the module as it was saved"
                )
            for offsets, piece in wanted.pieces:
                place = tuple(slice(first, first + size) for first, size in zip(offsets, piece.shape, strict=True))
                piece.copy_(self._state[name][place])
