"""One of the processes in which checks of the matrix run: ``FOLDER CASE CHECK...``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.conformance.bench import Bench
from tests.conformance.checks import CHECKS
from tests.conformance.matrix import MATRIX
from tests.conformance.pairs import check_pair


def outcome(name: str, what: str, bench: Bench) -> dict[str, Any] | None:
    """None if the check passes; else what it raised."""
    try:
        if what.startswith("with "):
            check_pair(name, what.removeprefix("with "), bench.folder)
        else:
            CHECKS[what](bench)
    except (Exception, SystemExit) as error:
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
        return {"kinds": kinds, "says": str(error), "trace": traceback.format_exc()}
    return None


if __name__ == "__main__":
    folder, case, *names = sys.argv[1:]
    shared = Bench(MATRIX[case], Path(folder))
    said = {}
    for each in names:
        said[each] = outcome(case, each, shared)
        if os.environ["RANK"] == "0":
            print("OUTCOME", json.dumps({each: said[each]}), flush=True)
    print("RESULT", json.dumps(said), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)
