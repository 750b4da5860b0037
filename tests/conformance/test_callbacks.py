"""What every callback must do, whatever its method."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_embcomp import NonFiniteLossError, SetupError
from lightning_embcomp.tables import UnknownTableError

from .cases import (
    CASES,
    DIM,
    ROWS,
    CallbackCase,
    assert_equal_states,
    data,
    fit,
    held_bytes,
    hosts,
    logits,
    model,
    state_of,
    trainer,
)

REPOSITORY = Path(__file__).resolve().parents[2]
LAST = {case.fragment: name for name, case in reversed(CASES.items())}  # one case of each method
OPTIMIZERS = ("rowwise_adagrad", "none")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> CallbackCase:
    return CASES[request.param]


@pytest.fixture(params=LAST.values())
def one_case(request: pytest.FixtureRequest) -> CallbackCase:
    """For what hangs on the base of all callbacks."""
    return CASES[request.param]


def plain_bytes() -> int:
    return sum(rows * (4 * DIM + 4) for rows in ROWS)


@pytest.mark.parametrize(("architecture", "built"), [("dlrm", False), ("dlrm", True), ("dcn", False), ("deepfm", True)])
def test_tables_are_smaller(case: CallbackCase, architecture: str, built: bool) -> None:
    module = case.model(built, architecture=architecture)
    fit(module, case.active())
    assert len(hosts(module)) == 1
    assert 0 < held_bytes(module) <= case.ratio * plain_bytes()
    assert logits(module).isfinite().all()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd", "none"])
def test_without_compression_it_is_the_plain_run(case: CallbackCase, optimizer: str) -> None:
    """Bags are averaged here; the matrix sums them."""
    plain, module = (case.model(True, embedding_optimizer=optimizer, pooling="mean") for _ in range(2))
    assert_equal_states(state_of(plain), state_of(module))
    for run, callbacks in ((plain, ()), (module, (case.neutral(),))):
        runner = fit(run, *callbacks, max_epochs=2)
        assert runner.global_step == 50
    torch.testing.assert_close(logits(module), logits(plain), rtol=1e-6, atol=1e-6)


def test_importing_changes_nothing() -> None:
    """In a process of its own: what the package could reach is the same before and after the import."""
    script = """
import warnings
warnings.simplefilter("ignore")
import torch, fbgemm_gpu, torchrec, lightning.pytorch as pl
from torchrec.modules.embedding_modules import EmbeddingBagCollection

def world():
    return [torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.nn.Embedding.__init__, torch.nn.Module.__setattr__, EmbeddingBagCollection.__init__, pl.Trainer.fit]

before = world()
import lightning_embcomp
assert before == world()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def test_two_plain_runs_are_bit_identical() -> None:
    runs = [model(), model()]
    for module in runs:
        fit(module)
    assert_equal_states(state_of(runs[0]), state_of(runs[1]))


def test_resumed_run_is_bit_identical(case: CallbackCase, tmp_path: Path) -> None:
    """Tables that configure_optimizers trains; the matrix has fused ones."""
    through, first, second = (case.model(embedding_optimizer="none") for _ in range(3))
    fit(through, case.active(), max_epochs=2)
    fit(first, case.active()).save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)  # another run: whatever its random numbers are, they must not matter
    runner = trainer(case.active(), max_epochs=2)
    runner.fit(second, datamodule=data(), ckpt_path=tmp_path / "half.ckpt")
    assert runner.global_step == 50
    assert_equal_states(state_of(through), state_of(second))
    assert torch.equal(logits(through), logits(second))


def test_copies_of_the_module(one_case: CallbackCase) -> None:
    """Tables that configure_optimizers trains; the matrix has fused ones."""
    module = one_case.model(embedding_optimizer="none")
    fit(module, one_case.active())
    module.trainer = None
    other = pickle.loads(pickle.dumps(module))
    before = state_of(module)
    assert_equal_states(before, state_of(other))
    fit(other, one_case.active())
    assert_equal_states(before, state_of(module))
    fit(module, one_case.active())
    assert_equal_states(state_of(module), state_of(other))


def test_a_glob_without_a_table(one_case: CallbackCase) -> None:
    with pytest.raises(
        UnknownTableError, match=r"no embedding table matches 'nowhere'. Tables of the model: .*t_feature_0"
    ):
        fit(one_case.model(), one_case.active(tables=["t_feature_1", "nowhere"]))


def test_a_dim_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"t_feature_0' of dim 18 cannot be cut .*its dim must be a multiple of 4"):
        fit(model(embedding_dim=18, embedding_optimizer="none"), CASES["fiited"].active())


