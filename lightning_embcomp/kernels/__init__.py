"""Hot loops of the engine: every operation has a plain PyTorch twin and a fast path per device.

Each folder is one operation: ``reference.py`` is plain PyTorch and the definition of what is right, ``cpu.py`` is
Numba, ``triton.py`` runs on CUDA. The folder's ``__init__`` holds the public function, which picks a backend by the
device through :mod:`lightning_embcomp.kernels.dispatch`.

On CUDA nothing that runs in every step waits for the device, except functions whose result has a size that depends on
values (:func:`~lightning_embcomp.kernels.route.route`, :func:`~lightning_embcomp.kernels.threshold.select_large`),
which have a twin of fixed size beside them.
"""
