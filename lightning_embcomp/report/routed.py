"""Read the compressed tables of a checkpoint: what an engine saved, without the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import PLAIN_TABLE, ClassMap, LogicalTable
from lightning_embcomp.engine.memory import TableMemory, plain_weight_bytes
from lightning_embcomp.engine.planes import decode
from lightning_embcomp.engine.router import BLOCK, slabs, words_per_block
from lightning_embcomp.engine.row_class import WEIGHT
from lightning_embcomp.engine.state import FORMAT_VERSION, LAYOUTS
from lightning_embcomp.engine.statistics import GAIN_BYTES
from lightning_embcomp.report.account import TableReport
from lightning_embcomp.report.optimizer_states import OptimizerStates, StateSize, state_size
from lightning_embcomp.report.popularity import BitsByRank

_ENGINE = "engine"
_WORD_BYTES = 8
_RANGE_BYTES = 2  # per 64 rows, for the group of rounded rows in training; not saved


class DamagedTableError(ValueError):
    """What a checkpoint holds of a table does not fit together."""


@dataclass(frozen=True)
class SavedTable:
    """A compressed table as it was saved.

    Args:
        logical: The table as it was configured.
        rows: Per code from 1 the tensors of the rows with that code: ``weight``, and fused optimizer state.
        utility: Utilities, if they were tracked.
        attached: What methods keep of the table, by ``<method state>.<tensor>``.
    """

    logical: LogicalTable
    rows: tuple[Mapping[str, Tensor], ...]
    utility: Tensor | None
    attached: Mapping[str, Tensor] = field(default_factory=dict)

    def count(self, code: int) -> int:
        """Rows with that code."""
        return self.rows[code - 1][WEIGHT].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Weight dtype."""
        return self.rows[-1][WEIGHT].dtype


def read_engines(state: Mapping[str, Any]) -> dict[str, list[SavedTable]]:
    """Find the engines of a state dict, and check that what they saved fits together.

    Args:
        state: State dict of a module.

    Returns:
        Tables of each engine in order, by the engine's prefix in the state dict.

    Raises:
        DamagedTableError: If a table is incomplete, damaged, or of a newer format.
    """
    engines: dict[str, list[SavedTable]] = {}
    for key in state:
        parts = key.rsplit(".", 3)
        if parts[-3:-2] != ["tables"] or parts[-1] != "shape" or f"{key[: -len('shape')]}codes" not in state:
            continue
        prefix = key[: -len(f"tables.{parts[-2]}.shape")]
        engines.setdefault(prefix, []).append(_read_table(state, f"{prefix}tables.{parts[-2]}.", parts[-2]))
    return engines


def report_engine(prefix: str, tables: Sequence[SavedTable], states: OptimizerStates) -> list[TableReport]:
    """Account for the tables of one engine as it held them in training.

    Args:
        prefix: The engine's prefix in the state dict.
        tables: Its tables.
        states: Optimizer states of the checkpoint; those of this engine are taken from them.

    Returns:
        One report per table.
    """
    host = prefix.removesuffix(".").removesuffix(_ENGINE).removesuffix(".")
    class_map = ClassMap.of([table.logical for table in tables])
    by_class = [StateSize()] * len(class_map.columns)
    fused = any(len(rows) > 1 for table in tables for rows in table.rows)
    if not fused:
        by_class = _trained_state(tables, class_map, states) or by_class
    return [
        _report_table(host, table, [by_class[c] for c in class_map.class_of_code[t][1:]])
        for t, table in enumerate(tables)
    ]


def _trained_state(
    tables: Sequence[SavedTable], class_map: ClassMap, states: OptimizerStates
) -> list[StateSize] | None:
    """State per class where a row class is one parameter, which the rows of all tables share."""
    rows = [0] * len(class_map.columns)
    for t, table in enumerate(tables):
        for code in range(1, table.logical.codes):
            rows[class_map.class_of_code[t][code]] += table.count(code)
    return states.take([(n, class_map.width(c)) for c, n in enumerate(rows)])


