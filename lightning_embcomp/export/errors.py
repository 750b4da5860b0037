"""What can go wrong with an export, in words that say what to do."""


class ExportError(ValueError):
    """Tables cannot be exported, or an export cannot be loaded."""
