"""Packed routers and moved rows, against slots and copies worked out row by row."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import ChunkLayout, ClassMap, LogicalTable
from lightning_embcomp.engine.router import Router, words_per_block
from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.kernels.relocate import move_rows

from .cases import CPU, MIXED, Case, make_case

ROWS = (1, 63, 64, 65, 200)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("rows", ROWS)
def test_pack_then_unpack(backend: str, rows: int, chunks: int) -> None:
    table = LogicalTable(name="t", rows=rows, dim=4 * chunks, chunks=chunks)
    classes = ClassMap.of([table])
    router = Router([table], classes, CPU)
    assert router.read(0, 0, rows)[0].sum() == 0 and (router.read(0, 0, rows)[1] == -1).all()
    rng = np.random.default_rng(rows + chunks)
    for _ in range(2):  # the second time over a router that is in use
        codes = rng.integers(0, table.codes, rows).astype(np.uint8)
        next_slot = torch.full((chunks,), 7)
        wanted = np.full(rows, -1)
        for code in range(1, table.codes):
            wanted[codes == code] = 7 + np.arange((codes == code).sum())
        slots = router.write(0, 0, torch.from_numpy(codes), next_slot)
        np.testing.assert_array_equal(slots.numpy(), wanted)
        np.testing.assert_array_equal(next_slot.numpy(), 7 + np.bincount(codes, minlength=table.codes)[1:])
        read = router.read(0, 0, rows)
        np.testing.assert_array_equal(read[0].numpy(), codes)
        np.testing.assert_array_equal(read[1].numpy(), wanted)
        if rows > 64:
            part = router.read(0, 64, rows)
            np.testing.assert_array_equal(part[0].numpy(), codes[64:])
            np.testing.assert_array_equal(part[1].numpy(), wanted[64:])


def test_twins_pack_the_same_words_in_pieces() -> None:
    case = make_case()
    words = []
    for backend in ("cpu", "reference"):
        router = Router(case.tables, case.class_map, CPU)
        next_slot = torch.zeros(case.classes, dtype=torch.int64)
        with force_backend(backend):
            for t, codes in enumerate(case.codes):
                for start in range(0, len(codes), 64):
                    router.write(t, start, torch.from_numpy(codes[start : start + 64]), next_slot)
        words.append(router.tensors.words)
        for t, slots in enumerate(case.slots()):
            np.testing.assert_array_equal(router.read(t, 0, len(slots))[1].numpy(), slots)
    assert torch.equal(words[0], words[1])
    assert torch.equal(words[0], case.router.tensors.words)


def layouts() -> list[LogicalTable]:
    tables = []
    layout: ChunkLayout
    for layout in ("prefix", "chunks"):
        for chunks in range(1, 129):
            try:
                tables.append(LogicalTable(name="t", rows=6400, dim=4 * chunks, chunks=chunks, layout=layout))
            except ValueError:
                break
    return tables


@pytest.mark.parametrize("table", layouts(), ids=lambda table: f"{table.layout}-{table.chunks}")
def test_router_takes_at_most_three_bytes_per_row(table: LogicalTable) -> None:
    router = Router([table], ClassMap.of([table]), CPU)
    held = router.tensors.words.untyped_storage().nbytes()
    assert held <= 3 * table.rows
    assert router.table_bytes(0) == held


def test_many_chunk_counts_are_supported() -> None:
    counts = {layout: max(t.chunks for t in layouts() if t.layout == layout) for layout in ("prefix", "chunks")}
    assert counts["prefix"] >= 32 and counts["chunks"] >= 5


@pytest.mark.parametrize("codes", range(2, 65))
def test_a_block_holds_its_planes_and_bases(codes: int) -> None:
    words = words_per_block(codes)
    assert words * 64 >= 64 * (codes - 1).bit_length() + 32 * (codes - 1)
    assert words % 8 == 0 or 8 % words == 0  # never across two cache lines without need


def columns_of(case: Case, t: int, code: int) -> set[int]:
    return {c for first, n in case.tables[t].columns_of(code) for c in range(first, first + n)}


def storages(case: Case, values: Sequence[np.ndarray]) -> list[Tensor | None]:
    return [table if table.numel() else None for table in case.class_tables(values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_move_rows(backend: str, rowwise: bool, dtype: torch.dtype, seed: int) -> None:
    before, after = make_case(seed=seed), make_case(seed=seed + 100)
    values = [full[:, 0] if rowwise else full for full in before.full]
    # What a row must hold: the shared columns of its old values, zero in the columns that are new to it.
    wanted = []
    for t, full in enumerate(values):
        kept = np.zeros_like(full)
        for row in range(len(full)):
            shared = columns_of(before, t, before.codes[t][row]) & columns_of(after, t, after.codes[t][row])
            if rowwise:
                kept[row] = full[row] if before.codes[t][row] and after.codes[t][row] else 0
            else:
                kept[row, sorted(shared)] = full[row, sorted(shared)]
        wanted.append(kept)
    source = [None if s is None else s.to(dtype) for s in storages(before, values)]
    target = [None if s is None else torch.full_like(s.to(dtype), torch.nan) for s in storages(after, values)]
    for t, table in enumerate(MIXED):
        move_rows(
            before.router.read(t, 0, table.rows),
            after.router.read(t, 0, table.rows),
            before.router.tensors.class_of_code[t],
            before.columns,
            source,
            target,
            rowwise=rowwise,
        )
    for found, right in zip(target, storages(after, wanted), strict=True):
        assert (found is None) == (right is None)
        if found is not None and right is not None:
            assert torch.equal(found, right.to(dtype))
