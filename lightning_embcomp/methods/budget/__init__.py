"""One budget for pruning and precision, held by a price per byte; see README.md."""
