"""What every public callback must do: one function per column of the matrix.

Each is given a :class:`~tests.conformance.bench.Bench`, and raises if something is wrong. The same functions run in one
process, and for callbacks that need them in each of several.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_embcomp.export import ExportOptions, export_module, hosts_of, load_model

from .bench import REPOSITORY, TINY, Bench, Data, assert_same, everything, logits

Check = Callable[[Bench], None]
CHECKS: dict[str, Check] = {}
"""Checks by the name of their column, in the order of the table."""


def check(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


@check("effect")
def effect(bench: Bench) -> None:
    bench.case.effect(bench)
    assert logits(bench.fitted.module).isfinite().all()


@check("resume")
def resume(bench: Bench) -> None:
    """After an epoch, bit for bit; the random numbers of the second process do not matter."""
    path = bench.folder / "epoch.ckpt"
    half, second = bench.run(max_epochs=1), bench.model()
    half.runner.save_checkpoint(path)
    runner = bench.trainer(bench.callback())
    torch.manual_seed(99)
    runner.fit(second, datamodule=Data(), ckpt_path=path)
    assert runner.global_step == bench.fitted.runner.global_step > half.runner.global_step
    assert_same(everything(bench.fitted.module), everything(second))


@check("resume within an epoch")
def resume_within(bench: Bench) -> None:
    saver = ModelCheckpoint(dirpath=bench.folder / "steps", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    through = bench.run(saver, enable_checkpointing=True, max_epochs=1)
    second = bench.model()
    bench.fit(second, bench.callback(), max_epochs=1, ckpt_path=bench.folder / "steps" / "step=3.ckpt")
    assert_same(everything(through.module), everything(second))


@check("evaluation is pure")
def evaluation(bench: Bench) -> None:
    """No parameter, buffer, counter, optimizer state, callback state or random number moves."""
    fitted = bench.fitted
    before = copy.deepcopy((everything(fitted.module), fitted.callback.state_dict()))
    optimizers = copy.deepcopy([optimizer.state_dict() for optimizer in fitted.runner.optimizers])
    runner, plain, module = bench.trainer(bench.callback()), bench.trainer(), fitted.module
    saved = bench.folder / "evaluated.ckpt"
    fitted.runner.save_checkpoint(saved)
    moved: list[Any] = []
    for trainer, path in ((plain, None), (runner, saved)):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        trainer.validate(module, datamodule=Data(), verbose=False, ckpt_path=path)
        trainer.test(module, datamodule=Data(), verbose=False, ckpt_path=path)
        trainer.predict(module, datamodule=Data(), ckpt_path=path)
        numbers = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]  # type: ignore
        moved.append([*numbers, list(random.getstate()[1])])
        assert_same(before, (everything(module), fitted.callback.state_dict()))
    assert_same(moved[0], moved[1])
    assert_same(optimizers, [optimizer.state_dict() for optimizer in fitted.runner.optimizers])


@check("validation in between")
def validation_in_between(bench: Bench) -> None:
    often = bench.run(val_check_interval=4)
    assert_same(everything(bench.fitted.module), everything(often.module))


@check("sanity validation")
def sanity_validation(bench: Bench) -> None:
    checked = bench.run(num_sanity_val_steps=1)
    assert_same(everything(bench.fitted.module), everything(checked.module))


@check("export = evaluation")
def export(bench: Bench) -> None:
    """Rows that were rounded keep their bits; others are exported in float32, so that nothing is rounded here."""
    fitted = bench.fitted
    module = fitted.module
    hosts_of(module)  # on all processes, so that all are refused
    if fitted.runner.is_global_zero:
        export_module(module, bench.folder / "compared", ExportOptions(bits=32, overwrite=True))
    if dist.is_initialized():
        dist.barrier()
    served = load_model(str(bench.folder / "compared"), bench.model(**dict(module.hparams)))
    assert torch.equal(logits(served), logits(module))


@check("embcomp fit")
def command_line(bench: Bench) -> None:
    files = ("-c", str(REPOSITORY / "examples" / "dlrm.yaml"), "-c", str(REPOSITORY / bench.case.fragment))
    bench.command("fit", *files, *TINY, *bench.case.command)


def as_plain(bench: Bench, tolerance: float = 1e-6, model: dict[str, Any] | None = None, **settings: Any) -> None:
    """With settings that leave nothing to do, the run is that of the plain model; with an effect, it is finite."""
    settings.setdefault("max_epochs", 1)
    if model and model["embedding_optimizer"] != "none" and bench.case.fused_strategy:
        settings["strategy"] = bench.case.fused_strategy
    # Built before the trainer sees them: tables that are built compressed draw other numbers.
    plain, module, active = (bench.model(built=True, **(model or {})) for _ in range(3))
    neutral = bench.case.neutral(bench.folder) if bench.case.neutral else bench.callback()
    runners = [bench.fit(active, bench.callback(), **settings), bench.fit(module, neutral, **settings)]
    bench.fit(plain, **settings)
    torch.testing.assert_close(logits(module), logits(plain), rtol=tolerance, atol=tolerance)
    assert logits(active).isfinite().all()
    assert len({runner.global_step for runner in runners}) == 1


OWN = {"embedding_optimizer": "none"}
SGD = {**OWN, "dense_optimizer": "sgd", "dense_lr": 0.05, "embedding_lr": 1.0}
BF16_STEP = 2.0**-6
"""A difference in the last bit of float32 may become one of bfloat16, which later steps carry on."""


@check("SGD")
def sgd(bench: Bench) -> None:
    as_plain(bench, model=SGD)


@check("Adam")
def adam(bench: Bench) -> None:
    as_plain(bench, 1e-5, model={**OWN, "dense_optimizer": "adam", "embedding_lr": None})


@check("Adagrad")
def adagrad(bench: Bench) -> None:
    as_plain(bench, 1e-5, model={**OWN, "dense_optimizer": "adagrad", "embedding_lr": None})


@check("fused SGD")
def fused_sgd(bench: Bench) -> None:
    as_plain(bench, model={"embedding_optimizer": "sgd"})


@check("fused row-wise Adagrad")
def fused_adagrad(bench: Bench) -> None:
    as_plain(bench, model={"embedding_optimizer": "rowwise_adagrad", "embedding_lr": 0.02})


@check("bf16-mixed")
def bf16(bench: Bench) -> None:
    as_plain(bench, BF16_STEP, precision="bf16-mixed")


@check("16-mixed")
def fp16(bench: Bench) -> None:
    """On the CPU Lightning itself takes bfloat16, with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU. Using .*bf16-mixed.* instead")
        half = bench.run(precision="16-mixed")
    assert half.runner.precision == "bf16-mixed"
    assert_same(everything(half.module), everything(bench.run(precision="bf16-mixed").module))


