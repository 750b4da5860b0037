"""One reader per file format."""

from lightning_embcomp.data.formats.base import Reader
from lightning_embcomp.data.formats.registry import FormatName, open_reader

__all__ = ["FormatName", "Reader", "open_reader"]
