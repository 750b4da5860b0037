"""Row updates on CUDA: ids are sorted by row, and the lane of a row's first id sums the gradients and updates it once.

Sorting, not atomics: results do not depend on timing, state is read and written once per row, and an optimizer needs
the whole sum before it can act. Occurrences of a row are cut where a block of 64 sorted ids ends. A first kernel sums
the pieces of rows that go on from the block before; a second one adds the rest of each row, in the order of the
batch. So the longest chain is 64 gradients plus one sum per further 64 occurrences.

Per id: a sort, 12 bytes of source and scale written and read, and the columns of its gradient that the row stores,
read at a random place; per distinct row its weights and state read and written. The random gradients and rows bound
it for wide rows, the sort for narrow ones.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.count.encoding import STEP_FACTOR
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.count.triton import count_rows, decode, log_values
from lightning_embcomp.kernels.graphs import capturing
from lightning_embcomp.kernels.occurrences.triton import sort_slots, trace_gradients
from lightning_embcomp.kernels.transfer import on_device
from lightning_embcomp.kernels.triton import (
    TYPES,
    addresses,
    constant,
    count_at_most,
    logical_column,
    steps_for,
    stored_runs,
    widths_and_runs,
)
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.update.moments.triton import direction, round_to_half
from lightning_embcomp.kernels.update.rule import FIRST_WITH_MOMENTS, UpdateRule

_PIECE = 64
_SGD: tl.constexpr = tl.constexpr(0)
_ROWWISE: tl.constexpr = tl.constexpr(1)
_MOMENTS: tl.constexpr = tl.constexpr(FIRST_WITH_MOMENTS)


@triton.jit
def _sum_piece(total, p, key, live, keys, order, source, scale, grad, d, kept, n, piece: tl.constexpr):
    """Add the gradients of a row's ids from position ``p`` to the end of the block of sorted ids."""
    at = p[:, None] + tl.arange(0, piece)[None, :]
    same = live[:, None] & (at < (p // piece + 1)[:, None] * piece) & (at < n)
    same = same & (tl.load(keys + at, same, other=-1) == key[:, None])
    length = tl.sum(same.to(tl.int32), 1)
    for k in range(tl.max(length, 0)):
        here = k < length
        i = tl.load(order + p + k, here, other=0)
        row = tl.load(source + i, here, other=0)
        share = tl.load(scale + i, here, other=0.0)
        values = tl.load(grad + row[:, None] + d, here[:, None] & kept, other=0.0).to(tl.float32)
        total += values * share[:, None]
    return total


@triton.jit
def _sum_continued(
    partial,
    keys,
    order,
    id_class,
    source,
    scale,
    grad,
    class_width,
    first_run,
    run_column,
    run_length,
    n,
    runs,
    width,
    piece: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Sum the pieces that begin with a block of sorted ids and belong to a row of the block before."""
    t = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    p = t * piece
    key = tl.load(keys + p, p < n, other=-1)
    live = (key >= 0) & (t > 0)
    live = live & (key == tl.load(keys + p - 1, live, other=-1))
    c = tl.load(id_class + tl.load(order + p, live, other=0), live, other=0).to(tl.int64)
    s = tl.arange(0, block_columns)[None, :]
    kept = live[:, None] & (s < tl.load(class_width + c, live, other=0)[:, None])
    d = logical_column(s, c[:, None], live[:, None], first_run, run_column, run_length, runs)
    total = tl.zeros([block_rows, block_columns], tl.float32)
    total = _sum_piece(total, p, key, live, keys, order, source, scale, grad, d, kept, n, piece)
    tl.store(partial + t[:, None] * width + s, total, kept)


@triton.jit
def _counted_rate(
    rate, i, head, ids, bounds, table_of, address, encoding, gain, cap, floor, values, features, steps: tl.constexpr
):
    """Rate of rows whose table has a gain, by what their counters say; the plain one elsewhere."""
    table = tl.load(table_of + count_at_most(bounds + 1, features, i, steps), head, other=0)
    row = tl.load(ids + i, head, other=0).to(tl.int64)
    at, kind = tl.load(address + table, head, other=0), tl.load(encoding + table, head, other=0)
    count = tl.maximum(decode(at, row, kind, values, head), tl.load(floor + table, head, other=1.0))
    wanted = tl.load(gain + table, head, other=0.0)
    multiplier = (wanted / tl.sqrt(count)).to(tl.float32)
    own = head & (kind != 0) & (wanted > 0.0)
    return tl.where(own, tl.minimum(rate * multiplier, tl.load(cap + table, head, other=0.0)), rate)


@triton.jit(do_not_specialize=["seed"])
def _apply(
    tables,
    states,
    others,
    rates,
    partial,
    keys,
    order,
    id_class,
    id_slot,
    source,
    scale,
    grad,
    class_width,
    first_run,
    run_column,
    run_length,
    ids,
    bounds,
    table_of,
    address,
    encoding,
    gain,
    cap,
    floor,
    values,
    seed,
    eps,
    keep_first,
    add_first,
    keep_second,
    add_second,
    first_scale,
    second_scale,
    decay,
    n,
    features,
    runs,
    width,
    steps: tl.constexpr,
    counted: tl.constexpr,
    kind: tl.constexpr,
    rounded: tl.constexpr,
    weight: tl.constexpr,
    piece: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    key = tl.load(keys + p, p < n, other=-1)
    head = (key >= 0) & (key != tl.load(keys + p - 1, (p > 0) & (p < n), other=-1))
    i = tl.load(order + p, head, other=0)
    c = tl.load(id_class + i, head, other=0).to(tl.int64)
    slot = tl.load(id_slot + i, head, other=0).to(tl.int64)
    columns = tl.load(class_width + c, head, other=1)
    s = tl.arange(0, block_columns)[None, :]
    kept = head[:, None] & (s < columns[:, None])
    d = logical_column(s, c[:, None], head[:, None], first_run, run_column, run_length, runs)
    total = tl.zeros([block_rows, block_columns], tl.float32)
    total = _sum_piece(total, p, key, head, keys, order, source, scale, grad, d, kept, n, piece)
    t = p // piece + 1
    going = head & (t * piece < n)
    going = going & (tl.load(keys + t * piece, going, other=-1) == key)
    while tl.max(going.to(tl.int32), 0) > 0:
        total += tl.load(partial + t[:, None] * width + s, kept & going[:, None], other=0.0)
        t += 1
        going = going & (t * piece < n)
        going = going & (tl.load(keys + t * piece, going, other=-1) == key)

    row = tl.load(tables + c, head, other=0).to(tl.pointer_type(weight))
    row = (row + slot * columns)[:, None] + s
    updated = tl.load(row, kept, other=0.0).to(tl.float32)
    rate = tl.load(rates + c, head, other=0.0)
    state = tl.load(states + c, head, other=0).to(tl.pointer_type(tl.float32))
    step = rate[:, None] * total
    if kind == _SGD:
        if counted:
            own = _counted_rate(
                rate, i, head, ids, bounds, table_of, address, encoding, gain, cap, floor, values, features, steps
            )
            step = own[:, None] * total
    elif kind == _ROWWISE:
        moment = tl.load(state + slot, head, other=0.0) + tl.sum(total * total, 1) / columns.to(tl.float32)
        tl.store(state + slot, moment, head)
        step = (rate / (tl.sqrt_rn(moment) + eps))[:, None] * total
    elif kind >= _MOMENTS:
        other = tl.load(others + c, head, other=0).to(tl.pointer_type(tl.float32))
        step = rate[:, None] * direction(
            total,
            updated,
            state,
            other,
            slot,
            columns,
            s,
            head,
            kept,
            eps,
            keep_first,
            add_first,
            keep_second,
            add_second,
            first_scale,
            second_scale,
            decay,
            kind,
        )
    else:
        place = (state + slot * columns)[:, None] + s
        moments = tl.load(place, kept, other=0.0) + total * total
        tl.store(place, moments, kept)
        step = step / (tl.sqrt_rn(moments) + eps)
    updated -= step
    if rounded:
        updated = round_to_half(updated, seed, c, slot, columns, s)
    tl.store(row, updated.to(weight), kept)


def update_rows(
    tables: Sequence[Tensor],
    states: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
    grad: Tensor,
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
    logical: Tensor | None = None,
    counts: RowCounts | None = None,
    second: Sequence[Tensor | None] | None = None,
    step: int = 1,
) -> None:
    """Triton twin of :func:`lightning_embcomp.kernels.update.reference.update_rows`."""
    device, n, features = grad.device, routes.slot.numel(), layout.table.numel()
    if counts is not None:
        assert logical is not None
        count_rows(counts, logical, offsets, layout)
    if not n:
        return
    if (rules[0].has_moments or rules[0].stochastic_rounding) and capturing(device):
        raise RuntimeError(
            f"a CUDA graph would repeat the step number of fused {rules[0].kind}: capture the dense part only"
        )
    widths, runs = widths_and_runs(columns)
    grad = grad.detach().contiguous()
    source, scale = trace_gradients(offsets.contiguous(), weights, layout, grad.stride(0), n)
    keys, order = sort_slots(routes, tables)

    block_columns = max(16, triton.next_power_of_2(max(widths)))
    block_rows = max(1, 1024 // block_columns)
    pieces = triton.cdiv(n, _PIECE)
    partial = torch.empty(pieces, max(widths), device=device)
    sorted_ids = (keys, order, routes.row_class)
    gradients = (source, scale, grad)
    stored = stored_runs(columns)
    if pieces > 1:
        _sum_continued[(triton.cdiv(pieces, block_rows),)](
            partial, *sorted_ids, *gradients, *stored, n, runs, max(widths), _PIECE, block_rows, block_columns
        )
    counted = counts is not None and rules[0].kind == "sgd" and bool(counts.gain.numpy().any())
    none: tuple[Tensor, ...] = (keys,) * 9  # arguments that the kernel does not look at
    _apply[(triton.cdiv(n, block_rows),)](
        addresses(tables, device),
        addresses(states, device),
        addresses([None] * len(tables) if second is None else second, device),
        constant([rule.learning_rate for rule in rules], torch.float32, device),
        partial,
        *sorted_ids,
        routes.slot,
        *gradients,
        *stored,
        *(_counted(counts, logical, offsets, layout) if counted else none),
        _signed(step * STEP_FACTOR),
        *rules[0].numbers(step),
        n,
        features,
        runs,
        max(widths),
        steps_for(features),
        counted,
        rules[0].number,
        rules[0].stochastic_rounding and tables[0].dtype == torch.float16,
        TYPES[tables[0].dtype],
        _PIECE,
        block_rows,
        block_columns,
    )


def _signed(value: int) -> int:
    """The low 64 bits as int64."""
    return (value + 2**63) % 2**64 - 2**63


def _counted(
    counts: RowCounts | None, logical: Tensor | None, offsets: Tensor, layout: BagLayout
) -> tuple[Tensor, ...]:
    """What rates that follow counters are computed from."""
    assert counts is not None and logical is not None
    device = logical.device
    fields = (counts.address, counts.encoding, counts.gain, counts.cap, counts.floor)
    return (
        logical.contiguous(),
        offsets.index_select(0, layout.bag_start),
        layout.table,
        *(on_device(field, device) for field in fields),
        log_values(device),
    )
