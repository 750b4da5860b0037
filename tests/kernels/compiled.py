"""Compile the Triton kernels for a GPU that need not be there; print those that did not compile as JSON.

The interpreter runs a kernel as Python and accepts what the compiler does not. Checks run as usual, but a launch only
compiles; what they compare afterwards has no meaning and is left out.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import lightning_embcomp.kernels

from . import triton_checks, triton_events, triton_updates

CAPABILITY = 90
SOME = (
    "route-odd-int32",
    "pool-odd-float16-int32",
    "assembly-odd-float16-4",
    "utility-weighted-peak_gradient-2-int64",
    "decay",
    "count-duplicates-uint8-True-int64",
    "update-odd-adagrad-float16",
    "update-duplicates-rowwise_adagrad-float32",
    "update-weighted-sgd-float32-True",
    "moments-odd-lamb-float32",
    "moments-odd-partial_rowwise_adam-float16",
    "rounding",
    "threshold-4101-econtrol-100",
    "topk-257-100",
    "quantize-37-6-float16-True",
    "served-pruned_and_rounded-1-False-True-int64",
    "served-float_32-16-True-False-int32",
    "pack-odd",
    "move-odd-float16-False",
    "move-mixed-float32-True",
    "decide-700-True",
    "decide-700-False",
)
"""Each kernel once or twice."""


class FarAwayGPU:
    """The questions that Triton's launcher asks a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launched_anywhere() -> set[str]:
    """Names of the kernels that the package launches."""
    folder = Path(lightning_embcomp.kernels.__file__).parent
    return {
        name for path in folder.rglob("triton.py") for name in re.findall(r"(\w+)\[(?:\(|grid|_grid)", path.read_text())
    }


def main() -> None:
    compiled, errors = set(), {}
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = kernel.fn.__name__
        try:
            launch(kernel, *args, grid=grid, warmup=True, **options)
            compiled.add(name)
        except Exception:
            errors[name] = traceback.format_exc()

    driver.set_active(FarAwayGPU())
    JITFunction.run = compile_only
    torch.empty = torch.zeros  # nothing is computed, but sizes are read from results
    for checks in (triton_checks, triton_events, triton_updates):
        checks.close = lambda *found, **options: None
    torch.testing.assert_close = lambda *found, **options: None
    for name in sys.argv[1:] or SOME:
        try:
            triton_checks.CHECKS[name](torch.device("cpu"))
        except AssertionError:
            continue
    print(json.dumps({"missing": sorted(launched_anywhere() - compiled - set(errors)), "errors": errors}))


if __name__ == "__main__":
    main()
