"""Encoding a click log: read and check, divide, count, number.

The text is read once. Checked rows are kept in a compressed columnar form, from which the values of the training rows
are counted and then all rows encoded, block by block.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lightning_embcomp.data import cache
from lightning_embcomp.data.bad_rows import BadRows
from lightning_embcomp.data.batches import Bags, Columns
from lightning_embcomp.data.convert import LABEL, TIMESTAMP, check_block, dense_column, feature_column
from lightning_embcomp.data.encoded import EncodedMeta, PartWriter, write_orders
from lightning_embcomp.data.errors import DataFileError
from lightning_embcomp.data.formats import Reader
from lightning_embcomp.data.schema import CategoricalFeature, ClickLogSchema, Split
from lightning_embcomp.data.splits import PARTS, assign_parts
from lightning_embcomp.data.vocabulary import ValueCounter, Vocabulary


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What decides, beside the files, how a click log is encoded.

    Args:
        split: How rows are divided.
        min_count: Values that occur less often in training rows have no id of their own.
        on_bad_rows: ``error`` or ``skip``.
        max_rows: Rows to read; ``None``: all.
    """

    split: Split
    min_count: int
    on_bad_rows: Literal["error", "skip"]
    max_rows: int | None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {self.min_count}")
        if self.on_bad_rows not in ("error", "skip"):
            raise ValueError(f"on_bad_rows must be 'error' or 'skip', got {self.on_bad_rows!r}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1 or None, got {self.max_rows}")


def cache_key(reader: Reader, settings: BuildSettings) -> str:
    """Fingerprint under which the encoded form is kept."""
    return cache.fingerprint(
        reader.files, {"reader": type(reader).__name__, "schema": asdict(reader.schema), **asdict(settings)}
    )


def build(reader: Reader, settings: BuildSettings, folder: Path) -> Path:
    """Encode a click log into ``folder``, with a progress bar.

    The result appears under its name only when it is complete, so that a build that is broken off or runs twice at
    the same time does no harm.

    Args:
        reader: The click log.
        settings: How to encode it.
        folder: Existing folder of encoded logs.

    Returns:
        The new folder, named by the fingerprint.

    Raises:
        DataFileError: If a file cannot be read; a malformed row is a ``MalformedRowError``, which is one.
        ValueError: If there are too few rows for the split.
    """
    target = folder / cache_key(reader, settings)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".tmp", dir=folder))
    try:
        _build(reader, settings, work)
        try:
            os.rename(work, target)
        except OSError:
            if not (target / "meta.json").is_file():  # not a build of the same data that was quicker
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _build(reader: Reader, settings: BuildSettings, folder: Path) -> None:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not Console().is_terminal,
    )
    with progress:
        staged = _stage(reader, settings, folder / "staging", progress)
        timestamps = staged.timestamps
        parts = assign_parts(staged.rows, settings.split, timestamps)
        counted = _count(staged, reader.schema, parts, settings.min_count, progress)
        writers = _encode(staged, reader.schema, parts, counted, folder, progress)
    if timestamps is not None:
        write_orders(folder, parts, timestamps)
    shutil.rmtree(folder / "staging")
    schema = reader.schema
    features = tuple(
        CategoricalFeature(name, num_embeddings=len(vocabulary), multi_valued=name in schema.multi_valued)
        for name, vocabulary in zip(schema.feature_names, counted.vocabularies, strict=True)
    )
    _save_vocabularies(counted.vocabularies, folder / "vocabularies")
    sizes = np.bincount(parts, minlength=3)
    EncodedMeta(
        features=features,
        num_dense=len(schema.dense),
        rows=(int(sizes[0]), int(sizes[1]), int(sizes[2])),
        positives=(writers[0].positives, writers[1].positives, writers[2].positives),
        skipped=staged.skipped,
        source={"files": [str(file) for file in reader.files], "schema": asdict(schema), **asdict(settings)},
    ).save(folder)


@dataclass(frozen=True, kw_only=True)
class _Staged:
    files: tuple[Path, ...]
    rows: int
    skipped: int
    timestamps: np.ndarray | None

    def blocks(self, columns: list[str], task: Callable[[int], None]) -> Iterator[tuple[slice, pl.DataFrame]]:
        begin = 0
        for file in self.files:
            frame = pl.read_ipc(file, columns=columns)
            yield slice(begin, begin + frame.height), frame
            begin += frame.height
            task(frame.height)


