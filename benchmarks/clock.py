"""Time and memory on any device: events and the allocator's own counts on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch


class Clock:
    """Times functions on a device.

    Args:
        device: The device; events on a GPU, the wall clock elsewhere.
        rounds: Timed rounds.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self._bandwidth: dict[int, float] = {}

    def medians(self, steps: Sequence[Callable[[int], object]]) -> list[float]:
        """Median milliseconds of each function, run in turn."""
        taken: list[list[float]] = [[] for _ in steps]
        for turn in range(self.rounds + 5):
            for step, found in zip(steps, taken, strict=True):
                milliseconds = self.time(partial(step, turn))
                if turn >= 5:
                    found.append(milliseconds)
        return [float(np.median(found)) for found in taken]

    def time(self, step: Callable[[], object]) -> float:
        """Milliseconds of one call; what was launched before is waited for first."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - started)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def bandwidth(self, size: int) -> float:
        """Bytes per millisecond that a copy of ``size`` bytes reads and writes; measured once."""
        if size not in self._bandwidth:
            source = torch.empty(size // 4, device=self.device)
            target = torch.empty_like(source)
            self._bandwidth[size] = 2 * size / self.medians([lambda turn: target.copy_(source)])[0]
        return self._bandwidth[size]

    def extra(self, step: Callable[[], object]) -> int:
        """Most bytes that a call allocates on a GPU beside what is there; 0 elsewhere."""
        if self.device.type != "cuda":
            step()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
