"""One entry for all benchmarks: ``python -m benchmarks NAME …``; ``python -m benchmarks NAME --help`` tells more.

Times are for one core of a machine with nothing else to do.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

_ALL: dict[str, tuple[str, str]] = {
    "quality": ("pruning: AUC and NE against true bytes", "1 to 10 min per run"),
    "precision": ("rounding, trained and searched: AUC against bytes served", "1 to 5 min per run; `step` 5 min"),
    "frequency_lr": ("frequency-aware rates against SGD and Adagrad", "1 to 5 min per run; `step` 5 min"),
    "combined": ("the three together, and each alone, at equal bytes", "1 to 5 min per run"),
    "pareto": ("fronts of all methods and their peers", "`quick` 1 min, `queue` 2 h, `summary` 5 min"),
    "budget": ("pruning and precision under one byte budget", "2 to 5 min per run"),
    "dct": ("thresholded gradient exchange on two processes", "2 to 5 min per run; `overhead` 2 min"),
    "speed": ("time of a step as ratios to plain tables", "10 min per number of threads"),
    "profile": ("every hot path against the bandwidth of the memory", "3 min, and 3 GB"),
    "gpu": ("kernels, steps, events and serving on a GPU", "12 min; needs a GPU and 32 GB"),
    "memory": ("peak resident memory of whole training processes", "5 min, and 4 GB"),
    "scale": ("cost of a step as rows, columns, batch, tables and processes grow", "25 min, and 12 GB"),
    "scale_ranks": ("the part of it with several processes", "3 min"),
    "communication": ("bytes and time of a step over a slow link", "10 min; needs root and iproute2"),
    "serving": ("lookups, load time and memory of exported tables", "5 min"),
    "strategy": ("a sharded step against a hand-written loop", "2 min"),
    "plans": ("sharding plans against TorchRec's own", "1 min"),
    "plots": ("draws all figures from the results", "10 s"),
}
NAMES = {name: told for name, told in _ALL.items() if find_spec(f"benchmarks.{name}")}
"""What each benchmark measures, and about how long it takes."""


def listing() -> str:
    """All benchmarks as text."""
    lines = [f"  {name:14} {what} ({how_long})" for name, (what, how_long) in NAMES.items()]
    return "\n".join(["usage: python -m benchmarks NAME [...]", "", *(__doc__ or "").strip().splitlines(), "", *lines])


def main(arguments: list[str]) -> None:
    """Run one benchmark as if its module had been called.

    Args:
        arguments: Name of the benchmark, and what it is given.

    Raises:
        SystemExit: If there is no such benchmark.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return
    name = arguments[0]
    if name not in NAMES:
        raise SystemExit(f"there is no benchmark {name!r}: choose one of {', '.join(NAMES)}")
    sys.argv = [f"python -m benchmarks {name}", *arguments[1:]]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
