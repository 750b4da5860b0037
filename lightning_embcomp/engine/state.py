"""Save and restore an engine, table by table, so that a checkpoint can be read without the module.

Keys under the engine's prefix, for table ``T`` and code ``k``:

* ``tables.T.shape``: int64 ``[format version, rows, dim, chunks, layout]``
* ``tables.T.codes``: the code of every row as bit planes, int64 ``(blocks of 64 rows, planes)``
* ``tables.T.rows.k.weight`` and ``tables.T.rows.k.<optimizer state>``: rows of code ``k`` in logical order
* ``tables.T.utility`` and ``tables.T.gain``: utilities and the mean gain of an occurrence, if tracked
* ``tables.T.<name>.<tensor>``: what methods attached to the engine
* ``steps``: int64 ``[fused optimizer steps, observed steps]``
* ``rate``: float64 ``[learning rate]`` of the fused optimizer before any scaling by class, if there is one

Tensors are views of live storage, as in any ``state_dict``: clone what must survive the next training step.

Rows of an optimizer of ``configure_optimizers`` take the number and order that they had when they were saved. State
which such an optimizer already holds for them does not follow: after loading a state dict in the middle of a run,
rebuild the optimizer or load its own saved state. The order in which Lightning resumes, model before optimizers, is
fine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcomp.engine import planes
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.plan import ReadPlan
from lightning_embcomp.engine.router import BLOCK, slabs
from lightning_embcomp.engine.row_class import FusedRows

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings

FORMAT_VERSION = 1
LAYOUTS = ("prefix", "chunks")
_LOADED_KEY = "loaded"
_LOADED = object()  # no checkpoint can hold it


def save(engine: RoutedEmbeddings, destination: dict[str, Any], prefix: str) -> None:
    """Add the engine's state to a state dict."""
    for t, table in enumerate(engine.tables):
        key = f"{prefix}tables.{table.name}."
        destination[key + "shape"] = torch.tensor(
            [FORMAT_VERSION, table.rows, table.dim, table.chunks, LAYOUTS.index(table.layout)]
        )
        destination[key + "codes"] = _planes(engine, t)
        for code in range(1, table.codes):
            c = engine.class_map.class_of_code[t][code]
            first, last = engine.class_span(t, c)
            for name, storage in engine.classes[c].storages().items():
                destination[f"{key}rows.{code}.{name}"] = storage.tensor[first:last]
        if engine.utility is not None:
            destination[key + "utility"] = engine.utility.of_table(t)
            destination[key + "gain"] = engine.utility.gain[t]
        destination.update((name, tensor.detach()) for name, tensor in _attached(engine, t, prefix))
    steps = max((rows.step for rows in engine.classes if isinstance(rows, FusedRows)), default=0)
    observed = engine.utility.step if engine.utility is not None else 0
    destination[prefix + "steps"] = torch.tensor([steps, observed])
    rates = [rows.learning_rate for rows in engine.classes if isinstance(rows, FusedRows)]
    if rates:
        destination[prefix + "rate"] = torch.tensor(rates[:1], dtype=torch.float64)


def mark_loaded(source: dict[str, Any], prefix: str) -> None:
    """Let the next :func:`load` from this state dict do nothing, because the engine was brought up already."""
    source[prefix + _LOADED_KEY] = _LOADED


