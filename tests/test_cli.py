"""The ``embcomp`` command, run in this process as the console script runs it."""

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_embcomp import cli, trainer_cli

Run = Callable[..., None]
_EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "dlrm.yaml"

TINY_DATA = """
import lightning.pytorch as pl
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class TinyData(pl.LightningDataModule):
    features = [{"name": "user", "num_embeddings": 10}]
    num_dense = 2

    def __init__(self, num_batches: int = 4) -> None:
        super().__init__()
        self.num_batches = num_batches

    def train_dataloader(self):
        ids = torch.arange(8)
        sparse = KeyedJaggedTensor(["user"], ids, lengths=torch.ones_like(ids))
        batches = [(torch.ones(8, 2), sparse, (ids % 2).float())] * self.num_batches
        return torch.utils.data.DataLoader(batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    (tmp_path / "tiny_cli_data.py").write_text(TINY_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_cli_data", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer_cli, "DEFAULT_DATA", "tiny_cli_data.TinyData")

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["embcomp", *arguments])
        cli.main()

    return call


@pytest.fixture
def printed(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The configuration that ``embcomp fit`` would run with."""

    def call(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            run("fit", *arguments, "--print_config")
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return call


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that exits with status 2 says."""

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return call


QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1")


def test_fit_then_test_resume_and_predict(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--trainer.max_epochs=1", "--model.architecture=dcn", "--model.embedding_dim=8", *QUIET)
    [checkpoint] = (tmp_path / "lightning_logs").rglob("*.ckpt")
    logged = (checkpoint.parents[1] / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "val_auc", "val_logloss", "val_ne", "val_calibration"} <= set(logged[0].split(","))
    kept = tmp_path / "kept.ckpt"
    kept.write_bytes(checkpoint.read_bytes())
    # Without a checkpoint callback there is no directory that could change under it.
    quiet = (*QUIET, "--trainer.enable_checkpointing=false", "--ckpt_path", str(kept))
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        run("test", *quiet)
    assert "test_ne" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        run("predict", *quiet)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        run("fit", "--trainer.max_epochs=2", *quiet)


def test_example_parses(printed: Callable[..., dict[str, Any]]) -> None:
    config = printed("-c", str(_EXAMPLE))
    assert config["model"]["class_path"] == "lightning_embcomp.models.ClickModel"
    assert config["data"]["class_path"].startswith("lightning_embcomp.data.")


@pytest.mark.parametrize(
    "base", ["trainer: {max_epochs: 7}", "trainer: {callbacks: [{class_path: RichModelSummary}]}", None]
)
def test_fragments_add_callbacks(printed: Callable[..., dict[str, Any]], tmp_path: Path, base: str | None) -> None:
    fragment = "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
    (tmp_path / "one.yaml").write_text(fragment)
    (tmp_path / "two.yaml").write_text(fragment.replace("LearningRateMonitor", "DeviceStatsMonitor"))
    (tmp_path / "base.yaml").write_text(base or "")
    first = str(_EXAMPLE) if base is None else "base.yaml"
    config = printed("-c", first, "-c", "one.yaml", "-c", "two.yaml")
    names = [callback["class_path"].rsplit(".", 1)[1] for callback in config["trainer"]["callbacks"]]
    assert names[-2:] == ["LearningRateMonitor", "DeviceStatsMonitor"]
    assert len(names) == (2 if base is not None and "callbacks" not in base else 3)


def test_model_and_data_can_be_other_classes(printed: Callable[..., dict[str, Any]]) -> None:
    config = printed("--model=lightning.pytorch.demos.boring_classes.BoringModel", "--data.num_batches=9")
    assert config["model"]["class_path"].endswith("BoringModel")
    assert config["data"]["init_args"] == {"num_batches": 9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle.architecture=dcn"], "unknown option '--modle.architecture'; did you mean '--model.architecture'?"),
        (["--model.archtecture=dcn"], "ClickModel has no option 'archtecture'; did you mean 'architecture'?"),
        (["--trainer.max_epocs=3"], "did you mean '--trainer.max_epochs'?"),
        (["--model.architecture=dlmr"], "'dlrm', 'dcn', 'deepfm'"),
        (["--model.embedding_dim=-4"], "embedding_dim must be positive, got -4"),
        (["-c", "missing.yaml"], "File does not exist"),
        (["-c", "misspelt.yaml"], "unknown option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'?"),
    ],
)
def test_mistakes_are_named(refused: Callable[..., str], tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "misspelt.yaml").write_text("trainer: {max_epoch: 3}")
    said = refused("fit", *arguments)
    assert message in said
    assert "embcomp fit: error:" in said
    assert "usage:" not in said


def test_unknown_commands_are_named(refused: Callable[..., str]) -> None:
    assert "no command 'fitt'; did you mean 'fit'?" in refused("fitt")
    assert "choose one of fit, validate" in refused("xyz")
    assert "options come after the command" in refused("-c", "x.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_every_command(run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    run(*arguments)
    said = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", *cli.COMMANDS):
        assert f"\n  {command} " in said


def test_other_commands_come_from_their_module(
    run: Run, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = types.ModuleType("embcomp_test_command")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("checkpoint")
        parser.add_argument("--status", type=int, default=0)

    def run_command(args: argparse.Namespace) -> int:
        print("checkpoint:", args.checkpoint)
        return args.status

    module.add_arguments, module.run = add_arguments, run_command
    monkeypatch.setitem(sys.modules, "embcomp_test_command", module)
    monkeypatch.setitem(cli.COMMANDS, "weigh", cli.Command("embcomp_test_command", "weigh a model"))
    run("weigh", "a.ckpt")
    assert capsys.readouterr().out == "checkpoint: a.ckpt\n"
    run("--help")
    assert "weigh a model" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("weigh", "a.ckpt", "--status=3")
    assert stop.value.code == 3
    assert "unrecognized arguments: --jsn" in refused("weigh", "a.ckpt", "--jsn")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_listed_commands_exist(run: Run, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    assert stop.value.code == 0
    assert f"usage: embcomp {name}" in capsys.readouterr().out
