"""One of several processes of test_callback; run with a folder and the name of a check."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcomp.callback import SetupError
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.methods.dct.callback import GradientThresholding
from lightning_embcomp.methods.dct.config import ErrorFeedback
from lightning_embcomp.models import ClickModel
from lightning_embcomp.strategies import TorchRecStrategy

FOLDER = Path(sys.argv[1])
WORLD = int(os.environ["WORLD_SIZE"])


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # By the batches done so far, so that a resumed run sees what it has not seen yet.
        generator = torch.Generator().manual_seed(2 * self.trainer.fit_loop.total_batch_idx + self.global_rank)
        x = torch.randn(8, 20, generator=generator)
        loss: Tensor = ((self.net(x) - (x[:, :1] - x[:, 1:2]).relu()) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def run(
    callbacks: list[pl.Callback], steps: int = 12, ckpt: Path | None = None, **settings: Any
) -> tuple[Regression, pl.Trainer]:
    module = Regression()
    strategy = settings.pop("strategy", None) or DDPStrategy(timeout=timedelta(seconds=120), bucket_cap_mb=0.001)
    trainer = pl.Trainer(
        max_steps=steps,
        strategy=strategy,
        accelerator="cpu",
        devices=WORLD,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **settings,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.arange(100.0))), ckpt_path=ckpt)
    return module, trainer


def thresholding(density: float = 0.1, warmup_steps: int = 2, **settings: Any) -> GradientThresholding:
    return GradientThresholding(density, warmup_steps=warmup_steps, log_every_n_steps=4, **settings)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def equals_plain() -> None:
    """Density 1 under Lightning, also with gradient accumulation, clipping and bf16."""
    for settings in ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}):
        plain, _ = run([], **settings)
        callback = thresholding(1.0)
        mine, trainer = run([callback], **settings)
        assert torch.equal(weights(plain), weights(mine)), settings
        assert callback.exchange is not None and callback.exchange.steps == 12
        # Gradients of units that are never active are zero, and not sent.
        assert 0.5 < trainer.callback_metrics["dct/density"] <= 1


def resume() -> None:
    """A run that is interrupted ends with the bits of one that is not, with every kind of feedback."""
    for kind in ("ec", "ef21", "econtrol", "none"):
        feedback = ErrorFeedback(kind=kind)
        through, _ = run([thresholding(feedback=feedback)], steps=12)
        path = FOLDER / f"{kind}-{WORLD}.ckpt"
        first = thresholding(feedback=feedback)
        _, trainer = run([first], steps=6)
        trainer.save_checkpoint(path)
        second = thresholding(feedback=feedback)
        resumed, _ = run([second], steps=12, ckpt=path)
        assert torch.equal(weights(through), weights(resumed)), kind
        assert second.exchange is not None and second.exchange.steps == 12


def write() -> None:
    """Leave checkpoints, and the residuals of all processes."""
    for kind in ("ec", "ef21", "econtrol"):
        callback = thresholding(feedback=ErrorFeedback(kind=kind))
        _, trainer = run([callback], steps=6)
        trainer.save_checkpoint(FOLDER / f"{kind}.ckpt")


def read() -> None:
    """Another number of processes starts from the mean of what was saved."""
    for kind in ("ec", "ef21", "econtrol"):
        path = FOLDER / f"{kind}.ckpt"
        saved = torch.load(path, weights_only=True)["callbacks"]["GradientThresholding[*]"]
        assert saved["world_size"] == len(saved["ranks"]) != WORLD
        callback = thresholding(feedback=ErrorFeedback(kind=kind))
        compare = Compare(callback, list(saved["ranks"].values()))
        module, _ = run([callback, compare], steps=12, ckpt=path)
        assert any(compare.seen)
        first = weights(module)
        dist.broadcast(first, 0)
        assert torch.equal(first, weights(module))


class Compare(pl.Callback):
    """Compares what a callback starts from with the mean of saved states."""

    def __init__(self, callback: GradientThresholding, ranks: list[dict[str, Any]]) -> None:
        self.callback, self.ranks = callback, ranks
        self.seen: list[bool] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.callback.exchange is not None and self.callback.exchange.steps == 6
        for name, parameter in self.callback.exchange.state.items():
            for key in ("residual", "estimate", "mean", "average"):
                states = [rank["parameters"][name].get(key) for rank in self.ranks]
                mine = getattr(parameter, key)
                assert (mine is None) == (states[0] is None)
                if mine is not None:
                    torch.testing.assert_close(mine, torch.stack(states).mean(0))
                    self.seen.append(bool(mine.any()))


def skipped_steps() -> None:
    """A loss scale that overflows on one process: the step is skipped everywhere, and residuals stay as they were."""
    states: list[dict[str, Any]] = []

    class Overflow(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
            if len(states) == 4 and trainer.global_rank == 1:
                # The first layer's bucket is the last that is exchanged: those before it are done by then.
                self.handle = pl_module.net[0].bias.register_hook(lambda g: g + torch.inf)

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            assert callback.exchange is not None
            states.append(callback.exchange.state_dict()["parameters"])
            if len(states) == 5 and trainer.global_rank == 1:
                self.handle.remove()

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    callback = thresholding(warmup_steps=1)
    module, _ = run([callback, Overflow()], steps=8, plugins=[plugin])
    assert plugin.scaler is not None and plugin.scaler.get_scale() == 512.0
    for name in ("net.0.weight", "net.2.weight"):
        before, skipped, after = (state[name] for state in states[3:6])
        assert before["residual"].any() and torch.equal(before["residual"], skipped["residual"])
        assert before["threshold"] == skipped["threshold"]
        assert not torch.equal(skipped["residual"], after["residual"])
    assert bool(torch.isfinite(weights(module)).all())


def refusals() -> None:
    """What another callback, hook or strategy does already."""
    hooked = DDPStrategy(ddp_comm_hook=allreduce_hook)
    for callbacks, settings, message in (
        (
            [thresholding(), thresholding(parameters="net.*")],
            {},
            "both GradientThresholding[*] and GradientThresholding[net.*]",
        ),
        ([thresholding()], {"strategy": hooked}, "both GradientThresholding[*] and allreduce_hook"),
        ([Registers(), thresholding()], {}, "both GradientThresholding[*] and allreduce_hook"),
        (
            [thresholding(parameters="nett.*")],
            {},
            "no parameter that processes exchange matches 'nett.*'. They are: net.0",
        ),
        ([thresholding(min_numel=10_000)], {}, "nothing would be thresholded"),
    ):
        try:
            run(callbacks, **settings)  # type: ignore[arg-type]
        except SetupError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")
    try:
        run([thresholding(), Registers()])
    except RuntimeError as error:
        assert "register_comm_hook" in str(error), error
    else:
        raise AssertionError("a hook after ours was not refused")


class Restored(pl.Callback):
    """Keeps what the callback starts with."""

    def __init__(self, callback: GradientThresholding) -> None:
        self.callback, self.state = callback, {}  # type: ignore[var-annotated]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.callback.exchange is not None
        self.state = self.callback.exchange.state_dict()


def fit_sharded(callbacks: list[pl.Callback], steps: int, ckpt: Path | None = None) -> tuple[pl.Trainer, Tensor]:
    log = SyntheticClickLog(num_rows=2000, num_embeddings=(40, 300))
    trainer = pl.Trainer(
        max_steps=steps,
        strategy=TorchRecStrategy(timeout=timedelta(seconds=120)),
        accelerator="cpu",
        devices=WORLD,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    torch.manual_seed(0)
    model = ClickModel(embedding_dim=8, over_layers=(32, 16), dense_layers=(32,))
    trainer.fit(model, SyntheticClickLogDataModule(log, batch_size=32), ckpt_path=ckpt)
    dense = [p.detach().flatten() for name, p in model.named_parameters() if "embedding" not in name]
    return trainer, torch.cat(dense)


def sharded() -> None:
    """Under the strategy that shards tables: density 1 is plain, and each process finds its own state again."""
    _, plain = fit_sharded([], 6)
    _, whole = fit_sharded([thresholding(1.0)], 6)
    assert torch.equal(plain, whole)
    first = thresholding()
    trainer, weights_then = fit_sharded([first], 6)
    path = FOLDER / "sharded.ckpt"
    trainer.save_checkpoint(path)
    assert first.exchange is not None and first.total.sent < 0.7 * first.total.dense
    second = thresholding()
    restored = Restored(second)
    fit_sharded([second, restored], 9, path)
    assert same(restored.state, first.exchange.state_dict())
    assert all(state["residual"].any() for state in restored.state["parameters"].values())
    equal = weights_then.clone()
    dist.broadcast(equal, 0)
    assert torch.equal(equal, weights_then)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


class Registers(pl.Callback):
    """Sets a hook of its own."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, allreduce_hook)  # type: ignore[union-attr,operator]


CHECKS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (equals_plain, resume, write, read, skipped_steps, refusals, sharded)
}


def main() -> None:
    """Run the checks that are named."""
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        CHECKS[name]()
        print(name, "passed", flush=True)
    print("all checks passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
