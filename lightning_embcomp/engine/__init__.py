"""The engine: logical tables routed to row classes, one per width, each laid out as an ordinary FBGEMM table.

On CPU, float32 rows with SGD, Adagrad or row-wise Adagrad are read and updated in place by the project's own kernels,
which follow FBGEMM's rules; every other combination runs through FBGEMM's training table over the same tensors.
"""
