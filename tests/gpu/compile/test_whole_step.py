"""Whole training steps on a GPU: nothing waits; compiled and captured dense layers beside tables that prune."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_embcomp import DimensionPruning, NonFiniteLossError, PruningSchedule
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.models import ClickModel
from lightning_embcomp.models.click_model import Batch
from tests.engine.engines import batch, make_engine
from tests.export.pipeline import Clicks, click_model

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
DENSE = ("dense_arch", "inter_arch", "over_arch")
EVENT = 6


class NoWaiting(pl.Callback):
    """From the first hook of a step to its last, what makes the host wait is an error; not at a pruning event."""

    def __init__(self, first: int, event: int) -> None:
        self.first, self.event, self.steps = first, event, 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= self.first and (batch_idx + 1) % self.event:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() != 0
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("architecture", ["dlrm", "dcn", "deepfm"])
def test_no_step_of_a_trainer_waits(architecture: str, precision: Any) -> None:
    """Lookup, utilities, update, dense optimizer, logging and what Lightning does in between."""
    guard = NoWaiting(first=3, event=5)
    pruning = DimensionPruning(target=0.5, schedule=PruningSchedule(every_n_steps=5, early_steps=()))
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        log_every_n_steps=1000,
        callbacks=[guard, pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(click_model(architecture=architecture), datamodule=Clicks())
    assert guard.steps == 7  # 12 steps, without the first three and two events


def test_a_loss_that_is_not_finite_is_reported_late() -> None:
    data = Clicks()
    data.batches[4][0][0] = torch.nan
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        callbacks=[DimensionPruning(target=0.5)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at global step 4 .*dense features"):
        trainer.fit(click_model(), datamodule=data)


def losses(prepare: Callable[[nn.Module, list[Batch]], Any]) -> list[float]:
    """Twelve steps of a DLRM with a pruning event in between."""
    pruning = DimensionPruning(target=0.5)
    model: ClickModel = click_model()
    pruning.setup(pl.Trainer(callbacks=[pruning], accelerator="cpu", logger=False), model, "fit")
    model.to(GPU).train()
    batches = [(dense.to(GPU), sparse.to(GPU), label.to(GPU)) for dense, sparse, label in Clicks().batches]
    assert model.model is not None and pruning.pruner is not None
    prepare(model.model, batches)
    optimizer = model.configure_optimizers()
    found = []
    for step, (dense, sparse, label) in enumerate(batches):
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, sparse), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
        if step == EVENT:
            pruning.pruner.step(0.98)
    return found


def close(found: list[float], wanted: list[float]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("parts", [("",), DENSE], ids=["whole", "dense"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_layers_train_like_plain_ones(parts: tuple[str, ...], mode: str) -> None:
    torch._dynamo.reset()

    def compiled(model: nn.Module, batches: list[Batch]) -> None:
        for part in parts:
            model.get_submodule(part).compile(mode=mode)

    close(losses(compiled), losses(lambda model, batches: None))


def test_captured_layers_train_like_plain_ones() -> None:
    """``make_graphed_callables`` on the layers below and above the tables."""

    def captured(model: nn.Module, batches: list[Batch]) -> None:
        seen: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, given, name=name: seen.update({name: given[0].detach().clone()})  # type: ignore[misc]
            )
            for name in ("dense_arch", "over_arch")
        ]
        with torch.no_grad():
            model(*batches[0][:2])
        for hook in hooks:
            hook.remove()
        seen["over_arch"].requires_grad_()
        for name, sample in seen.items():
            setattr(model, name, torch.cuda.make_graphed_callables(model.get_submodule(name), (sample,)))

    close(losses(captured), losses(lambda model, batches: None))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_tables_that_train_refuse_to_be_captured() -> None:
    engine: RoutedEmbeddings = make_engine("sgd").to(GPU)
    ids, offsets, _ = batch(0)
    ids, offsets = ids.to(GPU), offsets.to(GPU)
    engine(ids, offsets)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        engine(ids, offsets)
    engine(ids, offsets).sum().backward()
