"""The ids of a batch seen from the rows and bags that they belong to, for kernels on a GPU; no operation of its own."""