def _report_table(host: str, table: SavedTable, trained: Sequence[StateSize]) -> TableReport:
    logical = table.logical
    weights = state = 0
    plain_state = StateSize()
    for code, saved in enumerate(table.rows, start=1):
        shape = (saved[WEIGHT].shape[0], saved[WEIGHT].shape[1])
        # An empty tensor still says whether it is one number per row or per weight.
        size = state_size([tensor for name, tensor in saved.items() if name != WEIGHT], shape) or trained[code - 1]
        weights += saved[WEIGHT].numel() * saved[WEIGHT].element_size()
        state += size.bytes(*shape)
        plain_state = max(plain_state, size, key=lambda s: (s.per_weight, s.per_row))
    memory = TableMemory(
        name="" if logical.name == PLAIN_TABLE else logical.name,
        rows=logical.rows,
        dim=logical.dim,
        weights=weights,
        optimizer_state=state,
        router=-(-logical.rows // BLOCK) * words_per_block(logical.codes) * _WORD_BYTES,
        statistics=_statistics(table),
        plain_weights=plain_weight_bytes(logical, table.dtype),
        plain_optimizer_state=plain_state.bytes(logical.rows, logical.dim),
    )
    live = [0] * logical.chunks
    for code in range(1, logical.codes):
        for chunk in logical.live_chunks(code):
            live[chunk] += table.count(code)
    return TableReport(
        host=host,
        memory=memory,
        live=tuple(count / logical.rows for count in live),
        layout=logical.layout,
        bits=_bits(table),
    )


def _statistics(table: SavedTable) -> int:
    held = [*table.attached.values()] + ([] if table.utility is None else [table.utility])
    size = sum(t.numel() * t.element_size() for t in held) + (0 if table.utility is None else GAIN_BYTES)
    by_range = "precision.bits" in table.attached and "precision.group" not in table.attached
    return size + (_RANGE_BYTES * -(-table.logical.rows // BLOCK) if by_range else 0)


def _bits(table: SavedTable) -> BitsByRank | None:
    bits, bounds = table.attached.get("precision.bits"), table.attached.get("precision.bounds")
    if bits is None or bounds is None:
        return None
    return BitsByRank.of(bits.tolist(), bounds.diff().tolist())


def _read_table(state: Mapping[str, Any], key: str, name: str) -> SavedTable:
    logical = _logical_table(state[key + "shape"], name)
    codes = _tensor(state, key + "codes")
    planes = max(1, (logical.codes - 1).bit_length())
    if codes.dtype != torch.int64 or tuple(codes.shape) != (-(-logical.rows // BLOCK), planes):
        raise DamagedTableError(f"{key}codes has shape {tuple(codes.shape)}, which {logical.rows} rows do not have")
    counts = count_codes(codes, logical)
    rows = []
    for code in range(1, logical.codes):
        prefix = f"{key}rows.{code}."
        tensors = {name[len(prefix) :]: _tensor(state, name) for name in state if name.startswith(prefix)}
        width = sum(length for _, length in logical.columns_of(code))
        weight = tensors.get(WEIGHT)
        if weight is None or tuple(weight.shape) != (counts[code], width):
            found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise DamagedTableError(f"{prefix}{WEIGHT} {found}, but the codes say {(counts[code], width)}")
        others = [tensor for name, tensor in tensors.items() if name != WEIGHT]
        if others and state_size(others, (counts[code], width)) is None:
            raise DamagedTableError(f"{prefix}* holds optimizer state of another shape than {(counts[code], width)}")
        rows.append(tensors)
    utility = _tensor(state, key + "utility") if key + "utility" in state else None
    if utility is not None and utility.shape[:1] != (logical.rows,):
        raise DamagedTableError(f"{key}utility has shape {tuple(utility.shape)}, but the table {logical.rows} rows")
    attached = {name[len(key) :]: _tensor(state, name) for name in state if _is_attached(name, key)}
    return SavedTable(logical, tuple(rows), utility, attached)


def _is_attached(name: str, key: str) -> bool:
    parts = name[len(key) :].split(".") if name.startswith(key) else []
    return len(parts) == 2 and parts[0] != "rows"


def _logical_table(shape: object, name: str) -> LogicalTable:
    numbers = shape.tolist() if isinstance(shape, Tensor) and tuple(shape.shape) == (5,) else None
    if numbers is None:
        raise DamagedTableError(f"the shape of table {name!r} is not five numbers")
    version, rows, dim, chunks, layout = (int(number) for number in numbers)
    if version > FORMAT_VERSION:
        raise DamagedTableError(
            f"table {name!r} was saved in format {version}; this version reads up to {FORMAT_VERSION}: update"
            " lightning-embcomp"
        )
    if not 0 <= layout < len(LAYOUTS):
        raise DamagedTableError(f"table {name!r} has an unknown layout {layout}")
    try:
        return LogicalTable(name=name, rows=rows, dim=dim, chunks=chunks, layout=LAYOUTS[layout])  # type: ignore[arg-type]
    except ValueError as error:
        raise DamagedTableError(str(error)) from error


def count_codes(planes: Tensor, table: LogicalTable) -> list[int]:
    """Count the rows of each code.

    Args:
        planes: Codes as bit planes, int64 ``(blocks of 64 rows, planes)``.
        table: The logical table.

    Returns:
        Rows per code.

    Raises:
        DamagedTableError: If there is a code that the table does not have.

    Example:
        >>> count_codes(torch.tensor([[0b101]]), LogicalTable(name="t", rows=3, dim=4))
        [1, 2]
    """
    counts = torch.zeros(2 ** planes.shape[1], dtype=torch.int64)
    for start, stop in slabs(table.rows):
        codes = decode(planes[start // BLOCK : -(-stop // BLOCK)], stop - start)
        counts += torch.bincount(codes, minlength=counts.numel())
    if int(counts[table.codes :].sum()):
        raise DamagedTableError(f"table {table.name!r} has codes above {table.full_code}")
    return [int(count) for count in counts[: table.codes]]


def _tensor(state: Mapping[str, Any], key: str) -> Tensor:
    value = state[key]
    if not isinstance(value, Tensor):
        raise DamagedTableError(f"{key} is no tensor")
    return value
