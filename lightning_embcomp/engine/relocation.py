"""Bring the rows of an engine to new codes: count, allocate, stream, adopt.

What a move holds at its peak, beside slabs of 131072 rows:

* on the CPU the larger of the old and the new rows: pages of old storage go back as soon as nothing needs them
* on a GPU, rows in its memory: there the larger of the old and the new rows; in host memory the new rows, which wait
  until the old ones are gone
* on a GPU, rows in unified memory: nothing there; in host memory, where the rows are anyway, the larger of the old and
  the new rows and once more the largest class, since unified memory is given back by whole tensors only: class by class
  the rows change to ordinary memory, are moved as on the CPU, and change back
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_embcomp.engine.devices import tensors_on
from lightning_embcomp.engine.optimizer_state import attach, detach
from lightning_embcomp.engine.pages import release_prefix
from lightning_embcomp.engine.plan import MoveSummary, RowPlan
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.engine.row_class import Storage, TrainedRows, carried
from lightning_embcomp.kernels.relocate import move_rows
from lightning_embcomp.kernels.types import ClassColumns

_HOST = torch.device("cpu")

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings


def relocate(engine: RoutedEmbeddings, plan: RowPlan, optimizers: Sequence[torch.optim.Optimizer]) -> MoveSummary:
    """Carry :meth:`lightning_embcomp.engine.routed.RoutedEmbeddings.move` out.

    The plan is read twice: once to know the sizes, once to move. Everything that can be refused is refused before the
    first row moves.
    """
    trained = [rows for rows in engine.classes if isinstance(rows, TrainedRows)]
    counts, summary = _count(engine, plan)
    class_rows = counts.sum(0).tolist()
    engine.router.check_sizes(class_rows)
    attach(trained, optimizers)
    before = [rows.storages() for rows in engine.classes]
    device, placement = engine.options.device, engine.options.placement
    unified = placement.is_unified(device)
    staged = stages(device) and not unified
    place = _HOST if staged or unified else device
    if unified:
        before.clear()
        before.extend(_into_host_memory(engine))
    columns = tensors_on(engine.columns, place) if unified else engine.columns
    after = [rows.allocate(n, place) for rows, n in zip(engine.classes, class_rows, strict=True)]
    next_slot = torch.zeros(len(engine.classes), dtype=torch.int64)
    done = [0] * len(engine.classes)
    plan.begin()
    for t, table in enumerate(engine.tables):
        class_of_code = engine.router.tensors.class_of_code[t]
        for start, stop in slabs(table.rows):
            old = engine.router.read(t, start, stop)
            codes = plan.codes(t, start, stop, old[0])
            first = next_slot.clone()
            slots = engine.router.write(t, start, codes, next_slot)
            if unified:
                old, class_of_code = (old[0].to(place), old[1].to(place)), class_of_code.to(place)
                into, new = after, (codes.to(place), slots.to(place))
            elif staged:
                into = _slab_of(engine, first, next_slot)
                new = (codes, _counted_from(slots, codes, class_of_code, first))
            else:
                into, new = after, (codes, slots)
            _move(old, new, class_of_code, columns, before, into)
            if staged:
                _fetch(into, after, first.tolist(), next_slot.tolist())
            else:
                _release(old[0], class_of_code, done, before)
    if staged or unified:
        before.clear()
        for rows in engine.classes:  # all old rows go before the first new ones come
            rows.adopt(0, rows.allocate(0, device))
        detach(trained, optimizers)  # they hold the old state as well
    for rows, n in zip(engine.classes, class_rows, strict=True):
        rows.adopt(n, carried(after.pop(0), device, placement))
    engine.table_rows = counts
    detach(trained, optimizers)
    return summary


def _move(
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    class_of_code: Tensor,
    columns: ClassColumns,
    before: Sequence[Mapping[str, Storage]],
    into: Sequence[Mapping[str, Storage]],
) -> None:
    """Copy one slab; a function of its own, so that no name holds tensors of the old rows when it is done."""
    for name, storage in before[0].items():
        source, target = _named(before, name), _named(into, name)
        move_rows(old, new, class_of_code, columns, source, target, rowwise=storage.rowwise)


def stages(device: torch.device) -> bool:
    """Whether rows wait in host memory until the old ones are gone: only there are pages given back one by one."""
    return device.type != "cpu"


def _into_host_memory(engine: RoutedEmbeddings) -> Iterator[dict[str, Storage]]:
    """Take all rows out of unified memory, class by class; the classes are empty afterwards."""
    for rows in engine.classes:
        yield carried(rows.storages(), _HOST)
        rows.adopt(0, rows.allocate(0, engine.options.device))


def _slab_of(engine: RoutedEmbeddings, first: Tensor, stop: Tensor) -> list[dict[str, Storage]]:
    """Room for the rows of one slab beside the tables."""
    sizes = (stop - first).tolist()
    return [rows.allocate(n, engine.options.device) for rows, n in zip(engine.classes, sizes, strict=True)]


def _counted_from(slots: Tensor, codes: Tensor, class_of_code: Tensor, first: Tensor) -> Tensor:
    """Slots counted from the first one of each class in this slab."""
    base = first.to(slots.device)[class_of_code.long().clamp(min=0)[codes.long()]]
    return torch.where(slots < 0, slots, slots - base.to(slots.dtype))


def _fetch(
    slab: Sequence[Mapping[str, Storage]],
    after: Sequence[Mapping[str, Storage]],
    first: Sequence[int],
    stop: Sequence[int],
) -> None:
    """Bring the rows of a slab to where they wait."""
    for part, whole, begin, end in zip(slab, after, first, stop, strict=True):
        for name, storage in part.items():
            whole[name].tensor[begin:end].copy_(storage.tensor)


def _count(engine: RoutedEmbeddings, plan: RowPlan) -> tuple[Tensor, MoveSummary]:
    """Read the plan once: rows per table and class, and what changes.

    Raises:
        ValueError: If the plan gives a code that a table does not have.
    """
    counts = torch.zeros(len(engine.tables), len(engine.classes), dtype=torch.int64)
    changed = grown = revived = dropped = 0
    plan.begin()
    for t, table in enumerate(engine.tables):
        live = torch.tensor([len(table.live_chunks(code)) for code in range(table.codes)])
        pairs = torch.zeros(table.codes, table.codes, dtype=torch.int64)
        for start, stop in slabs(table.rows):
            current, _ = engine.router.read(t, start, stop)
            codes = plan.codes(t, start, stop, current)
            if int(codes.max()) >= table.codes:
                raise ValueError(f"code {int(codes.max())} for table {table.name!r}, which has {table.codes} codes")
            found = torch.bincount(current.int() * table.codes + codes.int(), minlength=table.codes**2)
            pairs += found.to(pairs.device).view_as(pairs)
        for code in range(1, table.codes):
            counts[t, engine.class_map.class_of_code[t][code]] += pairs[:, code].sum()
        changed += int(pairs.sum() - pairs.diagonal().sum())
        grown += int(pairs[live.unsqueeze(1) < live.unsqueeze(0)].sum())
        revived += int(pairs[0, 1:].sum())
        dropped += int(pairs[1:, 0].sum())
    rows = sum(table.rows for table in engine.tables)
    return counts, MoveSummary(
        changed_rows=changed, grown_rows=grown, revived_rows=revived, dropped_rows=dropped, rows=rows
    )


def _release(codes: Tensor, class_of_code: Tensor, done: list[int], before: Sequence[Mapping[str, Storage]]) -> None:
    """Give back the pages of old storage that the rows of this slab were the last to need.

    Args:
        codes: Old codes of the slab.
        class_of_code: Of its table.
        done: Rows of each class that were moved before, whose slots come first, since slots rise with the rows; those
            of the slab are added.
        before: Old storage of each class.
    """
    rows = torch.bincount(codes, minlength=class_of_code.numel()).tolist()
    for row_class, moved in zip(class_of_code.tolist()[1:], rows[1:], strict=True):
        if row_class < 0 or not moved:
            continue
        done[row_class] += moved
        for storage in before[row_class].values():
            stored = 1 if storage.rowwise else storage.tensor.shape[1]
            release_prefix(storage.tensor, done[row_class] * stored)


def _named(storages: Sequence[Mapping[str, Storage]], name: str) -> list[Tensor | None]:
    """One tensor of each class, None where the class has no rows."""
    return [s[name].tensor if s[name].tensor.numel() else None for s in storages]
