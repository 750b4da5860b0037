"""What can go wrong with an export, in words that say what to do."""

STILL_SEARCHED = (
    "the bits of table {name!r} are still being searched in this state: export a later one, after the search phase has"
    " chosen them"
)


class ExportError(ValueError):
    """Tables cannot be exported, or an export cannot be loaded."""
