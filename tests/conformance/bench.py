"""Fits of one case of the matrix, small and alike, in one process or as one of several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_embcomp import cli
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.models import ClickModel
from lightning_embcomp.strategies.weights import local_pieces

from .matrix import DIM, Case

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = (40, 300, 2000)
TINY = (
    *("--data.log.num_rows=1500", "--data.log.num_embeddings=[50,400]", "--data.batch_size=128"),
    *("--model.over_layers=[16]", "--model.dense_layers=[16]"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"),
)


class Data(SyntheticClickLogDataModule):
    """10 batches of a click log, or 5 on each of two processes."""

    def __init__(self) -> None:
        super().__init__(SyntheticClickLog(num_rows=800, num_embeddings=ROWS, num_dense=2), batch_size=64)


@dataclass
class Fitted:
    """A run that has ended."""

    module: ClickModel
    callback: pl.Callback
    runner: pl.Trainer

    def held_bytes(self) -> int:
        return sum(engine_bytes(engine) for host in hosts(self.module) for engine in host.engines)


class Bench:
    """Makes models, callbacks and runs of a case.

    Args:
        case: The case.
        folder: Where its runs may write.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder

    def model(self, built: bool = False, **settings: Any) -> ClickModel:
        """The same start every time; ``built`` has its tables before the trainer sees it."""
        torch.manual_seed(3)
        small: dict[str, Any] = {"embedding_dim": DIM, "dense_layers": (8,), "over_layers": (16,)}
        small |= {"features": Data().features, "num_dense": 2} if built else {}
        module = ClickModel(**{**small, **self.case.settings, **settings})
        if built:
            module.configure_model()
        return module

    def callback(self, **settings: Any) -> pl.Callback:
        """A new instance."""
        return self.case.make(self.folder, **settings)

    def trainer(self, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        given: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": self.case.processes,
            "strategy": settings.pop("strategy", self.case.strategy)(),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "default_root_dir": self.folder,
        }
        return pl.Trainer(callbacks=list(callbacks), **{**given, **settings})

    def fit(self, module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        """Train; with the same random numbers every time."""
        path = settings.pop("ckpt_path", None)
        runner = self.trainer(*callbacks, **settings)
        torch.manual_seed(4)
        runner.fit(module, datamodule=Data(), ckpt_path=path)
        return runner

    def run(self, *callbacks: pl.Callback, **settings: Any) -> Fitted:
        """A new model, trained with the callback of the case in front of others."""
        callback, module = self.callback(), self.model()
        return Fitted(module, callback, self.fit(module, callback, *callbacks, **settings))

    @cached_property
    def fitted(self) -> Fitted:
        """An ordinary run; no check may change it."""
        return self.run()

    @cached_property
    def continued(self) -> dict[str, Tensor]:
        """What a second fit of a fitted module, by another trainer and instance, leaves."""
        first = self.run()
        self.fit(first.module, self.callback(), max_epochs=1)
        return everything(first.module)

    def plain_bytes(self) -> int:
        return sum(4 * DIM * rows for rows in ROWS)

    def command(self, *arguments: str) -> None:
        """Run ``embcomp`` in a folder of its own."""
        folder, environment = self.folder / "command", dict(os.environ)
        folder.mkdir(exist_ok=True)
        try:
            with in_folder(folder), replaced(sys, "argv", ["embcomp", *arguments]):
                cli.main()
        finally:
            os.environ.clear()  # the seed of the command would be that of all later runs
            os.environ.update(environment)


def hosts(module: nn.Module) -> list[EngineHost]:
    return [part for part in module.modules() if isinstance(part, EngineHost)]


def everything(module: nn.Module) -> dict[str, Tensor]:
    """All that this process holds of a model: parameters, buffers, rows, optimizer state in the tables, counters."""
    found: dict[str, Tensor] = {}
    held = tuple(path for path, part in module.named_modules() if isinstance(part, EngineHost))
    spread = any(host.group.size > 1 for host in hosts(module))
    # A strategy writes the state of tables that are spread over processes; their rows follow below.
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())} if spread else module.state_dict()
    for key, value in state.items():
        if "metrics" in key or (spread and key.startswith(held)):
            continue
        pieces = [((), value)] if type(value) in (Tensor, nn.Parameter) else local_pieces(value)
        found |= {f"{key}{at or ''}": piece.detach().clone() for at, piece in pieces}
        if type(value) not in (Tensor, nn.Parameter):
            found |= _of_all({name: piece for name, piece in found.items() if name.startswith(key)})
    for h, host in enumerate(hosts(module)):
        for e, engine in enumerate(host.engines):
            tensors = [storage.tensor for rows in engine.classes for storage in rows.storages().values()]
            tensors.append(engine.router.tensors.words)
            if engine.utility is not None:
                tensors += [engine.utility.values, engine.utility.gain]
            for attached in engine.attached.values():
                tensors += attached.held(len(engine.tables))
            found |= {f"engine {h} {e} {i}": tensor.detach().clone() for i, tensor in enumerate(tensors)}
    return found


def _of_all(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pieces of all processes: tables may move between them."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return {name: piece for pieces in found for name, piece in pieces.items()}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), (where, one.keys() ^ other.keys())
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, Sequence) and not isinstance(one, str):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert one == other or (one != one and other != other), (where, one, other)


def logits(module: nn.Module) -> Tensor:
    """Logits of the first validation batch; all processes call it."""
    source = Data()
    source.setup("validate")
    loader: Any = source.val_dataloader()
    dense, sparse, _ = next(iter(loader))
    module.eval()
    with torch.no_grad():
        found: Tensor = module(dense, sparse)
    module.train()
    return found


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
