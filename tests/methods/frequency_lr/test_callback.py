"""The callback in a pipeline: what it sets up, what it logs, and what it refuses."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import (
    CounterSettings,
    DimensionPruning,
    FrequencyAwareLR,
    Granularity,
    OwnershipError,
    PruningSchedule,
    SetupError,
)
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.counters import CounterConflictError, counters_of, share_counters
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.memory import engine_bytes, table_memory
from lightning_embcomp.engine.optimizer import UnsupportedOptimizerError
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.methods.frequency_lr.frequencies import FrequencyError
from lightning_embcomp.methods.frequency_lr.module import FrequencyRates
from lightning_embcomp.models import ClickModel

ROWS, BATCH, LR = (40, 300), 128, 0.5
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def data() -> SyntheticClickLogDataModule:
    return SyntheticClickLogDataModule(
        SyntheticClickLog(num_rows=2000, num_embeddings=ROWS, num_dense=2), batch_size=BATCH
    )


def model(**settings: Any) -> ClickModel:
    torch.manual_seed(3)
    small: dict[str, Any] = {"embedding_dim": 8, "dense_layers": (8,), "over_layers": (8,), "embedding_lr": LR}
    return ClickModel(**{**small, "embedding_optimizer": "sgd", **settings})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    torch.manual_seed(4)
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, **settings})
    trainer.fit(module, datamodule=data())
    return trainer


def engine_of(module: nn.Module) -> RoutedEmbeddings:
    [host] = [part for part in module.modules() if isinstance(part, RoutedHost)]
    return host.engine


def test_counters_are_those_of_the_data() -> None:
    module = model()
    counter = CounterSettings(encoding="exact", counted="occurrence")
    trainer = fit(module, FrequencyAwareLR(counter=counter), max_epochs=2)
    source, counters = data(), counters_of(engine_of(module))
    source.setup("fit")
    seen = [torch.zeros(rows) for rows in ROWS]
    for _, sparse, _ in source.train_dataloader():
        for t, values in enumerate(sparse.to_dict().values()):
            seen[t] += 2 * torch.bincount(values.values(), minlength=ROWS[t])
    assert counters is not None and counters.step == trainer.global_step
    for t, counts in enumerate(seen):
        assert torch.equal(counters.counts(t).float(), counts)


def test_logged_rates_fall_with_popularity() -> None:
    trainer = fit(model(), FrequencyAwareLR(log_every_n_steps=5), max_epochs=3)
    logged = trainer.callback_metrics
    rates = [float(logged[f"frequency_lr/rate_decile_{i}"]) for i in range(10)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[9] < 0.5 * rates[0] <= 0.5 * LR
    assert float(logged["frequency_lr/bytes_per_row"]) == 1.0


def test_logged_group_names_the_tables() -> None:
    trainer = fit(model(), FrequencyAwareLR(tables="t_feature_1", log_every_n_steps=5))
    assert "frequency_lr[t_feature_1]/bytes_per_row" in trainer.callback_metrics


def test_state_is_one_byte_per_row_of_the_selected_tables() -> None:
    module = model()
    fit(module, FrequencyAwareLR(tables="t_feature_1"))
    engine = engine_of(module)
    assert [table_memory(engine, t).statistics for t in range(2)] == [0, ROWS[1] + 16]
    assert sum(table_memory(engine, t).total for t in range(2)) == engine_bytes(engine)


def test_tables_that_are_not_selected_train_as_before() -> None:
    """The first step, where the loss is the same for both."""
    plain, module = model(), model()
    fit(plain, FrequencyAwareLR(tables="t_feature_1"), max_steps=1)
    fit(module, FrequencyAwareLR(tables="t_feature_1", max_rate=1e-6), max_steps=1)
    one, two = (engine_of(m).read_rows(0, 0, ROWS[0]) for m in (plain, module))
    assert torch.equal(one, two)
    one, two = (engine_of(m).read_rows(1, 0, ROWS[1]) for m in (plain, module))
    assert not torch.equal(one, two)


def test_known_frequencies_come_from_the_data_module() -> None:
    callback = FrequencyAwareLR(form="known", counter=CounterSettings(encoding="exact", counted="presence"))
    trainer = fit(model(), callback, max_epochs=2)
    assert isinstance(callback.rates, FrequencyRates)
    steps, source = trainer.num_training_batches, data()
    for t, table in enumerate(callback.rates.tables):
        counts = source.id_counts(f"feature_{t}").numpy().astype(float).clip(1)
        presence = 1 - (1 - counts / counts.sum()) ** (counts.sum() / steps)
        expected = 1 / np.sqrt(2 * steps * presence)
        found = callback.rates.multipliers(table.shards[0], torch.arange(ROWS[t]))[1]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_known_frequencies_come_from_a_file(tmp_path: Path) -> None:
    counts: dict[str, Any] = {f"t_feature_{t}": data().id_counts(f"feature_{t}").numpy() for t in range(2)}
    np.savez(tmp_path / "counts.npz", **counts)
    states = []
    for frequencies in (None, str(tmp_path / "counts.npz")):
        module = model()
        fit(module, FrequencyAwareLR(form="known", frequencies=frequencies, horizon=100))
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"t_feature_0": np.ones(40)}, "no array for table .*t_feature_1'; it has t_feature_0"),
        ({"t_feature_0": np.ones(41), "t_feature_1": np.ones(300)}, r"shape \(41,\), but the table has 40 rows"),
        ({"t_feature_0": -np.ones(40), "t_feature_1": np.ones(300)}, "holds -1.0 for row 0"),
        ({"t_feature_0": np.full(40, "x"), "t_feature_1": np.ones(300)}, "holds <U1, not numbers"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "counts.npz", **arrays)
    with pytest.raises(FrequencyError, match=message):
        fit(model(), FrequencyAwareLR(form="known", frequencies=str(tmp_path / "counts.npz")))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("counts")
    for name, message in (("text.npz", "is not an .npz file: write one with"), ("none.npz", "there is no file")):
        with pytest.raises(FrequencyError, match=message):
            fit(model(), FrequencyAwareLR(form="known", frequencies=str(tmp_path / name)))


class Bags(pl.LightningModule):
    """One plain table, and the optimizer that it is given."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(50, 8, mode="sum")
        self.optimizer, self.options = optimizer, options

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.table(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), **{"lr": 0.1, **self.options})


