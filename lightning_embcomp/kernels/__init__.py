"""Hot loops of the engine: every operation has a plain PyTorch twin and a fast path per device.

Each folder is one operation: ``reference.py`` is plain PyTorch and the definition of what is right, ``cpu.py`` is
Numba. The folder's ``__init__`` holds the public function, which picks a backend through
:mod:`lightning_embcomp.kernels.dispatch`.
"""
