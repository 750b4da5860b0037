"""FIITED: dimension pruning during training."""
