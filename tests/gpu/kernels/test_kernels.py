"""Triton kernels on a GPU: the checks of the interpreter, while waiting for the device is an error, and larger ones."""

from collections.abc import Callable

import pytest
import torch

from lightning_embcomp.kernels.update import UpdateRule, update_rows
from tests.kernels import triton_checks, triton_runs
from tests.kernels.cases import LARGE
from tests.kernels.triton_runs import CHECKS, on_device

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("name", CHECKS)
def test_kernel_equals_its_twin(name: str) -> None:
    CHECKS[name](DEVICE)


@pytest.mark.parametrize(
    ("check", "variant"),
    [
        (triton_checks.check_route, (torch.int64,)),
        (triton_checks.check_pool, (torch.float32, torch.int32)),
        (triton_checks.check_assembly, (torch.float32,)),
        (triton_checks.check_utility, ("peak_gradient", 2, torch.int64)),
        (triton_checks.check_count, (torch.uint8, True, torch.int32)),
        (triton_checks.check_update, ("sgd", torch.float32, True)),
    ],
)
def test_many_programs(
    check: Callable[..., None], variant: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs of every kernel, and rows with thousands of occurrences."""
    monkeypatch.setitem(triton_checks.ALL, "large", LARGE)
    monkeypatch.setattr(triton_runs, "CLOSE", {"rtol": 1e-4, "atol": 1e-4})
    check(DEVICE, "large", *variant)


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad"])
def test_updates_do_not_depend_on_timing(kind: str) -> None:
    tables = LARGE.class_tables(LARGE.full)
    shapes = [table.shape[:1] if kind == "rowwise_adagrad" else table.shape for table in tables]
    states = [None if kind == "sgd" else torch.full(shape, 0.1) for shape in shapes]
    ids, offsets, layout, router = on_device(DEVICE, *triton_checks.ids_of(LARGE))
    routes = triton_checks.find(ids, offsets, layout, router, LARGE.classes)
    grad = on_device(DEVICE, triton_checks.random(*LARGE.layout().shape))[0]
    columns = on_device(DEVICE, LARGE.columns)[0]
    rules = [UpdateRule(kind=kind, learning_rate=0.1)] * LARGE.classes  # type: ignore[arg-type]
    results = []
    for _ in range(3):
        rows, moments = on_device(DEVICE, tables, states)
        update_rows(rows, moments, rules, grad, routes, offsets, None, layout, columns)
        results.append([*rows, *(moment for moment in moments if moment is not None)])
    assert all(torch.equal(one, two) for other in results[1:] for one, two in zip(results[0], other, strict=True))
