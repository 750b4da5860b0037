"""Sharded tables in distributed checkpoints, of which every process writes and reads its parts.

Under ``<host>.engine.tables.<name>.`` are, for tables however they are sharded:

* ``shape``: format version, rows, dim, chunks and layout of the whole table
* ``row_codes``: code of every row, uint8 ``(R,)``
* ``rows.<code>.<tensor>``: weights and optimizer state of the rows of that code, by rising row number. Of tables that
  are sharded by columns, state per row is held per column chunk, since every part has its own
* ``utility``, ``gain``: utilities of all rows, and their mean gain, one row per process that owns rows
* ``<method>.<tensor>``: what methods attached, per row or as a whole

Beside the tables are ``steps`` and ``rate``, as in the state dict of an engine in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_embcomp.checkpoints import COMPRESSED
from lightning_embcomp.checkpoints.slices import Slices
from lightning_embcomp.engine.attached import TableState
from lightning_embcomp.engine.host import TableShard
from lightning_embcomp.engine.layout import LANES, LogicalTable
from lightning_embcomp.engine.plan import ReadPlan
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.engine.row_class import FusedRows, Storage
from lightning_embcomp.engine.state import FORMAT_VERSION, LAYOUTS, shape_error

if TYPE_CHECKING:
    from lightning_embcomp.engine.sharded.collection import ShardedRoutedBags

PREFIX = COMPRESSED
"""Before the names of what engines save: their path and a slash follow, then the keys below."""
_SLAB = 1 << 22  # rows whose codes are read at a time


class StateError(RuntimeError):
    """A checkpoint does not fit the tables."""


class Reader(Protocol):
    """A checkpoint that every process reads on its own."""

    def keys(self) -> set[str]:
        """Names of the tensors."""

    def shape(self, name: str) -> torch.Size:
        """Shape of a whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""

    def read_into(self, targets: Mapping[str, Slices | Tensor]) -> None:
        """Fill the parts of tensors that a process holds, in place."""


