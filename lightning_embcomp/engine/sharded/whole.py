"""State of unsharded tables, read the way parts of distributed checkpoints are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_embcomp.checkpoints.slices import Slices, as_slices
from lightning_embcomp.engine import planes
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.sharded.storage import PREFIX, Reader
from lightning_embcomp.engine.state import LAYOUTS


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


def whole_tables(reader: Reader) -> dict[str, Tensor]:
    """Bring the tables of a distributed checkpoint to the state dict of engines in one process.

    Of tables that were cut by columns, state per row is the mean over the parts.

    Args:
        reader: The checkpoint.

    Returns:
        Entries of the module's state dict.

    Example:
        >>> from lightning_embcomp.engine.sharded.storage import PREFIX
        >>> whole_tables(WholeReader({f"{PREFIX}bags/engine.steps": torch.tensor([3, 0])}, []))
        {'bags.engine.steps': tensor([3, 0])}
    """
    found: dict[str, Tensor] = {}
    for name in sorted(name for name in reader.keys() if name.startswith(PREFIX)):  # noqa: SIM118 - not a mapping
        tensor = torch.empty(reader.shape(name), dtype=reader.dtype(name))
        reader.read_into({name: tensor})
        path, _, key = name.removeprefix(PREFIX).rpartition("/")
        kind = key.rpartition(".")[2]
        if kind == "row_codes":
            shape = torch.empty(5, dtype=torch.int64)
            reader.read_into({name.removesuffix("row_codes") + "shape": shape})
            codes = shape[3] + 1 if LAYOUTS[int(shape[4])] == "prefix" else 2 ** shape[3]
            key, tensor = key.removesuffix("row_codes") + "codes", planes.encode(tensor, (int(codes) - 1).bit_length())
        elif kind == "gain" and tensor.dim() == 2:
            tensor = tensor.sum(0)
        elif ".rows." in key and kind != "weight":
            # One value per row, or per weight; of cut tables one per row and chunk.
            weight = reader.shape(name.removesuffix(kind) + "weight")
            tensor = tensor.mean(1) if tensor.dim() == 2 and tensor.shape != weight else tensor
        found[f"{path}.{key}" if path else key] = tensor
    return found