def fit_bags(module: pl.LightningModule, callback: pl.Callback, **settings: Any) -> None:
    ids = torch.arange(640).remainder(37).view(320, 2)
    pl.Trainer(callbacks=[callback], **{**QUIET, "max_epochs": 1, **settings}).fit(
        module, DataLoader(TensorDataset(ids), batch_size=32)
    )


def test_known_frequencies_need_a_data_module_that_counts() -> None:
    with pytest.raises(FrequencyError, match=r"there is none\) has no id_counts.*give frequencies='FILE.npz'"):
        fit_bags(Bags(), FrequencyAwareLR(form="known"))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.AdamW])
def test_adaptive_optimizers_underneath_are_refused(optimizer: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(SetupError, match=f"{optimizer.__name__}, which divides .* no effect. Train the table by"):
        fit_bags(Bags(optimizer), FrequencyAwareLR())


def test_fused_adaptive_optimizers_are_refused() -> None:
    with pytest.raises(UnsupportedOptimizerError, match=r"rowwise_adagrad, which already divides .* Use SGD"):
        fit(model(embedding_optimizer="rowwise_adagrad"), FrequencyAwareLR())


def test_weight_decay_needs_rates_that_level_off() -> None:
    with pytest.raises(SetupError, match="weight_decay=0.01 .* pull frequent rows to zero. Set weight_decay=0"):
        fit_bags(Bags(weight_decay=0.01), FrequencyAwareLR())
    fit_bags(Bags(weight_decay=0.01), FrequencyAwareLR(counter=CounterSettings(half_life=10.0)))


def test_momentum_and_gradient_clipping_go_on() -> None:
    fit_bags(Bags(momentum=0.9), FrequencyAwareLR(max_rate=0.05), gradient_clip_val=1.0, accumulate_grad_batches=2)


def test_a_run_without_end_needs_a_horizon() -> None:
    settings: dict[str, Any] = {"max_epochs": -1, "max_time": "00:00:00:01"}
    with pytest.raises(SetupError, match=r"needs the number of steps .* horizon=STEPS"):
        fit_bags(Bags(), FrequencyAwareLR(form="horizon"), **settings)


class Half(pl.LightningModule):
    """A fused collection in half precision, or with an option of FBGEMM's."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        config = EmbeddingBagConfig(name="t", num_embeddings=50, embedding_dim=8, feature_names=["f"])
        self.bags = FusedEmbeddingBagCollection(
            [config], torch.optim.SGD, {"lr": 0.1, **options}, device=torch.device("cpu")
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids = batch[0].flatten()
        sparse = KeyedJaggedTensor(["f"], ids, lengths=torch.ones(ids.numel(), dtype=torch.int64))
        self.manual_backward(self.bags(sparse).values().square().mean())

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_options_that_only_fbgemm_runs() -> None:
    with pytest.raises(UnsupportedOptimizerError, match=r"'gradient_clipping', which only FBGEMM.*backend='fbgemm'"):
        fit_bags(Half(gradient_clipping=True, max_gradient=1.0), FrequencyAwareLR())
    callback, module = FrequencyAwareLR(backend="fbgemm", log_every_n_steps=5), Half()
    fit_bags(module, callback)
    assert callback.rates is not None and callback.rates.bytes_per_row() == 12.0
    memory = table_memory(engine_of(module), 0)
    assert (memory.optimizer_state, memory.plain_optimizer_state) == (12 * 50, 0)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_weight_decay_under_fbgemm_needs_a_half_life() -> None:
    with pytest.raises(ValueError, match="half-life of -1, so that weights would grow"):
        fit_bags(Half(weight_decay=0.1), FrequencyAwareLR(backend="fbgemm"))


def test_fbgemm_takes_whole_collections() -> None:
    with pytest.raises(ValueError, match="'t_feature_0' is not selected"):
        fit(model(), FrequencyAwareLR(tables="t_feature_1", backend="fbgemm"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "linear"}, "form must be one of 'running', 'horizon', 'known'"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"max_rate": 0}, "max_rate must be positive"),
        ({"horizon": 10}, "horizon has no effect with form='running'"),
        ({"frequencies": "datamodule"}, "frequencies has no effect with form='running'"),
        ({"form": "known", "counter": CounterSettings(half_life=3.0)}, "half_life has no effect with form='known'"),
        ({"form": "horizon", "counter": CounterSettings(half_life=3.0)}, "half_life has no effect with form='horizon'"),
        ({"warmup_steps": 5}, "does not keep; use backend='fbgemm'"),
        ({"log_every_n_steps": -1}, "log_every_n_steps must not be negative"),
        ({"backend": "fbgemm", "form": "known"}, "form='known' has no counterpart in FBGEMM's"),
        ({"backend": "fbgemm", "max_rate": 1.0}, "max_rate=1.0 has no counterpart"),
        (
            {"backend": "fbgemm", "counter": CounterSettings(counted="presence")},
            "counter.encoding='log' has no counterpart",
        ),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrequencyAwareLR(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding": "int8"}, "encoding must be"),
        ({"counted": "twice"}, "counted must be"),
        ({"half_life": 0.0}, "half_life must be a positive"),
        ({"half_life": 2e6}, "up to 50,000 steps, not 2,000,000.0: use encoding='exact'"),
    ],
)
def test_counter_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CounterSettings(**settings)


def test_two_owners_of_the_rate_are_refused() -> None:
    with pytest.raises(OwnershipError, match="set the learning rate of table .*t_feature_1'"):
        fit(model(), FrequencyAwareLR(), FrequencyAwareLR(tables="t_feature_1"))


def test_counters_are_shared() -> None:
    module = model()
    fit(module, FrequencyAwareLR(tables="t_feature_0"), FrequencyAwareLR(tables="t_feature_1"), max_steps=1)
    engine = engine_of(module)
    counters = counters_of(engine)
    assert counters is not None and counters.step == 1 and list(engine.attached) == ["counter"]
    assert share_counters(engine, [0], CounterSettings(), "another method") is counters
    with pytest.raises(CounterConflictError, match=r"another method and FrequencyAwareLR\[t_feature_0\] count"):
        share_counters(engine, [0], CounterSettings(counted="presence"), "another method")


def test_known_and_running_counters_on_one_engine() -> None:
    module = model()
    known = FrequencyAwareLR(form="known", tables="t_feature_0")
    fit(module, known, FrequencyAwareLR(tables="t_feature_1"))
    engine = engine_of(module)
    counters = counters_of(engine)
    assert counters is not None and counters.values[0] is None
    share_counters(engine, [0], CounterSettings(), "another method")
    fit(module, FrequencyAwareLR(form="known", tables="t_feature_0"), FrequencyAwareLR(tables="t_feature_1"))
    assert counters.counts(0).sum() > 0


def test_rates_and_pruning_together() -> None:
    module = model()
    schedule = PruningSchedule(every_n_steps=5, early_steps=(2,))
    pruning = DimensionPruning(target=0.5, schedule=schedule, granularity=Granularity(chunks=2))
    fit(module, FrequencyAwareLR(counter=CounterSettings(encoding="exact")), pruning, max_epochs=2)
    engine = engine_of(module)
    counters = counters_of(engine)
    assert counters is not None
    weights = sum(table_memory(engine, t).weights for t in range(2))
    assert weights <= 0.5 * sum(ROWS) * 8 * 4
    # Rows that lost their storage are counted all the same.
    gone = engine.router.read(1, 0, ROWS[1])[0] == 0
    assert (counters.counts(1)[gone] > 0).any()


def test_a_scheduler_keeps_working() -> None:
    """The rate falls by ten after the first epoch; what is logged follows."""

    class Scheduled(Bags):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)}

    logged = []

    class Read(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            logged.append(float(trainer.callback_metrics["frequency_lr/rate_decile_0"]))

    module = Scheduled()
    ids = torch.arange(640).remainder(37).view(320, 2)
    counter = CounterSettings(encoding="exact", half_life=0.001)  # the last step alone counts
    pl.Trainer(callbacks=[FrequencyAwareLR(counter=counter, log_every_n_steps=9), Read()], **QUIET, max_epochs=2).fit(
        module, DataLoader(TensorDataset(ids), batch_size=32)
    )
    assert logged == pytest.approx([1.0, 0.1], rel=1e-5)


def test_a_checkpoint_of_other_counters_is_refused() -> None:
    saved = FrequencyAwareLR().state_dict()
    with pytest.raises(SetupError, match="written with counted='occurrence'; this run has counted='presence'"):
        FrequencyAwareLR(counter=CounterSettings(counted="presence")).load_state_dict(saved)
