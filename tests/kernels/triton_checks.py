"""Triton kernels against their plain twins, on any device: the interpreter's CPU, or a GPU.

A check runs the twin on CPU and the kernel on the device. While a kernel runs that promises not to wait for the device,
whatever would wait raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.kernels.assemble import assemble, bag_norms, disassemble
from lightning_embcomp.kernels.count import RowCounts, count_rows
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

from .cases import CASES, ONE_ROW, Case, make_case
from .test_count import row_counts
from .test_dequantize import CASES as SERVED
from .test_dequantize import batch as served_batch
from .test_dequantize import served
from .test_utility import row_start

T = TypeVar("T")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
}


class NoWaiting(TorchDispatchMode):
    """Raises at operations that would make the host wait, were the tensors on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITS or by_mask or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **kwargs)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(device: torch.device, kernel: Callable[[], T], *, waits: bool = False) -> T:
    """Run a kernel; twice on a GPU, because the first time compiles and copies constants."""
    with force_backend("triton"):
        if waits:
            return kernel()
        if device.type == "cuda":
            kernel()
        with no_waiting(device):
            return kernel()


def twin(kernel: Callable[[], T]) -> T:
    with force_backend("reference"):
        return kernel()


def on(device: torch.device, value: Any) -> Any:
    """Copy of tensors, and of what holds tensors, on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: on(device, getattr(value, field.name)) for field in fields(value)}
        if "address" in changes and "rows" in changes:
            changes["address"] = on(
                device, torch.tensor([rows.data_ptr() for rows in changes["rows"]], dtype=torch.int64)
            )
        return replace(value, **changes)
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, entry) for entry in value)
    return value


def on_device(device: torch.device, *values: Any) -> list[Any]:
    return [on(device, value) for value in values]


def close(found: Any, wanted: Any, **tolerance: float) -> None:
    """Same tensors, wherever they are."""
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(found.detach().cpu(), wanted, **(tolerance or CLOSE))
    elif wanted is None:
        assert found is None
    elif is_dataclass(wanted):
        for field in fields(wanted):
            close(getattr(found, field.name), getattr(wanted, field.name), **tolerance)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other, **tolerance)
    else:
        assert found == wanted


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], tensor.dim())[..., 0]


ODD = make_case(
    (LogicalTable(name="w", rows=200, dim=148, chunks=1), LogicalTable(name="n", rows=90, dim=20, chunks=5)),
    (1, 0),
    (True, False),
    batch_size=17,
    weighted=True,
    seed=8,
)
"""Output wider than a block of columns, and more bags than a block of rows."""
HOT = make_case(ONE_ROW, (0,), (True,), code=1, batch_size=6, longest_bag=90, weighted=True, seed=9)
"""A row with more occurrences than two pieces of sorted ids have."""
assert len(HOT.ids) > 200
ALL = {**CASES, "odd": ODD, "hot": HOT}
SOME = ("weighted", "duplicates", "nothing_stored", "all_empty", "no_batch", "odd", "hot")


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
    moved = on_device(device, *batch)

    def count(counts: RowCounts, arguments: Sequence[Any]) -> RowCounts:
        count_rows(counts, *arguments)
        return counts

    fresh = [counters(case, kind, device, occurrences) for _ in range(2)]
    found = run(device, lambda: count(fresh.pop(), moved))
    wanted = twin(lambda: count(counters(case, kind, torch.device("cpu"), occurrences), batch))
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
CHECKS: dict[str, Callable[[torch.device], None]] = {}


def _add(check: Callable[..., None], *variants: tuple[Any, ...]) -> None:
    def bound(variant: tuple[Any, ...]) -> Callable[[torch.device], None]:
        return lambda device: check(device, *variant)

    for variant in variants:
        words = [str(word).removeprefix("torch.") for word in variant]
        CHECKS["-".join([check.__name__.removeprefix("check_"), *words])] = bound(variant)


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
