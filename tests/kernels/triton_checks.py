"""Triton kernels against their plain twins, on any device: the interpreter's CPU, or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcomp.kernels.assemble import assemble, bag_norms, disassemble
from lightning_embcomp.kernels.count import RowCounts, count_rows, row_gains
from lightning_embcomp.kernels.dequantize import pool_served
from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.kernels.pool import pool
from lightning_embcomp.kernels.quantize import PASS, Rounding, round_rows, round_rows_backward
from lightning_embcomp.kernels.route import IdOutOfRangeError, find, list_by_class, route
from lightning_embcomp.kernels.route.watch import check as check_ids
from lightning_embcomp.kernels.threshold import kth_largest, select_large, select_packed
from lightning_embcomp.kernels.topk import place_entries, top_entries
from lightning_embcomp.kernels.types import NO_CLASS
from lightning_embcomp.kernels.update import UpdateRule, update_rows
from lightning_embcomp.kernels.utility import accumulate_utility, decay_utility

from . import triton_events, triton_updates
from .cases import CASES, Case
from .test_count import row_counts
from .test_dequantize import CASES as SERVED
from .test_dequantize import batch as served_batch
from .test_dequantize import served
from .test_utility import row_start
from .triton_runs import ALL, CHECKS, SOME, close, on, on_device, random, run, strided, twin
from .triton_runs import add as _add

__all__ = ["ALL", "CHECKS", "triton_events", "triton_updates"]


def ids_of(case: Case, dtype: torch.dtype = torch.int64) -> tuple[Any, ...]:
    return case.ids_tensor(dtype), case.offsets_tensor(dtype), case.layout(), case.router.tensors


def check_route(device: torch.device, name: str, dtype: torch.dtype) -> None:
    case = ALL[name]
    batch = ids_of(case, dtype)
    ids, *rest = on_device(device, *batch)
    ids = strided(ids)
    found, wanted = run(device, lambda: find(ids, *rest, case.classes)), twin(lambda: find(*batch, case.classes))
    close(found.row_class, wanted.row_class)
    live = wanted.row_class != NO_CLASS
    close(found.slot.cpu()[live], wanted.slot[live])
    close(
        run(device, lambda: list_by_class(ids, *rest, case.classes)), twin(lambda: list_by_class(*batch, case.classes))
    )
    close(run(device, lambda: route(ids, *rest, case.classes), waits=True), twin(lambda: route(*batch, case.classes)))


def check_bad_ids(device: torch.device) -> None:
    """The first bad id is named, by the call itself or, on a GPU, by one that comes later."""
    case = CASES["duplicates"]
    ids, *rest = on_device(device, *ids_of(case))
    at = int(case.offsets[2 * case.batch_size // 3])
    ids[at] = ids[at + 1] = 130
    ids[-1] = -5
    with force_backend("triton"), pytest.raises(IdOutOfRangeError) as caught:
        routes = find(ids, *rest, case.classes)
        assert routes.row_class[at] == NO_CLASS
        check_ids(device, wait=True)
    error = caught.value
    assert (error.position, error.feature, error.value, error.rows) == (at, 0, 130, 130)


def check_pool(device: torch.device, name: str, dtype: torch.dtype, ids: torch.dtype) -> None:
    case = ALL[name]
    routes = find(*ids_of(case), case.classes)
    tables = [table.to(dtype) for table in case.class_tables(case.full)]
    rest = (routes, case.offsets_tensor(ids), case.weights_tensor(), case.layout(), case.columns)
    wanted = twin(lambda: pool([table.float() for table in tables], *rest))
    moved, *others = on_device(device, tables, *rest)
    moved = [table.t().contiguous().t() for table in moved]
    close(run(device, lambda: pool(moved, *others)), wanted)


def check_assembly(device: torch.device, name: str, dtype: torch.dtype, parts: int = 1) -> None:
    case = ALL[name]
    batch = route(*ids_of(case), case.classes)
    pooled = [
        random(last - first, case.class_map.width(c), seed=c) if last > first else None
        for c, (first, last) in enumerate(zip(batch.bag_start[:-1], batch.bag_start[1:], strict=True))
    ]
    rest = (case.offsets_tensor(), batch, case.layout(), case.columns)
    moved = on_device(device, *rest)
    rows = [None if part is None else on(device, part.t().contiguous()).t() for part in pooled]
    close(run(device, lambda: assemble(rows, *moved)), twin(lambda: assemble(pooled, *rest)))
    grad = random(*case.layout().shape).to(dtype)
    theirs = strided(on(device, grad))
    close(run(device, lambda: disassemble(theirs, *moved)), twin(lambda: disassemble(grad.float(), *rest)))
    wanted = twin(lambda: bag_norms(grad.float(), rest[0], rest[2], parts))
    close(run(device, lambda: bag_norms(theirs, moved[0], moved[2], parts)), wanted)


def check_utility(device: torch.device, name: str, kind: str, parts: int, dtype: torch.dtype) -> None:
    """Norms that are small powers of two add up without rounding in any order, so the results are equal to the bit."""
    case = ALL[name]
    rng = np.random.default_rng(0)
    rows = sum(table.rows for table in case.tables)
    norms = torch.from_numpy(2.0 ** rng.integers(-9, 2, (len(case.offsets) - 1, parts))).float()
    weights = case.weights_tensor()
    weights = None if weights is None else torch.from_numpy(2.0 ** rng.integers(-1, 2, len(case.ids))).float()
    start = torch.from_numpy(rng.integers(0, 40, (rows, parts)) / 8).to(torch.bfloat16)
    rest = (row_start(case), case.ids_tensor(dtype), case.offsets_tensor(dtype), case.layout(), norms, weights)

    def accumulate(utility: Tensor, arguments: Sequence[Any]) -> Tensor:
        utility = utility.clone()
        accumulate_utility(utility, *arguments, kind, 7, arguments[0] + 3)  # type: ignore[arg-type]
        return utility

    theirs, moved = on(device, start), on_device(device, *rest)
    moved = [strided(part) if isinstance(part, Tensor) and part is not moved[0] else part for part in moved]
    wanted = twin(lambda: accumulate(start, rest))
    close(run(device, lambda: accumulate(theirs, moved)), wanted, rtol=0, atol=0)


def check_decay(device: torch.device) -> None:
    values = random(1500, 3).abs().to(torch.bfloat16)

    def decay(source: Tensor) -> Tensor:
        source = source.clone()
        decay_utility(source, 0.98, 2**40 + 9, 11)
        return source

    theirs = on(device, values)
    close(run(device, lambda: decay(theirs)), twin(lambda: decay(values)), rtol=0, atol=0)


def counters(case: Case, dtype: torch.dtype, device: torch.device, occurrences: bool) -> RowCounts:
    """Counters for all tables but the second, where there are several; fields of the record are on the host."""
    tables: list[Tensor | None] = [on(device, torch.arange(t.rows).remainder(250).to(dtype)) for t in case.tables]
    if len(tables) > 1:
        tables[1] = None
    counts = row_counts(tables, 7.25 if dtype == torch.uint8 else 2.0, occurrences=occurrences, seed=2**33 + 5)
    counts.gain[:] = torch.tensor([0.0 if t is None else 0.5 for t in tables])
    counts.cap[0] = 0.11
    return counts


def check_count(device: torch.device, name: str, kind: torch.dtype, occurrences: bool, dtype: torch.dtype) -> None:
    case = ALL[name]
    batch = case.ids_tensor(dtype), case.offsets_tensor(dtype), case.layout()
    ids, *rest = on_device(device, *batch)
    moved = [strided(ids), *rest]

    def count(counts: RowCounts, arguments: Sequence[Any]) -> RowCounts:
        count_rows(counts, *arguments)
        return counts

    fresh = [counters(case, kind, device, occurrences) for _ in range(2)]
    found = run(device, lambda: count(fresh.pop(), moved))
    wanted = twin(lambda: count(counters(case, kind, torch.device("cpu"), occurrences), batch))
    close(list(found.tables), list(wanted.tables), rtol=0, atol=0)
    close(run(device, lambda: row_gains(found, *moved)), twin(lambda: row_gains(wanted, *batch)))


def check_count_bad_ids(device: torch.device) -> None:
    """A GPU reports ids out of range later: until then no counter moves for them."""
    case = ALL["odd"]
    ids, offsets, layout = case.ids_tensor(I64), case.offsets_tensor(), case.layout()
    bad = [0, ids.numel() // 2]
    left = torch.ones(ids.numel(), dtype=torch.bool)
    left[bad] = False
    fewer = offsets - sum((offsets > at).long() for at in bad)
    wrong = ids.clone()
    wrong[bad] = torch.tensor([10**9, -7])
    wanted = counters(case, I32, torch.device("cpu"), True)
    twin(lambda: count_rows(wanted, ids[left], fewer, layout))
    moved = on_device(device, wrong, offsets, layout)

    def count(counts: RowCounts) -> RowCounts:
        count_rows(counts, *moved)
        return counts

    fresh = [counters(case, I32, device, True) for _ in range(2)]
    found = run(device, lambda: count(fresh.pop()))
    close(list(found.tables), list(wanted.tables), rtol=0, atol=0)


def check_update(device: torch.device, name: str, kind: str, dtype: torch.dtype, counted: bool = False) -> None:
    case = ALL[name]
    routes = find(*ids_of(case), case.classes)
    state: list[Any] = [None] * case.classes
    if kind != "sgd":
        shape = (lambda t: (t.rows,)) if kind == "rowwise_adagrad" else (lambda t: (t.rows, t.dim))
        state = case.class_tables([np.full(shape(t), 0.3) for t in case.tables])
    tables = [table.to(dtype) for table in case.class_tables(case.full)]
    grad = random(*case.layout().shape, seed=3).to(dtype)
    rules = [UpdateRule(kind=kind, learning_rate=0.1 * (c + 1), eps=1e-3) for c in range(case.classes)]  # type: ignore[arg-type]
    rest = (routes, case.offsets_tensor(), case.weights_tensor(), case.layout(), case.columns, case.ids_tensor())

    def state_on(where: torch.device) -> Any:
        counts = counters(case, torch.uint8, where, True) if counted else None
        return on(where, tables), on(where, state), counts

    def update(fresh: Any, grad: Tensor, arguments: Sequence[Any]) -> list[Any]:
        rows, states, counts = fresh
        update_rows(rows, states, rules, grad, *arguments, counts)
        return [*rows, *states, *([] if counts is None else counts.tables)]

    theirs, moved = strided(on(device, grad)), on_device(device, *rest)
    fresh = [state_on(device) for _ in range(2)]
    found = run(device, lambda: update(fresh.pop(), theirs, moved))
    wanted = twin(lambda: update(state_on(torch.device("cpu")), grad.float(), rest))
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 2e-5)
    close(found, wanted, rtol=tolerance, atol=tolerance)


def check_threshold(device: torch.device, n: int, kind: str, capacity: int) -> None:
    """Dyadic numbers: thresholds are reached exactly, whatever rounds."""
    source = np.random.default_rng(n)
    grad, residual, estimate = (torch.from_numpy(source.integers(-64, 65, n) / 32).float() for _ in range(3))
    if n > 4:
        grad[[1, n - 1]] = torch.tensor([torch.nan, -torch.inf])
    feedback = {"none": (False, False), "ec": (True, False), "ef21": (False, True), "econtrol": (True, True)}[kind]
    settings: dict[str, Any] = {"factor": 0.5, "gain": 0.25 if kind == "econtrol" else 1.0, "threshold": 0.75}

    inputs = (grad, residual if feedback[0] else None, estimate if feedback[1] else None)

    def select(fresh: list[Any], kernel: Any, **more: Any) -> Any:
        return [*kernel(*fresh, **settings, **more), fresh[1]]

    def same(found: Any, wanted: Any) -> None:
        for one, other in zip(found, wanted, strict=True):
            if other is None:
                assert one is None
            else:
                torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)

    def copy() -> list[Any]:
        return on_device(torch.device("cpu"), *inputs)

    found = run(device, lambda: select(on_device(device, *inputs), select_large), waits=True)
    same(found, twin(lambda: select(copy(), select_large)))
    fresh = [on_device(device, *inputs) for _ in range(2)]
    found = run(device, lambda: select(fresh.pop(), select_packed, capacity=capacity))
    same(found, twin(lambda: select(copy(), select_packed, capacity=capacity)))
    if n:
        sizes = on(device, estimate)
        assert run(device, lambda: kth_largest(sizes, n), waits=True) == float(estimate.min())


def check_topk(device: torch.device, width: int, kept: int) -> None:
    rows = random(37, width, seed=width)
    rows[5] = rows[5].sign()  # ties
    rows[6] = 0.0
    rows[7, 0], rows[8, -1] = torch.nan, -torch.inf
    theirs = on(device, rows.t().contiguous()).t()
    wanted = twin(lambda: top_entries(rows, kept))
    found = run(device, lambda: top_entries(theirs, kept))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)
    positions, values = (strided(on(device, part)) for part in wanted)
    placed = run(device, lambda: place_entries(positions, values, width)).cpu()
    torch.testing.assert_close(placed, twin(lambda: place_entries(*wanted, width)), rtol=0, atol=0, equal_nan=True)
    assert top_entries(rows[:0], kept)[0].shape == (0, kept)


def check_quantize(device: torch.device, n_rows: int, columns: int, dtype: torch.dtype, everything: bool) -> None:
    source = torch.Generator().manual_seed(n_rows + columns)
    shares = torch.rand(5, 6, generator=source)
    shares[1, 2:4] = 0.0
    rounding = Rounding(
        group=torch.randint(-1, 5, (n_rows,), generator=source),
        table=torch.tensor([0, 0, 1, 2, 2]),
        widths=torch.tensor([0, 1, 2, 4, 8, PASS]),
        shares=shares,
        steps=torch.rand(3, 6, generator=source) * 0.5 + 0.05,
        offset=random(3, columns) * 0.1,
    )
    values, grad = random(columns, n_rows, seed=1).to(dtype), random(n_rows, columns, seed=2).to(dtype)
    how = on(device, rounding)
    mine, theirs = on(device, values).t(), on(device, grad)
    wanted = twin(lambda: round_rows(values.t().float(), rounding))
    close(run(device, lambda: round_rows(mine, how)), wanted)
    wanted_sums = twin(lambda: round_rows_backward(grad.float(), values.t().float(), rounding, everything))
    found = run(device, lambda: round_rows_backward(theirs, mine, how, everything))
    close(found, wanted_sums, rtol=1e-4, atol=1e-4)


def check_served(
    device: torch.device, name: str, alignment: int, mean: bool, weighted: bool, dtype: torch.dtype
) -> None:
    tables, bits = SERVED[name]
    module = served(tables, bits, mean, row_alignment=alignment)
    ids, offsets, weights = served_batch(tables, dtype)
    starts = [0, *np.cumsum([9] * len(tables)).tolist()]
    columns = [0, *np.cumsum([t.dim for t in tables]).tolist()]
    layout = module._layout(starts, [0] * len(tables), columns[:-1], (9, columns[-1]))
    rest = (offsets, weights if weighted else None, layout, module.router, module.classes)
    theirs, *moved = on_device(device, ids, *rest)
    theirs = strided(theirs)
    close(run(device, lambda: pool_served(theirs, *moved)), twin(lambda: pool_served(ids, *rest)))


I32, I64, F32, F16, BF16 = torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16

_add(check_route, *[(name, dtype) for name in ALL for dtype in ((I32, I64) if name == "odd" else (I64,))])
_add(check_bad_ids, ())
_add(check_pool, *[(name, F32, I64) for name in SOME], ("odd", F16, I32), ("mixed", BF16, I32))
_add(check_assembly, *[(name, F32) for name in SOME], ("odd", F16, 4), ("mixed", BF16, 2))
_add(
    check_utility,
    *[(name, "gradient", 1, I64) for name in SOME],
    ("duplicates", "gradient", 3, I32),
    ("duplicates", "frequency", 1, I64),
    ("weighted", "peak_gradient", 2, I64),
)
_add(check_decay, ())
_add(
    check_count,
    *[(name, torch.uint8, True, I64) for name in SOME],
    ("duplicates", torch.uint8, False, I32),
    ("duplicates", I32, True, I64),
    ("duplicates", F32, True, I32),
)
_add(check_count_bad_ids, ())
_add(
    check_update,
    *[(name, "rowwise_adagrad", F32) for name in SOME],
    ("duplicates", "sgd", F32),
    ("duplicates", "sgd", F32, True),
    ("weighted", "sgd", F32, True),
    ("odd", "adagrad", F32),
    ("odd", "adagrad", F16),
    ("mixed", "sgd", BF16),
)
_add(
    check_threshold,
    (0, "ec", 2),
    (7, "none", 0),
    (2048, "ef21", 3),
    (4101, "econtrol", 100),
    (5000, "ec", 5000),
)
_add(check_topk, (1, 1), (5, 2), (64, 3), (257, 100))
_add(check_quantize, (0, 6, F32, True), (1, 1, F32, False), (37, 6, F16, True), (64, 40, BF16, True))
_add(
    check_served,
    *[(name, 1, False, True, I64) for name in SERVED],
    ("float_32", 16, True, False, I32),
    ("odd_dims_float", 16, True, False, I32),
    ("pruned_and_rounded", 16, True, False, I32),
)
