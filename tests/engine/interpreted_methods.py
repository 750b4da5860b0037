"""Train engines with counters, rates and rounding through the Triton kernels, run by Triton's interpreter, and through
the CPU kernels; print JSON."""

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_embcomp.engine.counters import CounterSettings, share_counters
from lightning_embcomp.engine.rates import RunningRates, TableRates, set_rates
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.row_class import TrainedRows
from lightning_embcomp.kernels.dispatch import force_backend
from tests.methods.mpe import test_module as rounding

from .engines import batch, make_engine, random_codes, read_all

STEPS = 3


def counted(settings: CounterSettings, fused: bool, cap: float) -> list[Tensor]:
    """Rows and counters after some steps; one of the tables is counted only."""
    engine = make_engine("sgd" if fused else None, random_codes(1))
    counters = share_counters(engine, [0, 1, 2], settings, "test")
    for t in (0, 2):
        set_rates(engine, t, TableRates(RunningRates(counters), cap), "test")
    for rows in engine.classes:
        if isinstance(rows, TrainedRows):
            rows.learning_rate = 0.05
    optimizer = None if fused else torch.optim.SGD(engine.parameters(), lr=0.05)
    for step in range(STEPS):
        engine(*batch(step)).sin().sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return [*read_all(engine), *(values for values in counters.values if values is not None)]


def rounded(temperature: float | None) -> list[Tensor]:
    """Rows, and what a search adds up."""
    engine, quantizer = rounding.make(temperature=temperature)
    engine.train()
    for _ in range(STEPS):
        engine(*rounding.batch(None, size=6)).sin().mean().backward()
    state = quantizer.state
    assert state.sums is not None
    measured = state.error if temperature is None else state.sums.shares
    return [*_rows(engine), state.sums.steps, state.sums.offset, measured, state.magnitude]


def _rows(engine: RoutedEmbeddings) -> list[Tensor]:
    return [engine.read_rows(t, 0, table.rows) for t, table in enumerate(engine.tables)]


CHECKS: dict[str, Callable[[], list[Tensor]]] = {
    "log counters": lambda: counted(CounterSettings(), True, 0.03),
    "real counters": lambda: counted(CounterSettings(encoding="exact", half_life=2.0), True, 0.03),
    "rows of another optimizer": lambda: counted(CounterSettings(counted="presence"), False, 0.03),
    "sensitivity": lambda: rounded(None),
    "softmax": lambda: rounded(3e-3),
}


def main() -> None:
    differences = {}
    for name, check in CHECKS.items():
        found = []
        for backend in ("cpu", "triton"):
            with force_backend(backend):
                found.append(torch.cat([part.flatten().double() for part in check()]))
        differences[name] = float(((found[0] - found[1]).abs() / (1 + found[0].abs())).max())
    json.dump(differences, sys.stdout)


if __name__ == "__main__":
    main()