def load(
    engine: RoutedEmbeddings,
    source: dict[str, Any],
    prefix: str,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> bool:
    """Bring the engine to a saved state; classes take the sizes that they had.

    Args:
        engine: The engine.
        source: State dict.
        prefix: The engine's prefix in it.
        missing_keys: Takes the keys that are missing.
        unexpected_keys: Takes the keys that nothing is known about.
        error_msgs: Takes what does not fit; the engine is as before then.

    Returns:
        Whether the engine took the saved state.
    """
    if source.get(prefix + _LOADED_KEY) is _LOADED:
        return False
    present = {key for key in source if key.startswith(prefix)}
    expected = set(_keys(engine, prefix, present))
    if not present & expected:
        missing_keys.append(prefix + "tables")
        unexpected_keys.extend(sorted(present))
        return False
    missing = sorted(expected - present)
    missing_keys.extend(missing)
    unexpected_keys.extend(sorted(present - expected))
    shapes = [(table, source.get(f"{prefix}tables.{table.name}.shape")) for table in engine.tables]
    wrong = [message for table, saved in shapes if saved is not None and (message := shape_error(table, saved))]
    if missing:
        wrong.append(f"the state of an engine is loaded as a whole, but the checkpoint lacks {missing[0]}")
    wrong = wrong or list(_damage(engine, source, prefix))
    error_msgs.extend(wrong)
    if wrong:
        return False

    for t, table in enumerate(engine.tables):
        for name, table_state in engine.attached.items():
            table_state.prepare(t, _saved_of(source, f"{prefix}tables.{table.name}.{name}."))
    engine.move(ReadPlan(lambda t, start, stop: _read_codes(engine.tables[t], source, prefix, start, stop)))
    for t, table in enumerate(engine.tables):
        key = f"{prefix}tables.{table.name}."
        for code in range(1, table.codes):
            c = engine.class_map.class_of_code[t][code]
            first, last = engine.class_span(t, c)
            for name, storage in engine.classes[c].storages().items():
                storage.tensor[first:last].copy_(source[f"{key}rows.{code}.{name}"])
        if engine.utility is not None:
            engine.utility.of_table(t).copy_(source[key + "utility"])
            engine.utility.gain[t].copy_(source[key + "gain"])
        for key, tensor in _attached(engine, t, prefix):
            tensor.detach().copy_(source[key])
    for table_state in engine.attached.values():
        table_state.restored()
    steps = source[prefix + "steps"]
    for rows in engine.classes:
        if isinstance(rows, FusedRows):
            rows.restore_step(int(steps[0]))
    if engine.utility is not None:
        engine.utility.step = int(steps[1])
    if engine.options.optimizer is not None:
        engine.set_learning_rate(float(source[prefix + "rate"]))
    return True


def _keys(engine: RoutedEmbeddings, prefix: str, present: set[str]) -> list[str]:
    keys = [prefix + "steps"] + ([prefix + "rate"] if engine.options.optimizer is not None else [])
    for t, table in enumerate(engine.tables):
        key = f"{prefix}tables.{table.name}."
        keys += [key + "shape", key + "codes"]
        if engine.utility is not None:
            keys += [key + "utility", key + "gain"]
        for attached, table_state in engine.attached.items():
            first = f"{key}{attached}."
            saved = {name[len(first) :] for name in present if name.startswith(first)}
            keys += [first + name for name in table_state.names(t, saved)]
        for code in range(1, table.codes):
            storages = engine.classes[engine.class_map.class_of_code[t][code]].storages()
            keys += [f"{key}rows.{code}.{name}" for name in storages]
    return keys


def shape_error(table: LogicalTable, saved: Tensor) -> str | None:
    """What is wrong with the saved format version and shape of a table; None if they fit."""
    version = int(saved[0])
    if version > FORMAT_VERSION:
        return (
            f"table {table.name!r} was saved in format {version}; this version reads up to {FORMAT_VERSION}: update"
            " lightning-embcomp"
        )
    rows, dim, chunks, layout = saved[1:].tolist()
    if not 0 <= layout < len(LAYOUTS):
        return f"table {table.name!r} was saved with unknown layout {layout}: the checkpoint is damaged"
    found = (rows, dim, chunks, LAYOUTS[layout])
    wanted = (table.rows, table.dim, table.chunks, table.layout)
    if found != wanted:
        return (
            f"table {table.name!r} was saved as (rows, dim, chunks, layout) = {found}, but is configured as {wanted}:"
            " use the settings of the saved run"
        )
    return None


def _damage(engine: RoutedEmbeddings, source: dict[str, Any], prefix: str) -> Iterator[str]:
    """What does not fit together, found before anything is changed."""
    sizes: dict[str, tuple[int, ...]] = {prefix + "steps": (2,)}
    if engine.options.optimizer is not None:
        sizes[prefix + "rate"] = (1,)
    for t, table in enumerate(engine.tables):
        key = f"{prefix}tables.{table.name}."
        words = source[key + "codes"]
        wanted = (-(-table.rows // BLOCK), int(engine.router.tensors.planes[t]))
        if tuple(words.shape) != wanted or words.dtype != torch.int64:
            found = f"{words.dtype} {tuple(words.shape)}"
            yield f"{key}codes is {found} instead of torch.int64 {wanted}: the checkpoint is damaged"
            continue
        counts = torch.zeros(256, dtype=torch.int64)
        for start, stop in slabs(table.rows):
            counts += torch.bincount(_read_codes(table, source, prefix, start, stop), minlength=256)
        if bool(counts[table.codes :].any()):
            yield f"{key}codes holds codes above {table.full_code}: the checkpoint is damaged"
            continue
        for code in range(1, table.codes):
            rows = engine.classes[engine.class_map.class_of_code[t][code]]
            for name, storage in rows.storages().items():
                count = int(counts[code])
                sizes[f"{key}rows.{code}.{name}"] = (count,) if storage.rowwise else (count, rows.width)
        if engine.utility is not None:
            sizes[key + "utility"] = tuple(engine.utility.of_table(t).shape)
            sizes[key + "gain"] = (2,)
        for attached, table_state in engine.attached.items():
            message = table_state.misfit(t, _saved_of(source, f"{key}{attached}."))
            if message is not None:
                yield f"{key}{attached}: {message}"
    for key, size in sizes.items():
        if tuple(source[key].shape) != size:
            yield f"{key} has shape {tuple(source[key].shape)} instead of {size}: the checkpoint is damaged"


def _attached(engine: RoutedEmbeddings, t: int, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Keys and live tensors of what methods attached."""
    for name, table_state in engine.attached.items():
        for tensor_name, tensor in table_state.tensors(t).items():
            yield f"{prefix}tables.{engine.tables[t].name}.{name}.{tensor_name}", tensor


def _saved_of(source: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Tensors under a prefix, by the rest of their names."""
    return {key[len(prefix) :]: value for key, value in source.items() if key.startswith(prefix)}


def _planes(engine: RoutedEmbeddings, t: int) -> Tensor:
    router = engine.router.tensors
    width, stride, first = int(router.planes[t]), int(router.stride[t]), int(router.start[t])
    blocks = -(-engine.tables[t].rows // BLOCK)
    return router.words[first : first + blocks * stride].view(blocks, stride)[:, :width].clone()


def _read_codes(table: LogicalTable, source: dict[str, Any], prefix: str, start: int, stop: int) -> Tensor:
    words: Tensor = source[f"{prefix}tables.{table.name}.codes"][start // BLOCK : -(-stop // BLOCK)]
    return planes.decode(words, stop - start)
