"""The Triton kernel that updates rows with two moments, and its stochastic rounding, against the plain twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.kernels.route import find
from lightning_embcomp.kernels.types import IdRoutes
from lightning_embcomp.kernels.update import UpdateRule, update_rows

from .cases import Case
from .test_moments import SUMS, dyadic, rule_of, states_of
from .triton_runs import ALL, SOME, add, close, on, on_device, random, run, strided, twin

STEP = 5


def routes_of(case: Case) -> IdRoutes:
    return twin(
        lambda: find(case.ids_tensor(), case.offsets_tensor(), case.layout(), case.router.tensors, case.classes)
    )


def check_moments(device: torch.device, name: str, kind: str, dtype: torch.dtype) -> None:
    case = ALL[name]
    rules = [rule_of(kind, learning_rate=0.1 * (c + 1)) for c in range(case.classes)]
    first, second = map(case.class_tables, states_of(case, kind))
    tables = [table.to(dtype) for table in case.class_tables(case.full)]
    grad = random(*case.layout().shape, seed=3).to(dtype)
    rest: Any = (routes_of(case), case.offsets_tensor(), case.weights_tensor(), case.layout(), case.columns)

    def update(fresh: Sequence[Any], grad: Tensor, arguments: Any) -> list[Any]:
        rows, one, other = fresh
        given = (rows, one, rules, grad, *arguments, None, None, other, STEP)
        update_rows(*given)
        return [*rows, *one, *other]

    theirs, moved = strided(on(device, grad)), on_device(device, *rest)
    fresh = [on(device, [tables, first, second]) for _ in range(2)]
    found = run(device, lambda: update(fresh.pop(), theirs, moved))
    wanted = twin(lambda: update(on(torch.device("cpu"), [tables, first, second]), grad.float(), rest))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    close(found, wanted, rtol=tolerance, atol=tolerance)


def check_rounding(device: torch.device) -> None:
    """Sums are exact, so that every bit agrees."""
    rules = [UpdateRule(kind="sgd", learning_rate=0.5, stochastic_rounding=True)] * SUMS.classes
    full, grad = dyadic(SUMS)
    before = [table.half() for table in SUMS.class_tables(full)]
    rest: Any = (routes_of(SUMS), SUMS.offsets_tensor(), None, SUMS.layout(), SUMS.columns)

    def update(tables: list[Tensor], grad: Tensor, arguments: Any) -> list[Tensor]:
        given = (tables, [None] * SUMS.classes, rules, grad, *arguments, None, None, None, STEP)
        update_rows(*given)
        return tables

    theirs, moved = strided(on(device, grad)), on_device(device, *rest)
    fresh = [on(device, before) for _ in range(2)]
    found = run(device, lambda: update(fresh.pop(), theirs, moved))
    wanted = twin(lambda: update(on(torch.device("cpu"), before), grad, rest))
    close(found, wanted, rtol=0, atol=0)


add(
    check_moments,
    *[(name, "adam", torch.float32) for name in SOME if name != "nothing_stored"],
    ("odd", "lamb", torch.float32),
    ("duplicates", "partial_rowwise_adam", torch.float32),
    ("odd", "partial_rowwise_adam", torch.float16),
    ("hot", "partial_rowwise_lamb", torch.float32),
)
add(check_rounding, ())
