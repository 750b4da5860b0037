"""Several methods on the same tables: in which order they act, and what each of them may own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Literal

Property = Literal["width", "precision", "wire", "learning_rate"]
"""What a method can own of a table: which columns are stored, how values are rounded, what crosses the wire, and how
far a row moves in a step."""


class Stage(IntEnum):
    """Order in which methods act on a training step, whatever their order in the trainer."""

    ROWS = 0
    VALUE = 1
    EXCHANGE = 2
    STEP = 3


STAGES: Mapping[Property, Stage] = {
    "width": Stage.ROWS,
    "precision": Stage.VALUE,
    "wire": Stage.EXCHANGE,
    "learning_rate": Stage.STEP,
}
_VERBS: Mapping[Property, str] = {
    "width": "set the width",
    "precision": "set the precision",
    "wire": "set the wire format",
    "learning_rate": "set the learning rate",
}


class OwnershipError(ValueError):
    """Two callbacks claim the same property of the same table."""


class Ownership:
    """Who owns which property of which table.

    Example:
        >>> ownership = Ownership()
        >>> ownership.claim("DimensionPruning[*]", "width", ["user"])
        >>> ownership.claim("MixedPrecisionSearch[*]", "precision", ["user"])
        >>> ownership.claim("DimensionPruning[u*]", "width", ["user"])
        Traceback (most recent call last):
            ...
        lightning_embcomp.composition.OwnershipError: both DimensionPruning[*] and DimensionPruning[u*] set the width \
of table 'user': give them different tables
    """

    def __init__(self) -> None:
        self._owners: dict[tuple[Property, str], str] = {}

    def claim(self, who: str, what: Property, tables: Iterable[str]) -> None:
        """Take a property of some tables.

        Args:
            who: Name of the callback.
            what: The property.
            tables: Unique table names.

        Raises:
            OwnershipError: If another callback has it.
        """
        for table in tables:
            owner = self._owners.setdefault((what, table), who)
            if owner != who:
                raise OwnershipError(
                    f"both {owner} and {who} {_VERBS[what]} of table {table!r}: give them different tables"
                )
