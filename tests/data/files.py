"""Small click logs for tests, written as real ones are."""

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from lightning_embcomp.data import ClickLogDataModule, Split

NO_SPLIT = Split(validation=0, test=0)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "txt": bytes,
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": lambda data: bytes(pa.Codec("zstd").compress(data)),
}


def criteo_line(label: object, number: object = "", value: str = "") -> str:
    """A Criteo line with ``number`` as I1 and ``value`` as C1, the rest missing."""
    return "\t".join([str(label), str(number), *[""] * 12, value, *[""] * 25]) + "\n"


def write(file: Path, text: str) -> Path:
    file.write_bytes(text.encode())
    return file


def ready(path: Path | list[Path], **settings: object) -> ClickLogDataModule:
    """A data module after ``prepare_data`` and ``setup``."""
    data = ClickLogDataModule(path, **settings)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data
