"""Batches over logical tables, with NumPy answers to what the kernels compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import ClassMap, LogicalTable
from lightning_embcomp.engine.router import Router
from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.kernels.types import BagLayout, ClassColumns

CPU = torch.device("cpu")
MIXED = (
    LogicalTable(name="a", rows=130, dim=16, chunks=4),
    LogicalTable(name="b", rows=1, dim=8),
    LogicalTable(name="c", rows=67, dim=12, chunks=3, layout="chunks"),
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Case:
    """A batch; ``codes[t]`` is the code of every row, ``full[t]`` the full weights."""

    tables: Sequence[LogicalTable]
    feature_tables: Sequence[int]
    mean: Sequence[bool]
    codes: list[np.ndarray]
    full: list[np.ndarray]
    ids: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None
    class_map: ClassMap = field(init=False)
    router: Router = field(init=False)

    def __post_init__(self) -> None:
        self.class_map = ClassMap.of(self.tables)
        # Where rows go is itself tested in test_relocate.
        self.router = Router(self.tables, self.class_map, CPU)
        next_slot = torch.zeros(self.classes, dtype=torch.int64)
        with force_backend("reference"):
            for t, codes in enumerate(self.codes):
                self.router.write(t, 0, torch.from_numpy(codes), next_slot)

    @property
    def classes(self) -> int:
        return len(self.class_map.columns)

    @property
    def columns(self) -> ClassColumns:
        return self.class_map.tensors(CPU)

    @property
    def batch_size(self) -> int:
        return (len(self.offsets) - 1) // len(self.feature_tables)

    @property
    def dims(self) -> list[int]:
        return [self.tables[t].dim for t in self.feature_tables]

    @property
    def first_column(self) -> list[int]:
        return [sum(self.dims[:f]) for f in range(len(self.dims))]

    def layout(self) -> BagLayout:
        size, features = self.batch_size, len(self.feature_tables)
        return BagLayout(
            table=torch.tensor(self.feature_tables),
            bag_start=torch.tensor([f * size for f in range(features + 1)]),
            row_start=torch.zeros(features, dtype=torch.int64),
            column=torch.tensor(self.first_column),
            width=torch.tensor(self.dims),
            mean=torch.tensor([int(m) for m in self.mean]),
            shape=(size, sum(self.dims)),
        )

    def ids_tensor(self, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(self.ids).to(dtype)

    def offsets_tensor(self, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(self.offsets).to(dtype)

    def weights_tensor(self) -> Tensor | None:
        return None if self.weights is None else torch.from_numpy(self.weights)

    def slots(self) -> list[np.ndarray]:
        """Slot of every row: rows of a class are numbered in the order of tables and rows."""
        count = [0] * self.classes
        slots = []
        for t, codes in enumerate(self.codes):
            mine = np.full(len(codes), -1, np.int64)
            for row, code in enumerate(codes):
                if code:
                    c = self.class_map.class_of_code[t][code]
                    mine[row] = count[c]
                    count[c] += 1
            slots.append(mine)
        return slots

    def column_indices(self, row_class: int) -> np.ndarray:
        return np.concatenate([np.arange(first, first + n) for first, n in self.class_map.columns[row_class]])

    def class_tables(self, values: Sequence[np.ndarray]) -> list[Tensor]:
        """Class storage of full-width values, ``(R, D)`` per table, or ``(R,)`` for row-wise state."""
        rows: list[list[np.ndarray]] = [[] for _ in range(self.classes)]
        for t, codes in enumerate(self.codes):
            for row, code in enumerate(codes):
                if code:
                    c = self.class_map.class_of_code[t][code]
                    value = values[t][row]
                    rows[c].append(value[self.column_indices(c)] if value.ndim else value)
        rowwise = values[0].ndim == 1
        empty = [np.empty((0,) if rowwise else (0, self.class_map.width(c)), np.float32) for c in range(self.classes)]
        return [
            torch.from_numpy(np.stack(r).astype(np.float32)) if r else torch.from_numpy(empty[c])
            for c, r in enumerate(rows)
        ]

    def mask(self, t: int) -> np.ndarray:
        """Stored columns of every row of a table, float64 0/1."""
        table = self.tables[t]
        mask = np.zeros((table.rows, table.dim))
        for row, code in enumerate(self.codes[t]):
            chunks = range(code) if table.layout == "prefix" else [k for k in range(table.chunks) if code >> k & 1]
            for k in chunks:
                mask[row, k * table.chunk_width : (k + 1) * table.chunk_width] = 1
        return mask

    def occurrences(self) -> Iterator[tuple[int, int, int, int, int, float]]:
        """(position, bag, feature, table, id, factor) of every id."""
        for bag in range(len(self.offsets) - 1):
            feature = bag // self.batch_size
            first, last = self.offsets[bag], self.offsets[bag + 1]
            for i in range(first, last):
                factor = 1.0 if self.weights is None else float(self.weights[i])
                if self.mean[feature]:
                    factor /= last - first
                yield i, bag, feature, self.feature_tables[feature], int(self.ids[i]), factor

    def pooled(self) -> np.ndarray:
        """Expected output, float64."""
        out = np.zeros((self.batch_size, sum(self.dims)))
        live = [self.full[t] * self.mask(t) for t in range(len(self.tables))]
        for _, bag, f, t, row, factor in self.occurrences():
            at = self.first_column[f]
            out[bag % self.batch_size, at : at + self.dims[f]] += factor * live[t][row]
        return out

    def row_gradients(self, grad: np.ndarray) -> list[np.ndarray]:
        """Expected gradient of every row of every table, zero where nothing is stored, float64."""
        total = [np.zeros((table.rows, table.dim)) for table in self.tables]
        for _, bag, f, t, row, factor in self.occurrences():
            at = self.first_column[f]
            total[t][row] += factor * grad[bag % self.batch_size, at : at + self.dims[f]]
        return [g * self.mask(t) for t, g in enumerate(total)]


def make_case(
    tables: Sequence[LogicalTable] = MIXED,
    feature_tables: Sequence[int] = (0, 1, 2, 0),
    mean: Sequence[bool] = (False, False, True, True),
    *,
    batch_size: int = 5,
    longest_bag: int = 6,
    weighted: bool = False,
    code: int | None = None,
    seed: int = 0,
) -> Case:
    """Random batch with duplicates and empty bags; ``code`` gives every row that code instead of a random one."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest_bag + 1, batch_size * len(feature_tables))
    ids = [
        rng.integers(0, tables[feature_tables[bag // batch_size]].rows, length) for bag, length in enumerate(lengths)
    ]
    total = int(lengths.sum())
    return Case(
        tables=tables,
        feature_tables=feature_tables,
        mean=mean,
        codes=[
            rng.integers(0, t.codes, t.rows).astype(np.uint8) if code is None else np.full(t.rows, code, np.uint8)
            for t in tables
        ],
        full=[rng.standard_normal((t.rows, t.dim)).astype(np.float32) for t in tables],
        ids=np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int64),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        weights=rng.uniform(-1, 2, total).astype(np.float32) if weighted else None,
    )


ONE_ROW = (LogicalTable(name="one", rows=1, dim=8, chunks=2),)
CASES = {
    "mixed": make_case(),
    "weighted": make_case(weighted=True, seed=1),
    "duplicates": make_case(longest_bag=40, seed=2),
    "one_row": make_case(ONE_ROW, (0,), (False,), code=1, seed=3),
    "all_empty": make_case(longest_bag=0),
    "no_batch": make_case(batch_size=0),
    "nothing_stored": make_case(ONE_ROW, (0,), (True,), code=0),
    "whole_blocks": make_case((LogicalTable(name="t", rows=128, dim=4),), (0,), (False,), code=1, seed=4),
}
LARGE = make_case(batch_size=3000, longest_bag=8, seed=5)
"""Enough bags and ids for several threads."""
