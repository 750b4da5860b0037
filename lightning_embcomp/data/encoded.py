"""The encoded form of a click log: memory-mapped arrays, one folder per part."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from lightning_embcomp.data.batches import Bags, Columns
from lightning_embcomp.data.schema import CategoricalFeature
from lightning_embcomp.data.splits import PARTS, Part


def create_array(file: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Create a ``.npy`` file and map it for writing; an array without elements is not mapped."""
    if 0 in shape:
        np.save(file, np.empty(shape, dtype=dtype))
        return np.empty(shape, dtype=dtype)
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def open_array(file: Path) -> np.ndarray:
    """Map a ``.npy`` file for reading."""
    array = np.load(file, mmap_mode="r") if file.stat().st_size > 0 else np.empty(0)
    # The base class: every slice of a memmap object would carry the costs of that subclass.
    return np.asarray(array)


class EncodedPart:
    """The rows of one part, read from memory-mapped arrays.

    Args:
        folder: Folder of the part.
        num_bags: Number of multi-valued features.
    """

    block_rows = 4096
    window_rows = 1 << 20

    def __init__(self, folder: Path, num_bags: int) -> None:
        """Open the arrays."""
        self._folder = folder
        self._num_bags = num_bags
        self._open()

    def _open(self) -> None:
        self._columns = Columns(
            dense=open_array(self._folder / "dense.npy"),
            ids=open_array(self._folder / "ids.npy"),
            bags=tuple(
                Bags(
                    values=open_array(self._folder / f"bag_{index}_values.npy"),
                    offsets=open_array(self._folder / f"bag_{index}_offsets.npy"),
                )
                for index in range(self._num_bags)
            ),
            label=open_array(self._folder / "label.npy"),
        )
        order = self._folder / "order.npy"
        self._order = open_array(order) if order.exists() else None

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return len(self._columns.label)

    def read(self, rows: np.ndarray) -> Columns:
        """Copy ``rows`` (int64, counted in the order of the part), in that order."""
        return self._columns.take(rows if self._order is None else self._order[rows])

    def __getstate__(self) -> dict[str, object]:
        """Leave out the arrays, which a worker process opens anew."""
        return {"_folder": self._folder, "_num_bags": self._num_bags}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Open the arrays."""
        self.__dict__.update(state)
        self._open()


@dataclass(frozen=True, kw_only=True)
class EncodedMeta:
    """What is known about encoded data beside its arrays.

    Args:
        features: Its categorical features.
        num_dense: Its number of dense inputs.
        rows: Rows of the training, validation and test part.
        positives: Rows with label 1 of each of them.
        skipped: Malformed rows that were left out.
        source: What it was made of and how, to be read by people.
    """

    features: tuple[CategoricalFeature, ...]
    num_dense: int
    rows: tuple[int, int, int]
    positives: tuple[int, int, int]
    skipped: int
    source: dict[str, object]

    def save(self, folder: Path) -> None:
        """Write ``meta.json``."""
        (folder / "meta.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "EncodedMeta":
        """Read ``meta.json``."""
        values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        values["features"] = tuple(CategoricalFeature(**feature) for feature in values["features"])
        values["rows"], values["positives"] = tuple(values["rows"]), tuple(values["positives"])
        return cls(**values)


class EncodedLog:
    """Encoded data in a folder.

    Args:
        folder: The folder, complete.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is known about the data."""
        self.folder = folder
        self.meta = EncodedMeta.load(folder)

    def part(self, name: Part) -> EncodedPart:
        """One of the parts."""
        return EncodedPart(self.folder / name, sum(feature.multi_valued for feature in self.meta.features))

    @property
    def base_rate(self) -> float:
        """Share of positive training rows."""
        return self.meta.positives[0] / self.meta.rows[0]

    def counts(self, feature: str) -> np.ndarray:
        """How often every id of ``feature`` occurs in training, int64 of shape ``(num_embeddings,)``."""
        return np.array(np.load(self.folder / "vocabularies" / f"{self._index(feature)}_counts.npy"))

    def values(self, feature: str) -> pl.Series:
        """The text behind every id of ``feature``, from id 1."""
        return pl.read_ipc(self.folder / "vocabularies" / f"{self._index(feature)}.arrow")["value"]

    def _index(self, feature: str) -> int:
        return feature_index(self.meta.features, feature)


def feature_index(features: Sequence[CategoricalFeature], name: str) -> int:
    """Place of the feature called ``name``.

    Raises:
        KeyError: If there is none.
    """
    names = [feature.name for feature in features]
    if name not in names:
        raise KeyError(f"no categorical feature is called {name!r}; there are {names}")
    return names.index(name)


class PartWriter:
    """Writes the rows of one part from front to back.

    Args:
        folder: Folder of the part; it is created.
        rows: Rows that will be written.
        num_dense: Dense inputs.
        num_single: Single-valued features.
        bag_values: Ids in all rows, for every multi-valued feature.
    """

    def __init__(self, folder: Path, *, rows: int, num_dense: int, num_single: int, bag_values: Sequence[int]) -> None:
        """Create the arrays."""
        folder.mkdir()
        self._label = create_array(folder / "label.npy", (rows,), np.uint8)
        self._dense = create_array(folder / "dense.npy", (rows, num_dense), np.float32)
        self._ids = create_array(folder / "ids.npy", (rows, num_single), np.int32)
        self._values = [
            create_array(folder / f"bag_{index}_values.npy", (size,), np.int32) for index, size in enumerate(bag_values)
        ]
        self._offsets = [
            create_array(folder / f"bag_{index}_offsets.npy", (rows + 1,), np.int64) for index in range(len(bag_values))
        ]
        self._rows = 0
        self.positives = 0

    def write(self, columns: Columns) -> None:
        """Append rows."""
        begin, end = self._rows, self._rows + len(columns.label)
        self._label[begin:end] = columns.label
        self._dense[begin:end] = columns.dense
        self._ids[begin:end] = columns.ids
        for values, offsets, bags in zip(self._values, self._offsets, columns.bags, strict=True):
            start = int(offsets[begin]) if begin else 0
            values[start : start + len(bags.values)] = bags.values
            offsets[begin : end + 1] = bags.offsets + start
        self._rows = end
        self.positives += int(columns.label.sum(dtype=np.int64))


def write_orders(folder: Path, parts: np.ndarray, timestamps: np.ndarray) -> None:
    """Keep the time order of every part whose rows do not stand in it already.

    Args:
        folder: Folder with the folders of the parts.
        parts: Index into ``PARTS`` per row, in file order.
        timestamps: Time of every row, in file order.
    """
    for index, name in enumerate(PARTS):
        times = timestamps[parts == index]
        order = np.argsort(times, kind="stable")
        if not np.array_equal(order, np.arange(len(order))):
            np.save(folder / name / "order.npy", order.astype(np.int64))
