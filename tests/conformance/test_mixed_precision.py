"""What only mixed precision does, through the trainer."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_embcomp import (
    DimensionPruning,
    Granularity,
    MixedPrecisionSearch,
    OwnershipError,
    PrecisionSearch,
    RowQuantization,
    SetupError,
)
from lightning_embcomp.engine.memory import table_memory
from lightning_embcomp.engine.precision import SEARCHED
from lightning_embcomp.methods.mpe.module import RowQuantizer
from lightning_embcomp.surgery import replace, to_plain

from .cases import OFTEN, ROWS, assert_equal_states, data, fit, hosts, logits, model, state_of, trainer

SEARCH = PrecisionSearch(steps=10, groups=16)


def quantizer(module: torch.nn.Module) -> RowQuantizer:
    found = hosts(module)[0].engine.values
    assert isinstance(found, RowQuantizer)
    return found


class Phases(pl.Callback):
    """Average bits, and whether widths were still searched, after every step."""

    def __init__(self) -> None:
        self.logged: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        metrics = trainer.callback_metrics
        self.logged.append((float(metrics["mpe/average_bits"]), float(metrics["mpe/searching"])))


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "none"])
@pytest.mark.parametrize("method", ["sensitivity", "softmax"])
def test_search_then_retrain(method: Any, optimizer: str) -> None:
    module, phases = model(embedding_optimizer=optimizer), Phases()
    search = PrecisionSearch(steps=10, groups=16, method=method)
    fit(module, MixedPrecisionSearch(ratio=25, search=search), phases)
    searching = [searching for _, searching in phases.logged]
    assert searching == [1.0] * 10 + [0.0] * 15
    assert phases.logged[-1][0] <= 32 / 25
    engine, found = hosts(module)[0].engine, quantizer(module)
    assert set(found.bits.tolist()) <= {0, 2, 4, 8}
    live = sum(
        int((engine.precision(t).bits_of(0, rows) > 0).sum())  # type: ignore[union-attr]
        for t, rows in enumerate(ROWS)
    )
    assert sum(table_memory(engine, t).weights for t in range(3)) == live * 16 * 4 < sum(ROWS) * 16 * 4


def test_phases_by_epochs() -> None:
    module, phases = model(), Phases()
    fit(module, MixedPrecisionSearch(ratio=25, search=PrecisionSearch(groups=16)), phases, max_epochs=2)
    assert [searching for _, searching in phases.logged] == [1.0] * 25 + [0.0] * 25


def test_a_run_that_ends_with_its_search_is_rounded_without_a_retrain() -> None:
    module, plain = model(True), model(True)
    fit(module, MixedPrecisionSearch(ratio=25, search=PrecisionSearch(groups=16)))
    fit(plain)
    assert not quantizer(module).searching
    precision = quantizer(module).precision(0)
    assert precision is not None
    live = precision.bits_of(0, ROWS[0]) > 0
    assert live.any()
    trained = hosts(module)[0].engine.read_rows(0, 0, ROWS[0])[live]
    tables = dict(plain.named_modules())["model.sparse_arch.embedding_bag_collection"].state_dict()
    # At 8 bits while it searches, the run stays close to the plain one; the tables were not reset.
    difference = trained - tables["embedding_bags.t_feature_0.weight"][live]
    assert difference.norm() < 0.2 * trained.norm()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # without the one that saved
@pytest.mark.parametrize("stop", [5, 17])
@pytest.mark.parametrize("method", ["sensitivity", "softmax"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "none"])
def test_resume_in_either_phase(optimizer: str, method: Any, stop: int, tmp_path: Path) -> None:
    search = PrecisionSearch(steps=10, groups=16, method=method, reset=False)

    def callback() -> MixedPrecisionSearch:
        return MixedPrecisionSearch(ratio=25, search=search, quantization=RowQuantization(offset=True))

    through, first, second = (model(embedding_optimizer=optimizer) for _ in range(3))
    fit(through, callback())
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    fit(first, callback(), saver, enable_checkpointing=True)
    runner = trainer(callback())
    runner.fit(second, datamodule=data(), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert runner.global_step == 25
    assert_equal_states(state_of(through), state_of(second))


def test_fixed_width_is_what_evaluation_sees() -> None:
    module = model()
    fit(module, MixedPrecisionSearch(bits=3))
    engine = hosts(module)[0].engine
    found = logits(module)
    for t, rows in enumerate(ROWS):
        precision = engine.precision(t)
        assert precision is not None and precision.bits.tolist() == [3]
        rounded = precision.round(engine.read_rows(t, 0, rows), 0)
        assert len(rounded.unique()) <= 8
        engine.load_rows(t, 0, rounded)
    assert torch.equal(logits(module), found)  # values on the grid are not rounded again


def test_unordered_ids_are_grouped_by_their_counts() -> None:
    source = data()
    counts = {name: source.id_counts(name) for name in ("feature_0", "feature_1", "feature_2")}
    order = {name: torch.randperm(n.numel(), generator=torch.Generator().manual_seed(1)) for name, n in counts.items()}
    source.id_counts = lambda name: counts[name][order[name]]  # type: ignore[method-assign]
    module = model()
    torch.manual_seed(4)
    trainer(MixedPrecisionSearch(ratio=25, search=SEARCH)).fit(module, datamodule=source)
    found = quantizer(module)
    group = found.groups.per_row(2)
    assert group is not None
    by_group = [counts["feature_2"][order["feature_2"]][group == g] for g in range(int(group.max()) + 1)]
    assert all(one.min() >= other.max() for one, other in zip(by_group[:-1], by_group[1:], strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_with_dimension_pruning_in_any_order(reverse: bool) -> None:
    def callbacks() -> list[pl.Callback]:
        return [DimensionPruning(target=0.5, schedule=OFTEN), MixedPrecisionSearch(ratio=20, search=SEARCH)]

    one, other = model(), model()
    fit(one, *callbacks())
    fit(other, *reversed(callbacks()))
    assert_equal_states(state_of(one), state_of(other))
    engine = hosts(one)[0].engine
    assert sum(table_memory(engine, t).weights for t in range(3)) <= 0.5 * sum(ROWS) * 16 * 4
    codes, _ = engine.router.read(2, 0, ROWS[2])
    cut = ((codes > 0) & (codes < 4)).nonzero().flatten()
    found = engine(torch.cat([torch.zeros(2 * cut.numel(), dtype=torch.int64), cut]), torch.arange(3 * cut.numel() + 1))
    assert not found[:, -4:].any()  # columns that pruning cut stay zero when rows are rounded


class Uncounted(pl.LightningDataModule):
    """A data module that does not know its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.source = data()

    def setup(self, stage: str) -> None:
        self.source.setup(stage)

    def train_dataloader(self) -> Any:
        return self.source.train_dataloader()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_unknown_frequencies() -> None:
    source = Uncounted()
    module = model(built=True)
    with pytest.raises(SetupError, match=r"ids of table .*t_feature_0' occur is not known.*search.frequency='rank'"):
        trainer(MixedPrecisionSearch(ratio=25, search=SEARCH)).fit(module, datamodule=source)
    module = model(built=True)
    by_rank = PrecisionSearch(steps=10, groups=16, frequency="rank")
    trainer(MixedPrecisionSearch(ratio=25, search=by_rank)).fit(module, datamodule=source)
    assert not quantizer(module).searching


