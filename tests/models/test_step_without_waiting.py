"""A training step of the whole model on a GPU, rehearsed without one: what would wait for the device raises."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec.models.dlrm import InteractionArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning, NonFiniteLossError
from lightning_embcomp import callback as callback_module
from lightning_embcomp.engine import extent, routed
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.route import watch
from lightning_embcomp.models import ClickModel, click_model

GPU = torch.device("cuda", 0)
FEATURES = [{"name": name, "num_embeddings": 50} for name in "abc"]


def compressed(architecture: Any) -> tuple[ClickModel, DimensionPruning]:
    callback = DimensionPruning(target=0.5)
    model = ClickModel(architecture, embedding_dim=8, features=FEATURES, num_dense=2)
    callback.setup(pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False), model, "fit")
    return model, callback


def interact(self: InteractionArch, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
    """TorchRec's own forward, but for brackets around tensors of indices, which ask PyTorch for a real GPU."""
    combined = torch.cat((dense_features.unsqueeze(1), sparse_features), dim=1)
    products = torch.bmm(combined, combined.transpose(1, 2))
    chosen = torch.ops.aten.index.Tensor(products, [None, *self.triu_indices.unbind()])
    return torch.cat((dense_features, chosen), dim=1)


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """There seems to be a GPU; kernels are not launched, and what they would report is not looked at."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    import lightning_embcomp.kernels.triton as shared

    def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, None, None]:
        return torch.empty(len(values), dtype=dtype, device=device), None, None

    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: None)
    monkeypatch.setattr(shared, "_constant", constant)
    monkeypatch.setattr(InteractionArch, "forward", interact)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    for module in (watch, extent, callback_module, click_model):
        monkeypatch.setattr(module, "report_later", lambda found, raise_for: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor", "ignore:You are trying to `self.log")
@pytest.mark.parametrize("architecture", ["dlrm", "dcn", "deepfm"])
def test_the_way_to_the_loss_does_not_wait(architecture: str, far_away: FakeTensorMode) -> None:
    from lightning_embcomp.kernels.triton import widths_and_runs

    model, callback = compressed(architecture)
    (engine,) = [module for module in model.modules() if isinstance(module, RoutedEmbeddings)]
    known = widths_and_runs(engine.columns)
    with far_away, torch.no_grad():  # autograd asks for the streams of a GPU
        model.to(GPU)
        engine.columns.__dict__["_widths_and_runs"] = known
        ids = torch.randint(0, 50, (12,), device=GPU)
        sparse = KeyedJaggedTensor(list("abc"), ids, lengths=torch.ones(12, dtype=torch.int64, device=GPU))
        batch = torch.rand(4, 2, device=GPU), sparse, torch.ones(4, device=GPU)
        model.train()
        loss = model.training_step(batch, 0)
        assert loss.device == GPU
        callback.on_before_backward(pl.Trainer(accelerator="cpu", logger=False), model, loss)


def test_what_a_gpu_reports_late_names_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, callback = compressed("dlrm")
    heard: list[Any] = []
    monkeypatch.setattr(callback_module, "report_later", lambda found, raise_for: heard.append(raise_for))
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    with FakeTensorMode():
        fake = torch.zeros((), device=GPU)
        callback.on_before_backward(trainer, model, fake)
    heard[0](0)
    monkeypatch.setattr(heard[0].args[0], "item", lambda: float("nan"), raising=False)
    with pytest.raises(NonFiniteLossError, match="the loss was nan at step 0, and the tables have been updated"):
        heard[0](1)


@pytest.mark.parametrize("hook", ["on_fit_end", "on_validation_end", "on_test_end", "on_predict_end"])
def test_what_is_late_comes_before_the_end(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, callback = compressed("dlrm")
    heard: list[tuple[torch.device, bool]] = []
    monkeypatch.setattr(callback_module, "check", lambda device, wait: heard.append((device, wait)))
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer.strategy._root_device = GPU  # type: ignore[attr-defined]
    getattr(callback, hook)(trainer, model)
    assert heard == [(GPU, True)]


def test_what_is_late_comes_before_tables_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Lightning asks no callback: for the weights alone."""
    model, _ = compressed("dlrm")
    heard: list[tuple[torch.device, bool]] = []
    for module in (routed, click_model):
        monkeypatch.setattr(module, "check", lambda device, wait: heard.append((device, wait)))
    model.state_dict()
    assert heard == [(torch.device("cpu"), True)]
    model.on_save_checkpoint({})
    model.on_fit_end()
    assert heard == [(torch.device("cpu"), True)] * 3
