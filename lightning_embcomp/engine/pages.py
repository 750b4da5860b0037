"""Return the pages behind a tensor to the operating system while the tensor is still alive.

When rows stream from old storage into new storage, the part already read is dead. Giving its pages back at once keeps
the peak of a move near the live bytes instead of twice that.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

from torch import Tensor

_MADV_DONTNEED = 4


def release_prefix(tensor: Tensor, elements: int) -> None:
    """Drop the pages that hold the first ``elements`` of a contiguous CPU tensor; they read as zero afterwards.

    Only whole pages are dropped. Outside Linux, and for other devices, nothing happens: memory is then freed when the
    tensor is.

    Raises:
        OSError: If the kernel refuses.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + elements * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= begin:
        return
    if _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED) != 0:
        error = ctypes.get_errno()
        raise OSError(error, "madvise could not release the pages of moved rows")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