def test_wrong_number_of_counts() -> None:
    source = data()
    source.id_counts = lambda name: torch.ones(3)  # type: ignore[method-assign]
    with pytest.raises(SetupError, match=r"torch.Size\(\[3\]\) instead of one count for each of the 40 rows"):
        trainer(MixedPrecisionSearch(ratio=25, search=SEARCH)).fit(model(), datamodule=source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of ratio .* penalty .* and bits"),
        ({"ratio": 4.0, "bits": 8}, "one of ratio"),
        ({"ratio": 0.5}, "above 1, not 0.5"),
        ({"ratio": 500, "search": PrecisionSearch(widths=(2, 8))}, "ratio 500 cannot be reached with widths"),
        ({"bits": 12}, "from 1 to 8, or 32, not 12"),
        ({"penalty": 1.0}, "penalty works with search.method='softmax'"),
        ({"bits": 8, "search": SEARCH}, "search has no effect with bits"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedPrecisionSearch(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"steps": 0}, {"method": "x"}, {"widths": ()}, {"widths": (0,)}, {"widths": (9,)}, {"groups": 0}]
    + [{"frequency": "x"}, {"temperature": 0.0}, {"learning_rate": -1.0}],
)
def test_searches_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PrecisionSearch(**settings)


def test_rates_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="offset_learning_rate must not be negative"):
        RowQuantization(offset_learning_rate=-1.0)


def test_two_searches_of_one_table() -> None:
    with pytest.raises(OwnershipError, match="set the precision of table .*t_feature_1'"):
        fit(model(), MixedPrecisionSearch(bits=8), MixedPrecisionSearch(bits=4, tables="t_feature_1"))
    with pytest.raises(SetupError, match="other tables of the collection .* are rounded by another callback"):
        fit(
            model(),
            MixedPrecisionSearch(bits=8, tables="t_feature_0"),
            MixedPrecisionSearch(bits=4, tables="t_feature_1"),
        )