@check("accumulation")
def accumulation(bench: Bench) -> None:
    as_plain(bench, model=SGD, accumulate_grad_batches=2)


@check("accumulation, fused")
def fused_accumulation(bench: Bench) -> None:
    bench.fit(bench.model(embedding_optimizer="sgd"), bench.callback(), accumulate_grad_batches=2)


@check("clipping")
def clipping(bench: Bench) -> None:
    as_plain(bench, model=SGD, gradient_clip_val=0.1)


@check("clipping, fused")
def fused_clipping(bench: Bench) -> None:
    bench.fit(bench.model(embedding_optimizer="sgd"), bench.callback(), gradient_clip_val=0.1)


def copies(value: Any) -> list[Any]:
    """A deepcopy, and what comes back from pickle and from torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return [copy.deepcopy(value), pickle.loads(pickle.dumps(value)), torch.load(buffer, weights_only=False)]


@check("copies of the callback")
def copied_callback(bench: Bench) -> None:
    """After a fit: they hold no tables, and fit another module as a new callback would."""
    assert len(pickle.dumps(bench.fitted.callback)) < 20_000
    made = copies(bench.fitted.callback)
    assert {one.state_key for one in made} == {bench.fitted.callback.state_key}
    module = bench.model()
    bench.fit(module, made[0])
    assert_same(everything(bench.fitted.module), everything(module))


@check("copies of the module")
def copied_module(bench: Bench) -> None:
    """After a fit: they hold the same, train on alike, and leave the first as it is."""
    module = bench.fitted.module
    before = everything(module)
    trainer, module.trainer = module.trainer, None
    try:
        made = copies(module)
    finally:
        module.trainer = trainer
    for one in made:
        assert_same(before, everything(one))
        bench.fit(one, bench.callback(), max_epochs=1)
        assert_same(bench.continued, everything(one))
    assert_same(before, everything(module))


@check("second fit, same trainer")
def second_fit(bench: Bench) -> None:
    """Two epochs in two calls are two epochs in one."""
    half = bench.run(max_epochs=1)
    steps = half.runner.global_step
    half.runner.fit_loop.max_epochs = 2
    half.runner.fit(half.module, datamodule=Data())
    assert half.runner.global_step == 2 * steps
    assert logits(half.module).isfinite().all()


@check("second fit, new trainer")
def second_trainer(bench: Bench) -> None:
    """The same instance does what a new one would, unless it is meant to remember."""
    first = bench.run()
    bench.fit(first.module, first.callback, max_epochs=1)
    if not bench.case.remembers:
        assert_same(bench.continued, everything(first.module))
    assert logits(first.module).isfinite().all()


@check("second module")
def second_module(bench: Bench) -> None:
    """An instance that has fitted one module fits another as a new one would, and leaves the first as it is."""
    first, second = bench.run(), bench.model()
    before = everything(first.module)
    bench.fit(second, first.callback)
    assert_same(before, everything(first.module))
    assert_same(before, everything(second))


@check("fast_dev_run")
def fast_dev_run(bench: Bench) -> None:
    assert bench.run(fast_dev_run=True).runner.global_step == 1


@check("overfit_batches")
def overfit_batches(bench: Bench) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*overfit|.*You requested to overfit")
        assert bench.run(overfit_batches=2).runner.global_step == 4


@check("max_steps")
def max_steps(bench: Bench) -> None:
    stopped = bench.run(max_steps=6)
    assert stopped.runner.global_step == 6 and logits(stopped.module).isfinite().all()


@check("EarlyStopping")
def early_stopping(bench: Bench) -> None:
    """A run that is stopped is one of as many epochs, in either order of the list."""
    for first in (True, False):
        stop, callback, module = EarlyStopping("val_ne", min_delta=10.0, patience=1), bench.callback(), bench.model()
        runner = bench.fit(module, *((stop, callback) if first else (callback, stop)), max_epochs=9)
        assert runner.global_step == bench.fitted.runner.global_step
        assert_same(everything(bench.fitted.module), everything(module))


@check("ModelCheckpoint")
def model_checkpoint(bench: Bench) -> None:
    """The best two and the last: the run is as without, and the best evaluates as it did then."""
    saver = ModelCheckpoint(dirpath=bench.folder / "best", monitor="val_ne", save_top_k=2, save_last=True)
    run = bench.run(saver, enable_checkpointing=True)
    assert_same(everything(bench.fitted.module), everything(run.module))
    assert len(saver.best_k_models) == 2 and saver.last_model_path
    trainer = bench.trainer(bench.callback())
    for path, wanted in saver.best_k_models.items():
        module = bench.model()
        [found] = trainer.validate(module, datamodule=Data(), ckpt_path=path, verbose=False)
        if abs(found["val_ne"] - float(wanted)) > 1e-6:
            assert bench.case.settles, (path, found["val_ne"], float(wanted))
            assert_same(everything(run.module), everything(module))
    last = bench.model()
    trainer.validate(last, datamodule=Data(), ckpt_path=saver.last_model_path, verbose=False)
    assert_same(everything(run.module), everything(last))


@check("LearningRateMonitor")
def learning_rate_monitor(bench: Bench) -> None:
    monitor = LearningRateMonitor("step")
    run = bench.run(monitor, logger=CSVLogger(bench.folder, name="rates"), log_every_n_steps=1)
    assert_same(everything(bench.fitted.module), everything(run.module))
    assert len(next(iter(monitor.lrs.values()))) == run.runner.global_step


class Averaged(Callback):
    """Dense parameters as an average over epochs sees them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(dense(pl_module))


def dense(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if "embedding" not in name}


@check("StochasticWeightAveraging")
def weight_averaging(bench: Bench) -> None:
    """The last weights are the mean of those that the second and the third epoch started with."""
    averaged, module = Averaged(), bench.model(built=True)  # Lightning copies the model before configure_model
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    bench.fit(module, bench.callback(), averaged, averaging, max_epochs=3)
    for name, value in dense(module).items():
        torch.testing.assert_close(value, torch.stack([seen[name] for seen in averaged.seen[1:]]).mean(0))
    if (bench.folder / "served").exists():
        served = load_model(str(bench.folder / "served"), bench.model(**dict(module.hparams)))
        torch.testing.assert_close(logits(served), logits(module), rtol=0, atol=0.05)


@check("RichProgressBar")
def rich_progress_bar(bench: Bench) -> None:
    run = bench.run(RichProgressBar(), enable_progress_bar=True)
    assert_same(everything(bench.fitted.module), everything(run.module))
