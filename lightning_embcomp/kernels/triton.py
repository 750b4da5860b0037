"""What the Triton kernels share: searches, packed codes, runs of columns, and small arguments on the device.

Nothing here or in the kernels waits for the device: sizes of tensors follow from shapes, counts stay where they are.
"""
# ruff: noqa: ANN001, ANN201 - Triton has types of its own

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.graphs import capturing, keep_for_graph
from lightning_embcomp.kernels.types import BagLayout, ClassColumns

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Triton's names of the dtypes that weights may have."""


@triton.jit
def count_at_most(numbers, length, value, steps: tl.constexpr):
    """How many of ``length`` rising numbers are at most ``value``, by ``steps`` halvings of the range."""
    low = tl.zeros_like(value).to(tl.int64)
    high = low + length
    for _ in tl.static_range(steps):
        middle = (low + high) >> 1
        searching = low < high
        reached = tl.load(numbers + middle, searching, other=0) <= value
        low = tl.where(searching & reached, middle + 1, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def read_code(words, words32, block, planes, bit, live):
    """Code and slot of rows: row ``bit`` of the packed block that begins at word ``block``."""
    code = tl.zeros_like(block)
    same = code - 1
    for plane in range(tl.max(planes, 0)):
        present = live & (plane < planes)
        word = tl.load(words + block + plane, present, other=0)
        is_set = tl.where(present, (word >> bit) & 1, 0)
        code |= is_set << plane
        same = tl.where(present, same & (word ^ (is_set - 1)), same)
    base = tl.load(words32 + 2 * (block + planes) + code - 1, live & (code > 0), other=0)
    # Rows before this one with the same code; the sign bit is never among them, so shifts bring zeros in.
    earlier = same & (((tl.zeros_like(bit) + 1) << bit) - 1)
    earlier = earlier - ((earlier >> 1) & 0x5555555555555555)
    earlier = (earlier & 0x3333333333333333) + ((earlier >> 2) & 0x3333333333333333)
    earlier = (earlier + (earlier >> 4)) & 0x0F0F0F0F0F0F0F0F
    earlier += earlier >> 8
    earlier += earlier >> 16
    earlier += earlier >> 32
    return code, base + (earlier & 127)


@triton.jit
def place_of(bag, there, bag_start, row_start, column, stride, features, steps: tl.constexpr):
    """Feature of bags, and where in the output, rows of ``stride`` columns, their rows begin."""
    feature = count_at_most(bag_start + 1, features, bag, steps)
    line = bag - tl.load(bag_start + feature, there, other=0) + tl.load(row_start + feature, there, other=0)
    return feature, line * stride + tl.load(column + feature, there, other=0)


@triton.jit
def stored_column(d, row_class, live, first_run, run_column, run_length, runs):
    """Where rows of a class store logical column ``d``, -1 for nowhere; the class broadcasts against the columns."""
    run = tl.load(first_run + row_class, live, other=0)
    end = tl.load(first_run + row_class + 1, live, other=0)
    before = tl.zeros_like(run)
    found = d - d - 1 + before
    for _ in range(runs):
        low = tl.load(run_column + run, run < end, other=0)
        length = tl.load(run_length + run, run < end, other=0)
        found = tl.where((d >= low) & (d < low + length), before + d - low, found)
        before += length
        run += 1
    return found


@triton.jit
def logical_column(s, row_class, live, first_run, run_column, run_length, runs):
    """Which logical column a class stores in column ``s``; rubbish beyond its width."""
    run = tl.load(first_run + row_class, live, other=0)
    end = tl.load(first_run + row_class + 1, live, other=0)
    before = tl.zeros_like(run)
    found = s + before
    for _ in range(runs):
        low = tl.load(run_column + run, run < end, other=0)
        length = tl.load(run_length + run, run < end, other=0)
        found = tl.where((s >= before) & (s < before + length), low + s - before, found)
        before += length
        run += 1
    return found


def widths_and_runs(columns: ClassColumns) -> tuple[tuple[int, ...], int]:
    """Stored columns of each class, and the most runs that any has; read from the device once per object."""
    known = columns.__dict__.get("_widths_and_runs")
    if known is None:
        known = tuple(columns.width.tolist()), max(columns.first_run.diff().tolist(), default=0)
        columns.__dict__["_widths_and_runs"] = known
    found: tuple[tuple[int, ...], int] = known
    return found


def tile(widths: Iterable[int]) -> tuple[int, int]:
    """Rows and columns of the block of a program, powers of two: 1024 values, and no more columns than there are."""
    columns = min(128, max(16, triton.next_power_of_2(max(widths, default=16))))
    return 1024 // columns, columns


def places(layout: BagLayout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where features begin in the batch and in the output, and how wide and whether averaged they are."""
    return layout.bag_start, layout.row_start, layout.column, layout.width, layout.mean


def stored_runs(columns: ClassColumns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Width of each class, and its runs of columns."""
    return columns.width, columns.first_run, columns.column, columns.length


def steps_for(length: int) -> int:
    """Halvings that a search among so many numbers takes."""
    return max(1, length.bit_length())


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that the host knows, on the device; equal ones are copied once, from pinned memory.

    Raises:
        RuntimeError: If new numbers come up while a CUDA graph is captured, which would copy them from memory that is
            gone when the graph runs.
    """
    tensor, stream, event = _constant(tuple(values), dtype, device)
    keep_for_graph(tensor, device)
    if event is not None and not capturing(device):
        current = torch.cuda.current_stream(device)
        if current != stream:
            current.wait_event(event)
    return tensor


def addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Addresses of tensors, int64 on the device; 0 for None. The tensors must outlive the call of the kernel."""
    return constant([0 if t is None else t.data_ptr() for t in tensors], torch.int64, device)


@lru_cache(maxsize=512)
def _constant(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, torch.cuda.Stream | None, torch.cuda.Event | None]:
    made = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return made.to(device), None, None
    if capturing(device):
        raise RuntimeError("run a step of the same shapes before capturing a CUDA graph: it needs constants on the GPU")
    tensor = made.pin_memory().to(device, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return tensor, torch.cuda.current_stream(device), event
