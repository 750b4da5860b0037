"""Served lookups: routing by runs and by codes, every width, whole and pruned rows, against NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.engine.precision import TablePrecision
from lightning_embcomp.export import ExportHost, ExportTable, build
from lightning_embcomp.export.expansion import expand
from lightning_embcomp.export.serving import ServedTables
from lightning_embcomp.kernels.dispatch import force_backend

CLOSE = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with force_backend(request.param):
        yield request.param


def table(rows: int, dim: int, seed: int = 0, **changes: Any) -> ExportTable:
    weight = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    plain = ExportTable(name=f"t{seed}", rows=rows, dim=dim, read_rows=lambda start, stop: weight[start:stop])
    return replace(plain, **changes)


def precision(rows: int, dim: int, *, mixed: bool) -> TablePrecision:
    """Groups of every width, shuffled over the rows if ``mixed``."""
    bits = torch.tensor([8, 4, 2, 0, 32, 3, 6, 1], dtype=torch.uint8)
    return TablePrecision(
        bounds=torch.linspace(0, rows, 9).long(),
        bits=bits,
        steps={b: float(torch.tensor(0.9 / 2 ** (b - 1)).half()) for b in (1, 2, 3, 4, 6, 8)},
        offset=torch.randn(dim, generator=torch.Generator().manual_seed(9)) * 0.1,
        group=torch.randint(0, 8, (rows,), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
        if mixed
        else None,
    )


def rowwise(values: np.ndarray, bits: int) -> np.ndarray:
    """FBGEMM's rounding of rows, written out: minimum in float16, scale in float16, nearest step."""
    if bits == 32:
        return values
    if bits == 16:
        return values.astype(np.float16).astype(np.float32)
    low = values.min(1, keepdims=True).astype(np.float16).astype(np.float32)
    scale = ((values.max(1, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    scale[scale == 0] = 1
    codes = np.clip(np.rint((values - low) * (np.float32(1) / scale)), 0, 2**bits - 1)
    return codes * scale + low


def wanted(source: ExportTable, bits: int) -> np.ndarray:
    """Every row of a served table, by its definition."""
    values = source.read_rows(0, source.rows).numpy()
    found = np.zeros_like(values)
    codes = np.ones(source.rows, int) if source.read_codes is None else source.read_codes(0, source.rows).numpy()
    for row in range(source.rows):
        kept = [c for first, n in source.kept[codes[row]] for c in range(first, first + n)]
        rounding = source.precision
        width = 32 if rounding is None else int(rounding.bits_of(row, row + 1))
        if not kept or width == 0:
            continue
        if rounding is None or width == 32:
            found[row, kept] = rowwise(values[row : row + 1, kept], bits)[0]
        else:
            step, shift = rounding.steps[width], rounding.offset.numpy()[kept]
            k = np.clip(np.rint((values[row, kept] - shift) / step), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
            found[row, kept] = step * k + shift
    return found


CASES: dict[str, tuple[list[ExportTable], int]] = {
    "rowwise_8": ([table(300, 64), table(5, 16, 1)], 8),
    "rowwise_4": ([table(300, 20)], 4),
    "rowwise_2": ([table(130, 36)], 2),
    "float_16": ([table(70, 12)], 16),
    "float_32": ([table(70, 24)], 32),
    "odd_dims_8": ([table(50, 7), table(50, 17, 1)], 8),
    "odd_dims_4": ([table(50, 7), table(50, 17, 1)], 4),
    "odd_dims_2": ([table(50, 7), table(50, 17, 1)], 2),
    "odd_dims_float": ([table(50, 7), table(50, 17, 1)], 16),
    "wide": ([table(40, 148)], 4),
    "single_rows": ([table(1, 4), table(1, 12, 1)], 2),
    "runs": ([table(2000, 32, precision=precision(2000, 32, mixed=False)), table(70, 16, 1)], 8),
    "codes": ([table(1000, 32, precision=precision(1000, 32, mixed=True)), table(70, 16, 1)], 4),
    "pruned": (
        [
            table(
                200,
                16,
                columns=((), ((0, 4),), ((0, 8),), ((4, 4), (12, 4)), ((0, 16),)),
                read_codes=lambda start, stop: (torch.arange(start, stop) % 5).to(torch.uint8),
            )
        ],
        4,
    ),
    "pruned_and_rounded": (
        [
            table(
                2000,
                16,
                columns=((), ((0, 8),), ((0, 16),)),
                read_codes=lambda start, stop: (torch.arange(start, stop) % 3).to(torch.uint8),
                precision=precision(2000, 16, mixed=True),
            )
        ],
        2,
    ),
    "all_dead": ([table(100, 8, columns=((), ((0, 8),)), read_codes=lambda a, b: torch.zeros(b - a).byte())], 8),
}


def served(tables: list[ExportTable], bits: int, mean: bool = False, **options: Any) -> ServedTables:
    host = ExportHost(path="", kind="bag_collection", tables=tuple(replace(t, mean=mean) for t in tables))
    return ServedTables(expand(build([host], bits, **options)), range(len(tables)))


def batch(tables: list[ExportTable], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 6, (9 * len(tables),), generator=generator)
    counts = lengths.view(len(tables), 9).sum(1).tolist()
    ids = torch.cat([torch.randint(0, t.rows, (n,), generator=generator) for t, n in zip(tables, counts, strict=True)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return ids.to(dtype), offsets.to(dtype), torch.rand(ids.numel(), generator=generator) + 0.5


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_every_row(backend: str, name: str, alignment: int) -> None:
    tables, bits = CASES[name]
    module = served(tables, bits, row_alignment=alignment)
    for t, source in enumerate(tables):
        found = module.read_rows(t, 0, source.rows).numpy()
        np.testing.assert_allclose(found, wanted(source, bits), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bags(backend: str, name: str, mean: bool, weighted: bool, dtype: torch.dtype) -> None:
    tables, bits = CASES[name]
    ids, offsets, weights = batch(tables, dtype)
    found = served(tables, bits, mean)(ids, offsets, weights if weighted else None).numpy()
    column = 0
    for t, source in enumerate(tables):
        rows = wanted(source, bits)
        for bag in range(9):
            first, last = offsets[9 * t + bag], offsets[9 * t + bag + 1]
            part = rows[ids[first:last].numpy()]
            total = (part * weights[first:last, None].numpy() if weighted else part).sum(0)
            total = total / max(1, int(last - first)) if mean else total
            np.testing.assert_allclose(found[bag, column : column + source.dim], total, rtol=1e-5, atol=1e-5)
        column += source.dim


@pytest.mark.parametrize("bad", [-1, 300])
@pytest.mark.parametrize("name", ["rowwise_8", "runs", "codes"])
def test_ids_outside_the_table(backend: str, name: str, bad: int) -> None:
    tables, bits = CASES[name]
    module = served(tables, bits)
    limit = tables[1].rows
    ids = torch.tensor([0, 1, 2, limit - 1, limit if bad > 0 else bad])
    with pytest.raises(IndexError, match=f"position 4 of the batch is outside table 't1' with {limit} rows"):
        module(ids, torch.tensor([0, 1, 3, 4, 5]))


def test_calls_that_do_not_fit() -> None:
    module = served(*CASES["rowwise_8"])
    ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match="ids must be int32 or int64"):
        module(ids.float(), offsets)
    with pytest.raises(ValueError, match="must go from 0 to 2"):
        module(ids, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="cannot be split over 2 features"):
        module(ids, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="per_sample_weights"):
        module(ids, offsets, torch.ones(3))


def test_threads_do_not_change_a_bit() -> None:
    tables = [table(5000, 32, precision=precision(5000, 32, mixed=True))]
    module = served(tables, 8)
    ids = torch.randint(0, 5000, (40_000,), generator=torch.Generator().manual_seed(0))
    offsets = torch.arange(0, 40_001, 5)
    one = module(ids, offsets)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(one, module(ids, offsets))
    finally:
        torch.set_num_threads(before)
