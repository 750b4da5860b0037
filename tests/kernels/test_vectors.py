"""Sums in registers: blocks of every width, several passes, rows that lack blocks; against sums in NumPy."""

import numpy as np
import pytest
import torch

from lightning_embcomp.kernels.pool import cpu
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.vectors import BLOCKS, block_table

ROWS = 5


def columns_of(runs: list[list[tuple[int, int]]]) -> ClassColumns:
    """Runs of (first column, columns) by class."""
    flat = [run for one in runs for run in one]
    return ClassColumns(
        width=torch.tensor([sum(n for _, n in one) for one in runs]),
        first_run=torch.tensor([0, *np.cumsum([len(one) for one in runs])]),
        column=torch.tensor([first for first, _ in flat]),
        length=torch.tensor([n for _, n in flat]),
    )


def one_feature(bags: int, width: int, *, mean: bool = False) -> BagLayout:
    zero = torch.zeros(1, dtype=torch.int64)
    start = torch.tensor([0, bags])
    own = {"table": zero, "bag_start": start, "row_start": zero, "column": zero, "mean": zero + int(mean)}
    return BagLayout(**own, width=torch.tensor([width]), shape=(bags, width))


@pytest.mark.parametrize(
    ("width", "runs", "lanes"),
    [
        (16, [[(0, 4)], [(0, 8)], [(0, 16)]], 4),
        (256, [[(0, 64)], [(0, 256)]], 32),  # two passes
        (36, [[(0, 12)], [(12, 12)], [(0, 12), (24, 12)]], 4),  # three passes, chunks in any place
        (7, [[(0, 3)], [(0, 7)]], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums(width: int, runs: list[list[tuple[int, int]]], lanes: int, dtype: torch.dtype, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    columns = columns_of(runs)
    tables = [torch.from_numpy(rng.normal(size=(ROWS, w))).to(dtype) for w in columns.width.tolist()]
    assert block_table([0] * len(runs), 4, columns, np.array([width])).lanes == lanes
    full = np.zeros((len(runs), ROWS, width))
    for c, one in enumerate(runs):
        kept = [column for first, n in one for column in range(first, first + n)]
        full[c][:, kept] = tables[c].double().numpy()
    bounds = np.array([0, 0, 1, 9, 9, 40])
    row_class = rng.choice([*range(len(runs)), NO_CLASS], 40).astype(np.uint8)
    slot = rng.integers(0, ROWS, 40).astype(np.int32)
    slot[row_class == NO_CLASS] = -123456789  # means nothing
    weights = rng.normal(size=40).astype(np.float32) if weighted else np.ones(40, np.float32)
    rows = [np.zeros(width) if c == NO_CLASS else full[c, s] for c, s in zip(row_class, slot, strict=True)]
    wanted = [
        sum((weights[i] * rows[i] for i in range(a, b)), np.zeros(width)) / max(1, b - a)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    found = cpu.pool(
        tables,
        IdRoutes(row_class=torch.from_numpy(row_class), slot=torch.from_numpy(slot)),
        torch.from_numpy(bounds),
        torch.from_numpy(weights) if weighted else None,
        one_feature(5, width, mean=True),
        columns,
    )
    np.testing.assert_allclose(found.numpy(), np.array(wanted), rtol=1e-5, atol=1e-6)


def test_classes_may_be_wider_than_all_features() -> None:
    """Those of tables that no feature looks up."""
    columns = columns_of([[(0, 8)], [(0, 64)]])
    tables = [torch.arange(8.0).view(1, 8), torch.ones(1, 64)]
    routes = IdRoutes(row_class=torch.zeros(1, dtype=torch.uint8), slot=torch.zeros(1, dtype=torch.int32))
    found = cpu.pool(tables, routes, torch.tensor([0, 1]), None, one_feature(1, 8), columns)
    assert found.tolist() == [list(range(8))]


def test_an_infinite_weight_leaves_columns_that_are_not_stored_alone() -> None:
    columns = columns_of([[(0, 4)], [(0, 8)]])
    tables = [torch.ones(1, 4), torch.ones(1, 8)]
    routes = IdRoutes(row_class=torch.tensor([0, 1], dtype=torch.uint8), slot=torch.zeros(2, dtype=torch.int32))
    weights = torch.tensor([float("inf"), 2.0])
    found = cpu.pool(tables, routes, torch.tensor([0, 2]), weights, one_feature(1, 8), columns)
    assert found.tolist() == [[float("inf")] * 4 + [2.0] * 4]


def test_blocks_say_where_columns_lie_in_a_row() -> None:
    table = block_table([64, 128], 2, columns_of([[(8, 8)], [(0, 8), (16, 8)]]), np.array([24]))
    assert table.lanes == 8
    assert table.place[:2].tolist() == [[64, 16], [128, 32]]
    assert table.blocks.shape == (NO_CLASS + 1, BLOCKS, 2)
    assert table.blocks[0, :, 1].tolist() == [0, -1, 0, 0]
    assert table.blocks[1].tolist() == [[0, -1], [0, 0], [16, -1], [0, 0]]
    assert table.place[NO_CLASS].tolist() == [table.zeros, 0]
    assert not table.blocks[NO_CLASS].any()
