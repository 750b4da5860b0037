"""Train engines through the Triton kernels, run by Triton's interpreter, and through the CPU kernels; print JSON."""

import json
import sys

import torch

from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.dispatch import force_backend

from .engines import TABLES, make_engine, plan_of, random_codes, read_all, train

RUNS: tuple[tuple[FusedKind, torch.dtype], ...] = (
    ("rowwise_adagrad", torch.float32),
    ("sgd", torch.float16),
    ("adagrad", torch.float32),
    ("adam", torch.float32),
    ("partial_rowwise_lamb", torch.float32),
)


def main() -> None:
    differences = {}
    for kind, dtype in RUNS:
        engines = []
        for backend in ("cpu", "triton"):
            engine = make_engine(kind, random_codes(1), dtype=dtype, mean=kind == "adagrad")
            engine.track_utility(RowUtility(TABLES, device=torch.device("cpu")))
            with force_backend(backend):  # type: ignore[arg-type]
                train(engine, 2, weighted=True)
                engine.move(plan_of(random_codes(2)))
                train(engine, 1, first=2)
            engines.append(engine)
        rows = [torch.cat([r.flatten().float() for r in read_all(engine)]) for engine in engines]
        utilities = [engine.utility.values.float() for engine in engines if engine.utility is not None]
        differences[f"{kind} {dtype}"] = [
            float((rows[0] - rows[1]).abs().max()),
            float(((utilities[0] - utilities[1]).abs() / (utilities[0].abs() + 1e-3)).max()),
        ]
    json.dump(differences, sys.stdout)


if __name__ == "__main__":
    main()
