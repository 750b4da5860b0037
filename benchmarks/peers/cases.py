"""What is trained at every point of the Pareto plots, and the forms in which it is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from benchmarks.combined import SearchedLevel
from benchmarks.peers.folded import FoldedBags, Unreachable, hashed, quotient_remainder
from benchmarks.peers.half import HalfBags
from benchmarks.peers.magnitude import pruned_to, sparse_bytes
from benchmarks.peers.pep import START, ThresholdedBags, ThresholdSearch
from benchmarks.peers.restart import Restart
from benchmarks.peers.rounding import rounded_all
from benchmarks.peers.tables import fused_states, fused_tables, replaced
from lightning_embcomp import DimensionPruning, FrequencyAwareLR, Granularity, MixedPrecisionSearch, PrecisionSearch
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.export import build, hosts_of, serve
from lightning_embcomp.export.accounting import serving_bytes
from lightning_embcomp.export.evaluation import swapped
from lightning_embcomp.models import ClickModel
from lightning_embcomp.models.click_model import EMBEDDINGS_PATH
from lightning_embcomp.models.collections import EmbeddingOptimizer
from lightning_embcomp.surgery import replace

DIM = 16
LEVELS = (2, 5, 10, 20, 50)
ROW_WEIGHTS, ROW_STATE = 4 * DIM, 4
"""Bytes of a plain row: float32 weights, and the state of row-wise Adagrad."""
ADAGRAD, COUNTED, ADAM = "adagrad", "counted", "adam"
_EMBEDDING_OPTIMIZER: dict[str, EmbeddingOptimizer] = {COUNTED: "sgd", ADAM: "none", ADAGRAD: "rowwise_adagrad"}
OPTIMIZER = {"rates": COUNTED, "rates_pruning": COUNTED, "together": COUNTED, "pep": ADAM}
"""What trains the tables; row-wise Adagrad where a method is not listed."""
METHODS: dict[str, tuple[int, ...]] = {
    "plain": (1,),
    "pruning": (2, 5, 10, 20),
    "hashing": LEVELS,
    "rows": (2, 5, 10, 20),
    "precision": (5, 10, 20, 50),
    "restart": (1,),
    "together": (10, 20, 50),
    "qr": (5, 10, 50),
    "fp16": (1,),
    "rates": (1,),
    "rates_pruning": (2, 10),
    "pep": (5, 20),
}
"""Levels of each method: plain over held bytes, in training or, of ``pep``, ``precision`` and ``together``, served."""
SEARCHES = ("restart", "pep", "precision", "together")
PRUNED_SHARE = {10: 0.65, 20: 0.8, 50: 0.8}
"""What pruning takes of the weights in ``together``, by level; the rest is left to the bits."""

Form = Callable[[], AbstractContextManager[int]]
"""Puts a served form into the model for the length of a block, and gives its bytes."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every method is given.

    Args:
        features: Records of the categorical features.
        num_dense: Dense inputs.
        steps: Steps per epoch.
        rates: Rate of the tables by optimizer.
        search: Epochs of a search, for methods with one.
        sparse_levels: Levels of unstructured pruning after training.
    """

    features: list[dict[str, Any]]
    num_dense: int
    steps: int
    rates: dict[str, float]
    search: int
    sparse_levels: tuple[int, ...] = LEVELS

    @property
    def rows(self) -> list[int]:
        """Rows of each table."""
        return [feature["num_embeddings"] for feature in self.features]

    @property
    def weights(self) -> int:
        """Bytes of the plain tables."""
        return sum(self.rows) * ROW_WEIGHTS

    @property
    def training(self) -> int:
        """Bytes of the plain tables in training."""
        return sum(self.rows) * (ROW_WEIGHTS + ROW_STATE)


@dataclass(kw_only=True)
class Case:
    """A model with what goes along.

    Args:
        model: The model.
        callbacks: What is under test.
        searching: Whether validations do not count yet.
        extra_epochs: Epochs of the search.
        forms: Served forms of the trained model, by name.
    """

    model: ClickModel
    callbacks: list[pl.Callback] = field(default_factory=list)
    searching: Callable[[], bool] = lambda: False
    extra_epochs: int = 0
    forms: dict[str, Form] = field(default_factory=dict)


def make(method: str, level: int, task: Task, scale: float = 1.0) -> Case:
    """Build one case.

    Args:
        method: One of :data:`METHODS`.
        level: One of its levels.
        task: What it is given.
        scale: Factor on the rate of the tables.

    Raises:
        Unreachable: If the method cannot get that small.
    """
    optimizer = OPTIMIZER.get(method, ADAGRAD)
    model = ClickModel(
        embedding_dim=DIM,
        over_layers=(256, 128),
        embedding_optimizer=_EMBEDDING_OPTIMIZER[optimizer],
        embedding_lr=scale * task.rates[optimizer],
        dense_lr=1e-3,
        features=task.features,
        num_dense=task.num_dense,
    )
    case = Case(model=model, extra_epochs=task.search if method in SEARCHES else 0)
    budget = task.training // level
    if method in ("hashing", "qr"):
        total = budget // (ROW_WEIGHTS + ROW_STATE)
        whole = [index for index, feature in enumerate(task.features) if feature["multi_valued"]]
        folds = hashed(task.rows, total) if method == "hashing" else quotient_remainder(task.rows, total, whole)
        _put_in(model, FoldedBags(task.features, folds, DIM, model.embedding_lr))
    elif method == "fp16":
        _put_in(model, HalfBags(task.features, DIM, model.embedding_lr))
    elif method == "restart":
        restart = Restart(task.search)
        case.callbacks, case.searching = [restart], lambda: restart.searching
    elif method == "pep":
        _add_thresholds(case, task, task.weights // level)
    else:
        _add_own(case, method, level, budget, task.search)
    if not case.forms:
        case.forms = _plain_forms(case, task, magnitudes=method in ("plain", "restart"))
    return case


def _put_in(model: ClickModel, module: nn.Module) -> None:
    """Put another collection in the place of the plain one."""
    model.configure_model()
    assert model.model is not None
    replace(model.model, EMBEDDINGS_PATH, module)


def _add_thresholds(case: Case, task: Task, size: int) -> None:
    # At Adam's first rate an unused threshold crosses from its start to zero in a third of the search; the rate falls.
    gain = -3 * START / (case.model.embedding_lr * task.search * task.steps)
    bags = ThresholdedBags(task.features, DIM, gain)
    _put_in(case.model, bags)
    search = ThresholdSearch(bags, size, task.search, every=max(1, task.steps // 40))
    case.callbacks, case.searching = [search], lambda: search.searching
    case.forms = {"sparse": lambda: _as_is(sparse_bytes(bags.kept))}


def _add_own(case: Case, method: str, level: int, budget: int, search: int) -> None:
    if method in ("rows", "pruning", "rates_pruning"):
        granularity = Granularity(chunks=1) if method == "rows" else Granularity()
        case.callbacks.append(DimensionPruning(budget=budget, granularity=granularity))
    if method == "together":
        case.callbacks.append(DimensionPruning(target=PRUNED_SHARE[level]))
    if method in ("precision", "together"):
        precision = MixedPrecisionSearch(ratio=level, search=PrecisionSearch(epochs=search))
        case.callbacks = [SearchedLevel(precision, level), *case.callbacks, precision]
        case.searching = lambda: precision.training is None or precision.training.searching
        case.forms = {"packed": lambda: _exported(case.model, 8, "packed")}
    if OPTIMIZER.get(method) == COUNTED:
        case.callbacks.append(FrequencyAwareLR())


def _plain_forms(case: Case, task: Task, *, magnitudes: bool) -> dict[str, Form]:
    """Tables as they were trained, and rounded row by row after training; sparse ones of plain tables."""
    forms: dict[str, Form] = {
        "as trained": lambda: _trained(case.model),
        "8 bits": lambda: _rounded(case.model, 8),
        "4 bits": lambda: _rounded(case.model, 4),
        "2 bits": lambda: _rounded(case.model, 2),
    }
    if magnitudes:
        for level in task.sparse_levels:
            forms[f"sparse {level}"] = lambda level=level: _sparse(case.model, task.weights // level)  # type: ignore[misc]
    return forms


def _routed(model: nn.Module) -> list[RoutedHost]:
    return [module for module in model.modules() if isinstance(module, RoutedHost)]


@contextmanager
def _as_is(size: int) -> Iterator[int]:
    yield size


def _trained(model: ClickModel) -> AbstractContextManager[int]:
    if _routed(model):
        return _exported(model, 32, "fbgemm")
    return _as_is(sum(_size(table) for table in fused_tables(model)))


@contextmanager
def _rounded(model: ClickModel, bits: int) -> Iterator[int]:
    if _routed(model):
        with _exported(model, bits, "fbgemm") as size:
            yield size
        return
    tables = fused_tables(model)
    values, size = rounded_all(tables, bits)
    with replaced(tables, values):
        yield size


@contextmanager
def _sparse(model: ClickModel, size: int) -> Iterator[int]:
    tables = fused_tables(model)
    values, found = pruned_to(tables, size)
    with replaced(tables, values):
        yield found


@contextmanager
def _exported(model: ClickModel, bits: int, file_format: str) -> Iterator[int]:
    artefact = build(hosts_of(model), bits, format=file_format)  # type: ignore[arg-type]
    served = serve(artefact)
    [host] = artefact.manifest.hosts
    with swapped(model, {host.path: served}):
        yield serving_bytes(served, artefact.manifest).total


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def held_bytes(trainer: pl.Trainer, model: nn.Module) -> int:
    """Bytes of the tables in training with all that belongs to them, from the storages."""
    routed = _routed(model)
    if routed:
        return sum(engine_bytes(host.engine) for host in routed)
    total = sum(_size(tensor) for tensor in [*fused_tables(model), *fused_states(model)])
    for bags in (module for module in model.modules() if isinstance(module, ThresholdedBags)):
        own: list[Tensor | None] = [bags.values, bags.moved, bags.mask, bags.initial]
        for optimizer in trainer.optimizers:
            own += [value for p in (bags.values, bags.moved) for value in optimizer.state.get(p, {}).values()]
        total += sum(_size(tensor) for tensor in own if tensor is not None)
    return total


__all__ = ["LEVELS", "METHODS", "SEARCHES", "Case", "Form", "Task", "Unreachable", "held_bytes", "make"]
