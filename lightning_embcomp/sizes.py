"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(size: int | str) -> int:
    """Read a byte count such as ``2GB`` or ``512 MiB``.

    Args:
        size: A number, or a number with a unit: powers of 1000 (``KB``, ``MB``, ``GB``, ``TB``) or of 1024 (``KiB``,
            ...), in any case; the ``B`` may be left out.

    Returns:
        Bytes.

    Raises:
        ValueError: If it is not a positive size.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("1.5 KiB"), parse_bytes(10)
        (2000000000, 1536, 10)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper().removesuffix("B") + "B" if match and match[2] else "") if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{size!r} is not a size in bytes: write for example 2GB, 512MiB or a number of bytes")
    return int(float(match[1]) * unit)
