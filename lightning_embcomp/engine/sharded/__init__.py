"""Tables that TorchRec shards over processes, with engines as the kernels of its lookups."""
