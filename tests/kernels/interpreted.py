"""Run the checks of the Triton kernels by Triton's interpreter; print what failed as JSON."""

import json
import sys
import time
import traceback

import torch

from .triton_checks import CHECKS


def main() -> None:
    results = {}
    for name, check in CHECKS.items():
        begin = time.perf_counter()
        try:
            check(torch.device("cpu"))
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name} {time.perf_counter() - begin:.2f} s", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