@dataclass(frozen=True)
class _Place:
    """Where the rows of a shard lie in the tensors of a checkpoint.

    Args:
        shard: The shard.
        table: The whole table.
        before: Rows of each code of the whole table in earlier shards.
        total: Rows of each code of the whole table.
        cut: Whether state per row is held per column chunk.
    """

    shard: TableShard
    table: LogicalTable
    before: Sequence[int]
    total: Sequence[int]
    cut: bool

    @property
    def granule(self) -> int:
        """Columns that share a value of state per row: a chunk, or the least that a part has where rows are uncut."""
        return self.table.chunk_width if self.table.chunks > 1 else LANES

    def codes(self) -> Iterator[tuple[int, int]]:
        """Codes of the shard that store columns of it, and those of the whole table that they stand for."""
        first = self.shard.logical.first_chunk
        for code in range(1, self.shard.logical.codes):
            yield code, code + first

    def stored(self, code: int) -> list[tuple[str, Storage, Tensor]]:
        """Name and storage of each tensor of the rows of a code, and the rows themselves as a view."""
        engine, index = self.shard.engine, self.shard.index
        row_class = engine.class_map.class_of_code[index][code]
        first, last = engine.class_span(index, row_class)
        storages = engine.classes[row_class].storages()
        return [(name, storage, storage.tensor[first:last]) for name, storage in storages.items()]

    def columns(self, code: int) -> tuple[int, int]:
        """First of the shard's columns among those that the whole table stores, and how many it stores."""
        part = self.shard.logical
        first = 0 if part.shard is None else part.shard.first_column
        return first, len(part.live_chunks(code)) * part.chunk_width

    def width(self, whole_code: int) -> int:
        """Columns that the whole table stores of a code."""
        return len(self.table.live_chunks(whole_code)) * self.table.chunk_width

    def slices(self, storage: Storage, rows: Tensor, code: int, whole_code: int) -> Slices:
        """The rows of a code as parts of a global tensor; state per row of cut tables comes once per chunk."""
        total, before = self.total[whole_code], self.before[whole_code]
        first, width = self.columns(code)
        if not storage.rowwise:
            return Slices((total, self.width(whole_code)), [((before, first), rows)], dtype=rows.dtype)
        if not self.cut:
            return Slices((total,), [((before,), rows)], dtype=rows.dtype)
        chunk = self.granule
        per_chunk = rows.unsqueeze(1).repeat(1, width // chunk)
        chunks = self.width(whole_code) // chunk
        return Slices((total, chunks), [((before, first // chunk), per_chunk)], dtype=rows.dtype)


def distributed_state(host: ShardedRoutedBags) -> dict[str, Slices | Tensor]:
    """State of the tables for a distributed checkpoint: of every process its parts.

    All processes call it together. Tensors are views of live storage where they can be.

    Args:
        host: The collection.
    """
    totals, before = _row_counts(host)
    found: dict[str, Slices | Tensor] = {}
    for t, table in enumerate(host.logical_tables):
        key = f"engine.tables.{table.name}."
        layout = LAYOUTS.index(table.layout)
        found[key + "shape"] = torch.tensor([FORMAT_VERSION, table.rows, table.dim, table.chunks, layout])
        owners = host.row_owners(t)
        pieces: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for shard in host.shards(t):
            place = _Place(shard, table, before[t].tolist(), totals[t].tolist(), host.is_cut_by_columns(t))
            for code, whole_code in place.codes():
                for name, storage, rows in place.stored(code):
                    part = place.slices(storage, rows, code, whole_code)
                    sizes[f"rows.{whole_code}.{name}"] = tuple(part.shape), rows.dtype
                    pieces.setdefault(f"rows.{whole_code}.{name}", []).extend(part.pieces)
            for name, value, offset, rest in _row_state(shard, owners, host.group.rank):
                sizes[name] = rest, value.dtype
                pieces.setdefault(name, []).append((offset, value))
            found.update((key + name, value.clone()) for name, value in _table_state(shard))
        for name, (size, dtype) in sizes.items():
            found[key + name] = Slices(size, pieces[name], dtype=dtype)
    for engine in host.engines:
        steps = max((rows.step for rows in engine.classes if isinstance(rows, FusedRows)), default=0)
        observed = 0 if engine.utility is None else engine.utility.step
        found["engine.steps"] = torch.tensor([steps, observed])
        found["engine.rate"] = torch.tensor([host.learning_rate], dtype=torch.float64)
    return found


def load_distributed_state(host: ShardedRoutedBags, prefix: str, reader: Reader) -> None:
    """Bring the parts of this process to a saved state, however the tables were sharded when they were saved.

    Reads plain tables (``embedding_bags.<name>.weight``) as well, live rows only.

    Args:
        host: The collection.
        prefix: Path of the collection in the checkpoint, with a dot at its end.
        reader: The checkpoint.

    Raises:
        StateError: If the checkpoint does not fit; nothing is changed then.
    """
    keys = {key[len(prefix) :] for key in reader.keys() if key.startswith(prefix)}  # noqa: SIM118 - not a mapping
    plain = {f"embedding_bags.{table.name}.weight" for table in host.logical_tables}
    if plain <= keys:
        for t, table in enumerate(host.logical_tables):
            _load_plain(host, t, f"{prefix}embedding_bags.{table.name}.weight", reader)
        return
    expected = set(_expected(host, keys))
    if missing := sorted(expected - keys):
        raise StateError(f"the checkpoint lacks {prefix}{missing[0]}: use the callbacks of the saved run")
    unknown = sorted(key for key in keys - expected if key.startswith("engine."))
    if unknown:
        raise StateError(f"nothing is known about {prefix}{unknown[0]}: use the callbacks of the saved run")
    engine_key = prefix + "engine."
    for table in host.logical_tables:
        if message := shape_error(table, _read(reader, f"{engine_key}tables.{table.name}.shape")):
            raise StateError(message)
    codes = {
        (id(shard.engine), shard.index): _ShardCodes(reader, f"{engine_key}tables.{table.name}.", table, shard)
        for t, table in enumerate(host.logical_tables)
        for shard in host.shards(t)
    }
    attached = _read_attached(host, engine_key, keys, reader)
    for state, index, saved in attached:
        state.prepare(index, saved)
    for engine in host.engines:
        engine.move(ReadPlan(lambda t, a, b, engine=engine: codes[id(engine), t].local[a:b]))  # type: ignore[misc]
    for t, table in enumerate(host.logical_tables):
        for shard in host.shards(t):
            counts = codes[id(shard.engine), shard.index]
            place = _Place(shard, table, counts.before, counts.total, host.is_cut_by_columns(t))
            _load_rows(place, f"{engine_key}tables.{table.name}.", reader)
            _load_row_state(host, t, shard, f"{engine_key}tables.{table.name}.", reader)
    for state, index, saved in attached:
        for name, tensor in state.tensors(index).items():
            tensor.detach().copy_(saved[name])
    steps = _read(reader, engine_key + "steps").tolist()
    for engine in host.engines:
        for table_state in engine.attached.values():
            table_state.restored()
        for rows in engine.classes:
            if isinstance(rows, FusedRows):
                rows.restore_step(steps[0])
        if engine.utility is not None:
            engine.utility.step = steps[1]
    host.set_learning_rate(float(_read(reader, engine_key + "rate")))


class _ShardCodes:
    """Codes of the rows of a shard, and how many rows of each code of the whole table come before and in all."""

    def __init__(self, reader: Reader, key: str, table: LogicalTable, shard: TableShard) -> None:
        part = shard.logical
        counts = torch.zeros(256, dtype=torch.int64)
        for start in range(0, shard.first_row, _SLAB):
            stop = min(start + _SLAB, shard.first_row)
            counts += torch.bincount(_codes(reader, key, table, start, stop), minlength=256)
        whole = _codes(reader, key, table, shard.first_row, shard.first_row + part.rows)
        if bool((whole >= table.codes).any()):
            raise StateError(f"{key}row_codes holds codes above {table.full_code}: the checkpoint is damaged")
        self.local = (whole.short() - part.first_chunk).clamp(min=0).to(torch.uint8)
        self.before = counts.tolist()
        self.total = [0] + [int(reader.shape(f"{key}rows.{code}.weight")[0]) for code in range(1, table.codes)]


def _codes(reader: Reader, key: str, table: LogicalTable, start: int, stop: int) -> Tensor:
    found = torch.empty(stop - start, dtype=torch.uint8)
    reader.read_into({key + "row_codes": Slices((table.rows,), [((start,), found)], dtype=torch.uint8)})
    return found


def _row_counts(host: ShardedRoutedBags) -> tuple[Tensor, Tensor]:
    """Rows of every code of every table: in all, and in the shards before those of this process, ``(T, codes)``."""
    most = max(table.codes for table in host.logical_tables)
    mine = torch.zeros(len(host.logical_tables), most, dtype=torch.int64)
    for t in range(len(host.logical_tables)):
        for shard in host.shards(t):
            if shard.primary:
                classes = shard.engine.class_map.class_of_code[shard.index]
                for code in range(1, shard.logical.codes):
                    mine[t, code] += shard.engine.table_rows[shard.index, classes[code]]
    by_rank = host.group.gather(mine)
    before = torch.zeros_like(mine)
    for t in range(len(host.logical_tables)):
        owners = list(host.row_owners(t))
        if host.group.rank in owners:
            before[t] = by_rank[owners[: owners.index(host.group.rank)], t].sum(0)
    return by_rank.sum(0), before


def _row_state(
    shard: TableShard, owners: Sequence[int], rank: int
) -> Iterator[tuple[str, Tensor, tuple[int, ...], tuple[int, ...]]]:
    """State with one value per row that a shard speaks for: name, values, their place, size of the whole."""
    if not shard.primary:
        return
    part = shard.logical
    rows = part.rows if part.shard is None else part.shard.rows
    codes, _ = shard.engine.router.read(shard.index, 0, part.rows)
    yield "row_codes", codes, (shard.first_row,), (rows,)
    utility = shard.engine.utility
    if utility is not None:
        yield "utility", utility.of_table(shard.index), (shard.first_row, 0), (rows, utility.parts)
        yield "gain", utility.gain[shard.index : shard.index + 1], (list(owners).index(rank), 0), (len(owners), 2)
    for name, table_state in shard.engine.attached.items():
        tensors = table_state.tensors(shard.index)
        for key in sorted(table_state.row_tensors(shard.index) & set(tensors)):
            yield f"{name}.{key}", tensors[key], (shard.first_row,), (rows,)


def _table_state(shard: TableShard) -> Iterator[tuple[str, Tensor]]:
    """State of the table as a whole, which is the same in every shard."""
    for name, table_state in shard.engine.attached.items():
        for key, tensor in table_state.tensors(shard.index).items():
            if key not in table_state.row_tensors(shard.index):
                yield f"{name}.{key}", tensor.detach()


def _expected(host: ShardedRoutedBags, present: set[str]) -> Iterator[str]:
    """Keys that the parts of this process need, and those that only others need."""
    yield from ("engine.steps", "engine.rate")
    for t, table in enumerate(host.logical_tables):
        key = f"engine.tables.{table.name}."
        yield from (key + "shape", key + "row_codes")
        shards = host.shards(t)
        if not shards:
            yield from (name for name in present if name.startswith(key))
        for shard in shards:
            if shard.engine.utility is not None:
                yield from (key + "utility", key + "gain")
            for name, table_state in shard.engine.attached.items():
                first = f"{key}{name}."
                saved = {name[len(first) :] for name in present if name.startswith(first)}
                yield from (first + tensor for tensor in table_state.names(shard.index, saved))
        names = _tensor_names(host)
        for code in range(1, table.codes):
            yield from (f"{key}rows.{code}.{name}" for name in names)


def _tensor_names(host: ShardedRoutedBags) -> list[str]:
    """Weights and optimizer state, by name."""
    optimizer = host.options.optimizer
    return ["weight", *(() if optimizer is None else optimizer.state)]


def _load_rows(place: _Place, key: str, reader: Reader) -> None:
    for code, whole_code in place.codes():
        for name, storage, rows in place.stored(code):
            full = f"{key}rows.{whole_code}.{name}"
            if storage.rowwise and len(reader.shape(full)) == 2:
                _load_per_chunk(place, full, rows, code, whole_code, reader)
            elif storage.rowwise:
                before = place.before[whole_code]
                reader.read_into({full: Slices((place.total[whole_code],), [((before,), rows)], dtype=rows.dtype)})
            else:
                reader.read_into({full: place.slices(storage, rows, code, whole_code)})


def _load_per_chunk(place: _Place, key: str, rows: Tensor, code: int, whole_code: int, reader: Reader) -> None:
    """State per row that was saved by chunk: the mean over the chunks of the part."""
    shape = tuple(reader.shape(key))
    first, width = place.columns(code)
    chunk = place.granule
    per_chunk = rows.new_empty(rows.shape[0], width // chunk)
    reader.read_into({key: Slices(shape, [((place.before[whole_code], first // chunk), per_chunk)], dtype=rows.dtype)})
    same = (per_chunk == per_chunk[:, :1]).all(1)
    rows.copy_(torch.where(same, per_chunk[:, 0], per_chunk.mean(1)))


def _load_row_state(host: ShardedRoutedBags, t: int, shard: TableShard, key: str, reader: Reader) -> None:
    utility, part = shard.engine.utility, shard.logical
    if utility is None:
        return
    rows = host.logical_tables[t].rows
    values = utility.of_table(shard.index)
    reader.read_into({key + "utility": Slices((rows, utility.parts), [((shard.first_row, 0), values)])})
    saved = _read(reader, key + "gain")
    owners, mine = list(host.row_owners(t)), utility.gain[shard.index]
    if saved.shape[0] == len(owners):
        mine.copy_(saved[owners.index(host.group.rank)] if host.group.rank in owners else saved.sum(0))
    else:
        # Only the sum over the shards matters.
        mine.copy_(saved.sum(0) if part.shard is None or part.shard.first_row == 0 else torch.zeros(2))


def _read_attached(
    host: ShardedRoutedBags, prefix: str, keys: set[str], reader: Reader
) -> list[tuple[TableState, int, dict[str, Tensor]]]:
    """Read what methods attached to the parts of this process, and check it."""
    found: list[tuple[TableState, int, dict[str, Tensor]]] = []
    for t, table in enumerate(host.logical_tables):
        for shard in host.shards(t):
            for name, table_state in shard.engine.attached.items():
                first = f"engine.tables.{table.name}.{name}."
                by_row = table_state.row_tensors(shard.index)
                saved: dict[str, Tensor] = {}
                for tensor in (key[len(first) :] for key in keys if key.startswith(first)):
                    full = f"{prefix}tables.{table.name}.{name}.{tensor}"
                    saved[tensor] = _read_rows(reader, full, shard) if tensor in by_row else _read(reader, full)
                if message := table_state.misfit(shard.index, saved):
                    raise StateError(f"{first}: {message}")
                found.append((table_state, shard.index, saved))
    return found


def _read_rows(reader: Reader, key: str, shard: TableShard) -> Tensor:
    """Values of the rows of a shard, of a tensor with one value per row of the table."""
    found = torch.empty(shard.logical.rows, dtype=reader.dtype(key))
    reader.read_into({key: Slices(reader.shape(key), [((shard.first_row,), found)], dtype=found.dtype)})
    return found


def _read(reader: Reader, key: str) -> Tensor:
    """A whole tensor."""
    found = torch.empty(reader.shape(key), dtype=reader.dtype(key))
    reader.read_into({key: found})
    return found


@torch.no_grad()
def _load_plain(host: ShardedRoutedBags, t: int, key: str, reader: Reader) -> None:
    """Read the live rows of a table that was saved in full; their optimizer state starts at zero."""
    table = host.logical_tables[t]
    if tuple(reader.shape(key)) != (table.rows, table.dim):
        raise StateError(
            f"size mismatch for {key}: the checkpoint has {tuple(reader.shape(key))}, table {table.name!r} is"
            f" {(table.rows, table.dim)}"
        )
    for shard in host.shards(t):
        part = shard.logical
        column = 0 if part.shard is None else part.shard.first_column
        for start, stop in slabs(part.rows):
            rows = torch.empty(stop - start, part.dim, dtype=host.options.dtype)
            place = (shard.first_row + start, column)
            reader.read_into({key: Slices((table.rows, table.dim), [(place, rows)], dtype=rows.dtype)})
            shard.engine.load_rows(shard.index, start, rows)
        shard.engine.clear_row_state(shard.index)