def _stage(reader: Reader, settings: BuildSettings, folder: Path, progress: Progress) -> _Staged:
    folder.mkdir()
    bad_rows = BadRows(settings.on_bad_rows)
    files: list[Path] = []
    times: list[np.ndarray] = []
    rows = 0
    task = progress.add_task("Reading", total=reader.size)
    for block in reader.blocks(bad_rows, lambda size: progress.advance(task, size)):
        frame = check_block(block, reader.schema, bad_rows)
        if settings.max_rows is not None:
            frame = frame.head(settings.max_rows - rows)
        if frame.height:
            files.append(folder / f"{len(files):06d}.arrow")
            frame.write_ipc(files[-1], compression="lz4")
            if TIMESTAMP in frame.columns:
                times.append(frame[TIMESTAMP].to_numpy())
        rows += frame.height
        if rows == settings.max_rows:
            break
    bad_rows.log_summary(rows)
    if rows == 0:
        raise DataFileError("no readable rows", file=", ".join(map(str, reader.files)))
    return _Staged(
        files=tuple(files),
        rows=rows,
        skipped=bad_rows.skipped,
        timestamps=np.concatenate(times) if times else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Counted:
    vocabularies: tuple[Vocabulary, ...]
    bag_values: np.ndarray  # ids per part and multi-valued feature


def _count(staged: _Staged, schema: ClickLogSchema, parts: np.ndarray, min_count: int, progress: Progress) -> _Counted:
    names = [feature_column(index) for index in range(len(schema.feature_names))]
    single = len(schema.categorical)
    counters = [ValueCounter() for _ in names]
    bag_values = np.zeros((3, len(names) - single), dtype=np.int64)
    task = progress.add_task("Counting values of training rows", total=staged.rows)
    for place, frame in staged.blocks(names, lambda rows: progress.advance(task, rows)):
        part = parts[place]
        training = part == 0
        for index, counter in enumerate(counters):
            values = frame[names[index]]
            if index >= single:
                lengths = _lengths(values)
                bag_values[:, index - single] += np.bincount(part, weights=lengths, minlength=3).astype(np.int64)
                counter.add(_flat(values.filter(training)))
            else:
                counter.add(values.filter(training))
    return _Counted(vocabularies=tuple(counter.vocabulary(min_count) for counter in counters), bag_values=bag_values)


def _encode(
    staged: _Staged, schema: ClickLogSchema, parts: np.ndarray, counted: _Counted, folder: Path, progress: Progress
) -> list[PartWriter]:
    sizes = np.bincount(parts, minlength=3)
    writers = [
        PartWriter(
            folder / name,
            rows=int(sizes[index]),
            num_dense=len(schema.dense),
            num_single=len(schema.categorical),
            bag_values=counted.bag_values[index].tolist(),
        )
        for index, name in enumerate(PARTS)
    ]
    dense = [dense_column(index) for index in range(len(schema.dense))]
    features = [feature_column(index) for index in range(len(schema.feature_names))]
    task = progress.add_task("Encoding", total=staged.rows)
    for place, frame in staged.blocks([LABEL, *dense, *features], lambda rows: progress.advance(task, rows)):
        columns = _encode_block(frame, dense, features, len(schema.categorical), counted.vocabularies)
        for index, writer in enumerate(writers):
            rows = np.flatnonzero(parts[place] == index)
            if len(rows):
                writer.write(columns.take(rows))
    return writers


def _encode_block(
    frame: pl.DataFrame, dense: list[str], features: list[str], single: int, vocabularies: tuple[Vocabulary, ...]
) -> Columns:
    ids = np.empty((frame.height, single), dtype=np.int32)
    for index in range(single):
        ids[:, index] = vocabularies[index].encode(frame[features[index]])
    bags = []
    for index in range(single, len(features)):
        values = frame[features[index]]
        offsets = np.concatenate([[0], np.cumsum(_lengths(values), dtype=np.int64)])
        bags.append(Bags(values=vocabularies[index].encode(_flat(values)), offsets=offsets))
    numbers = frame.select(dense).to_numpy() if dense else np.empty((frame.height, 0), dtype=np.float32)
    return Columns(dense=numbers, ids=ids, bags=tuple(bags), label=frame[LABEL].to_numpy())


def _lengths(lists: pl.Series) -> np.ndarray:
    return lists.list.len().fill_null(0).to_numpy()


def _flat(lists: pl.Series) -> pl.Series:
    # Exploding an empty list gives a null, which would be one more id.
    return lists.filter((lists.list.len() > 0).fill_null(False)).explode()


def _save_vocabularies(vocabularies: tuple[Vocabulary, ...], folder: Path) -> None:
    folder.mkdir()
    for index, vocabulary in enumerate(vocabularies):
        np.save(folder / f"{index}_counts.npy", vocabulary.counts)
        vocabulary.values.alias("value").to_frame().write_ipc(folder / f"{index}.arrow", compression="lz4")