def test_offsets_and_pruned_columns_do_not_go_together() -> None:
    with pytest.raises(SetupError, match="quantization.offset would fill the columns"):
        fit(
            model(),
            DimensionPruning(target=0.5, granularity=Granularity(), schedule=OFTEN),
            MixedPrecisionSearch(bits=8, quantization=RowQuantization(offset=True)),
        )


def test_second_run_with_other_widths_is_refused() -> None:
    module = model()
    fit(module, MixedPrecisionSearch(bits=8))
    with pytest.raises(SetupError, match=r"rounded with widths \[8\], but \[4\] are asked for"):
        fit(module, MixedPrecisionSearch(bits=4))


def test_the_state_says_that_a_search_goes_on(tmp_path: Path) -> None:
    fit(model(), MixedPrecisionSearch(ratio=25, search=SEARCH), max_steps=4).save_checkpoint(tmp_path / "a.ckpt")
    module = model()
    torch.manual_seed(4)
    state: dict[str, Tensor] = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    bits = [value for key, value in state.items() if key.endswith("precision.bits")]
    # The run ended within its search, so that widths were chosen at its end.
    assert len(bits) == 3 and all(SEARCHED not in value.tolist() for value in bits)
    fit(module, MixedPrecisionSearch(ratio=25, search=SEARCH))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit(model(), MixedPrecisionSearch(bits=4)).save_checkpoint(tmp_path / "four.ckpt")
    with pytest.raises(RuntimeError, match=r"rows have \[4\] bits, which are not among the widths \[8\]"):
        trainer(MixedPrecisionSearch(bits=8)).validate(model(), datamodule=data(), ckpt_path=tmp_path / "four.ckpt")
    fit(model(), MixedPrecisionSearch(ratio=25, search=SEARCH)).save_checkpoint(tmp_path / "searched.ckpt")
    coarse = PrecisionSearch(steps=10, groups=2)
    with pytest.raises(RuntimeError, match="rows were cut into .* groups, now into .* use the saved search.groups"):
        trainer(MixedPrecisionSearch(ratio=25, search=coarse)).fit(
            model(), datamodule=data(), ckpt_path=tmp_path / "searched.ckpt"
        )
    with pytest.raises(SetupError, match="written with ratio=25.*; this run has ratio=12"):
        trainer(MixedPrecisionSearch(ratio=12, search=SEARCH)).fit(
            model(), datamodule=data(), ckpt_path=tmp_path / "searched.ckpt"
        )


def test_second_run_with_another_ratio_is_refused() -> None:
    module = model()
    fit(module, MixedPrecisionSearch(ratio=25, search=SEARCH))
    with pytest.raises(SetupError, match="is rounded for ratio=25.*, but ratio=100"):
        fit(module, MixedPrecisionSearch(ratio=100, search=SEARCH))


def test_pruning_does_not_bring_rows_without_bits_back() -> None:
    module = model()
    pruning = DimensionPruning(target=0.3, schedule=OFTEN)
    fit(module, pruning, MixedPrecisionSearch(ratio=60, search=SEARCH), max_epochs=2)
    engine = hosts(module)[0].engine
    precision = engine.precision(2)
    assert precision is not None
    without = precision.bits_of(0, ROWS[2]) == 0
    assert without.sum() > 2000
    assert not engine.router.read(2, 0, ROWS[2])[0][without].any()


def test_plain_tables_are_what_evaluation_saw() -> None:
    module = model()
    fit(module, MixedPrecisionSearch(ratio=25, search=SEARCH))
    found = logits(module)
    path = next(path for path, part in module.named_modules() if part is hosts(module)[0])
    replace(module, path, to_plain(hosts(module)[0]))
    assert torch.equal(logits(module), found)


def test_the_last_checkpoint_of_a_run_without_retrain_holds_chosen_bits(tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    search = PrecisionSearch(groups=16)
    fit(model(), MixedPrecisionSearch(ratio=25, search=search), saver, enable_checkpointing=True)
    state: dict[str, Tensor] = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    bits = [value for key, value in state.items() if key.endswith("precision.bits")]
    assert len(bits) == 3 and all(SEARCHED not in value.tolist() for value in bits)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_fit_without_counts_is_refused() -> None:
    module = model(built=True)
    source = data()
    source.setup("fit")
    runner = trainer(MixedPrecisionSearch(ratio=25, search=SEARCH))
    with pytest.raises(SetupError, match="occur is not known"):
        runner.fit(module, source.train_dataloader())
