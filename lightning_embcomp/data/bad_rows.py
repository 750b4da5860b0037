"""What happens to rows that cannot be read."""

import logging
from typing import Literal

from lightning_embcomp.data.errors import MalformedRowError

_log = logging.getLogger(__name__)
_SHOWN = 5


class BadRows:
    """Raises at the first malformed row, or counts and logs the malformed rows that are left out.

    Args:
        policy: ``error`` or ``skip``.

    Attributes:
        skipped: Rows left out so far.

    Example:
        >>> bad_rows = BadRows("skip")
        >>> bad_rows.found(MalformedRowError("two columns instead of 40", file="a.tsv", line=3))
        >>> bad_rows.skipped
        1
    """

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        """Start with no malformed rows."""
        self.skipped = 0
        self._policy = policy
        self._examples: list[str] = []

    def found(self, error: MalformedRowError, count: int = 1) -> None:
        """Take note of ``count`` malformed rows, ``error`` being about the first of them.

        Raises:
            MalformedRowError: ``error`` itself, unless such rows are skipped.
        """
        if self._policy == "error":
            raise error
        self.skipped += count
        if len(self._examples) < _SHOWN:
            self._examples.append(str(error))

    def log_summary(self, rows: int) -> None:
        """Log how many rows were left out beside the ``rows`` that were read, with the first few reasons."""
        if self.skipped:
            _log.warning(
                "%d malformed rows were skipped, %d rows were read. The first ones:\n  %s",
                self.skipped,
                rows,
                "\n  ".join(self._examples),
            )
