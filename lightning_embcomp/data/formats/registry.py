"""From the name of a format to its reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_embcomp.data.formats.avazu import AvazuReader
from lightning_embcomp.data.formats.base import Reader
from lightning_embcomp.data.formats.criteo import CriteoReader
from lightning_embcomp.data.formats.libfm import BAG, LibfmReader
from lightning_embcomp.data.formats.movielens import MovieLensReader
from lightning_embcomp.data.formats.table import TableReader
from lightning_embcomp.data.schema import ClickLogSchema
from lightning_embcomp.data.sources import PathLike, resolve_paths

FormatName = Literal["criteo", "avazu", "movielens", "libfm", "table"]


def open_reader(
    path: PathLike | Sequence[PathLike], format: FormatName, schema: ClickLogSchema | None = None
) -> Reader:
    """Find the files and the reader for them. Nothing but a first row is read yet.

    Args:
        path: File, folder, glob or list of these.
        format: Name of the format.
        schema: What the columns are. Needed by ``table``; ``libfm`` takes
            ``ClickLogSchema(label="label", multi_valued={"features": " "})`` for rows of different lengths; the
            other formats have a fixed schema.

    Returns:
        The reader.

    Raises:
        FileNotFoundError: If ``path`` names no file.
        ValueError: If the schema is missing, or not used by the format.
    """
    if format == "table":
        if schema is None:
            raise ValueError("format='table' needs a schema that names the label and the input columns")
        return TableReader(resolve_paths(path), schema)
    if format == "libfm":
        if schema is not None and schema.feature_names != (BAG,):
            raise ValueError(f"libfm data has one possible schema beside the default: multi_valued={{'{BAG}': ' '}}")
        return LibfmReader(resolve_paths(path), bag=schema is not None)
    if schema is not None:
        raise ValueError(f"format={format!r} has a fixed schema; use format='table' to give one")
    if format == "criteo":
        return CriteoReader(resolve_paths(path))
    if format == "avazu":
        return AvazuReader(resolve_paths(path))
    if format == "movielens":
        return MovieLensReader(_one_place(path))
    raise ValueError(f"format must be criteo, avazu, movielens, libfm or table, got {format!r}")


def _one_place(path: PathLike | Sequence[PathLike]) -> Path:
    if isinstance(path, str) or not isinstance(path, Sequence):
        place = Path(path).expanduser()
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such file or folder")
        return place
    if len(path) != 1:
        raise ValueError("MovieLens data is one folder or one zip, not a list of files")
    return _one_place(path[0])