def test_tables_that_are_not_selected_stay_whole(one_case: CallbackCase) -> None:
    plain, module = one_case.model(True), one_case.model(True)
    fit(module, one_case.active(tables="t_feature_2"), max_steps=0)
    engine = hosts(module)[0].engine
    weights = dict(plain.named_modules())["model.sparse_arch.embedding_bag_collection"].state_dict()
    for t in range(2):
        assert torch.equal(engine.read_rows(t, 0, ROWS[t]), weights[f"embedding_bags.t_feature_{t}.weight"])


class BadLoss(pl.LightningModule):
    """Tables from the start, and a loss that is what the last batch says."""

    def __init__(self, rebuilds: bool = False) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(100, DIM, mode="sum")
        self.rebuilds = rebuilds

    def configure_model(self) -> None:
        if self.rebuilds:
            self.table = nn.EmbeddingBag(100, DIM, mode="sum")

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.table(batch[0]).sum() * batch[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(*losses: float, last_id: int = 99) -> DataLoader[Any]:
    rows = [(torch.tensor([[0, 5], [last_id, 1]]), torch.tensor(loss)) for loss in losses]
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_bad_loss_leaves_the_tables_as_they_were(one_case: CallbackCase, loss: float) -> None:
    good, bad = BadLoss(), BadLoss()
    bad.load_state_dict(good.state_dict())
    torch.manual_seed(0)
    trainer(one_case.active()).fit(good, batches(1.0, 2.0))
    torch.manual_seed(0)
    # Rows that were rounded to zero make NaN of infinity.
    with pytest.raises(NonFiniteLossError, match=f"the loss is (-?{loss}|nan) at step 2; the tables are unchanged"):
        trainer(one_case.active()).fit(bad, batches(1.0, 2.0, loss))
    assert_equal_states(state_of(good), state_of(bad))


def test_an_id_out_of_range_names_the_table(one_case: CallbackCase) -> None:
    with pytest.raises(IndexError, match="id 100 at position 2 of the batch is outside table .* with 100 rows"):
        trainer(one_case.active()).fit(BadLoss(), batches(1.0, last_id=100))


def test_configure_model_that_builds_again(one_case: CallbackCase) -> None:
    with pytest.raises(SetupError, match=r"table 'table' was rebuilt after setup.*configure_model must do nothing"):
        trainer(one_case.active()).fit(BadLoss(rebuilds=True), batches(1.0))


class LateTable(BadLoss):
    """A second table that appears in configure_model."""

    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            self.late = nn.EmbeddingBag(100, DIM, mode="sum")

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self.table(batch[0]) + self.late(batch[0])).sum()


def test_tables_that_come_too_late_are_named(one_case: CallbackCase) -> None:
    with pytest.raises(SetupError, match=r"table 'late' was built after setup.*build all of them in one place"):
        trainer(one_case.active()).fit(LateTable(), batches(1.0))
    module = LateTable()
    trainer(one_case.active(tables="table")).fit(module, batches(1.0))
    assert len(hosts(module)) == 1


def test_after_an_error_in_setup_the_module_can_be_used(one_case: CallbackCase) -> None:
    module = one_case.model()
    for _ in range(2):
        with pytest.raises(UnknownTableError):
            fit(module, one_case.active(tables="nowhere"))
        assert module.model is None
    fit(module, one_case.active())
    assert held_bytes(module) <= one_case.ratio * plain_bytes()


def test_tied_weights_are_refused(one_case: CallbackCase) -> None:
    module = BadLoss()
    module.head = nn.Linear(DIM, 100, bias=False)
    module.head.weight = module.table.weight  # as in language models
    with pytest.raises(SetupError, match=r"table 'table' shares its weights with head.weight"):
        trainer(one_case.active()).fit(module, batches(1.0))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_checkpoint_does_not_train(one_case: CallbackCase, share: float, tmp_path: Path) -> None:
    """Lightning reads the file and lets PyTorch's error through, before any callback sees it."""
    fit(one_case.model(), one_case.active(), max_steps=1).save_checkpoint(tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(len(whole) * share)])
    runner, module = trainer(one_case.active()), one_case.model()
    with pytest.raises((RuntimeError, OSError)):
        runner.fit(module, datamodule=data(), ckpt_path=tmp_path / "cut.ckpt")
    assert runner.global_step == 0
    fit(module, one_case.active())
    assert held_bytes(module) <= one_case.ratio * plain_bytes()


def test_another_cut_than_that_of_the_checkpoint_is_named(tmp_path: Path) -> None:
    fit(model(), CASES["fiited"].active()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"'prefix'\), but is configured as .*'chunks'\)"):
        trainer(CASES["fiited-chunks"].active()).fit(model(), datamodule=data(), ckpt_path=tmp_path / "a.ckpt")


def test_several_processes_are_refused(one_case: CallbackCase, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = trainer(one_case.active())
    monkeypatch.setattr(type(runner), "world_size", 2)
    with pytest.raises(SetupError, match=r"2 processes.*devices=1"):
        runner.callbacks[0].setup(runner, BadLoss(), "fit")  # type: ignore[attr-defined]
