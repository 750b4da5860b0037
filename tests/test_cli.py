"""The ``embcomp`` command, run in this process as the console script runs it."""

import argparse
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_embcomp
from lightning_embcomp import cli, data, models, trainer_cli

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


CALLBACK = "trainer: {callbacks: [{class_path: lightning_embcomp.%s, init_args: {%s}}]}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--modle.architecture=dcn", "unknown option '--modle.architecture'; did you mean '--model.architecture'?"),
        ("--model.archtecture=dcn", "ClickModel has no option 'archtecture'; did you mean 'architecture'?"),
        ("--trainer.max_epocs=3", "unknown option '--trainer.max_epocs'; did you mean '--trainer.max_epochs'?"),
        ("--trainer.max_epoch=3", "unknown option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'?"),
        ("--optimizer=Adam", "unknown option '--optimizer'\n"),
        ("stray", "'stray' is no option"),
        ("--model=lightning_embcomp.models.ClckModel", "did you mean 'lightning_embcomp.models.ClickModel'?"),
        ("--trainer.callbacks+=DimensionPrunin", "no class 'DimensionPrunin'; did you mean 'DimensionPruning'?"),
        ("--trainer.callbacks.help=DimensionPrunin", "did you mean 'DimensionPruning'?"),
        ("--trainer.callbacks.target=0.3", "no callback of the configuration has the option 'target'"),
        ("--data=SyntheticClickLogDataModule --data.log.num_row=9", "no option 'num_row'; did you mean 'num_rows'?"),
        ("--model.architecture=dlmr", "takes 'dlrm', 'dcn' or 'deepfm', not 'dlmr'; did you mean 'dlrm'?"),
        ("--model.over_layers=64", "model.over_layers of lightning_embcomp.models.ClickModel takes list, not '64'"),
        ("--trainer.max_epochs=three", "error: trainer.max_epochs takes int or null, not 'three'\n"),
        ("--model.embedding_dim=-4", "embedding_dim must be positive, got -4"),
    ],
)
def test_mistakes_are_named(refused: Callable[..., str], arguments: str, message: str) -> None:
    said = refused("fit", *arguments.split())
    assert message in said
    assert said.startswith("embcomp fit: error: ")
    assert len(said.splitlines()) == 2
    assert "`embcomp fit --help` lists all options." in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_epoch: 3}", "unknown option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'?"),
        ("trainr: {max_epochs: 3}", "unknown option '--trainr.max_epochs'; did you mean '--trainer.max_epochs'?"),
        ("trainer: {max_epochs: 3.5}", "trainer.max_epochs takes int or null, not '3.5'"),
        ("trainer: {enable_progress_bar: maybe}", "takes true or false or null, not 'maybe'"),
        ("trainer:\n\tmax_epochs: 3", "line 2, column 1: this is no YAML"),
        ("- a\n- b", "it holds no options: write them by name"),
        (CALLBACK % ("DimensionPrunning", "target: 0.5"), "did you mean 'lightning_embcomp.DimensionPruning'?"),
        (
            CALLBACK.replace("comp.", "cmp.") % ("X", "target: 1"),
            "'lightning_embcmp'; did you mean 'lightning_embcomp'?",
        ),
        (CALLBACK.replace("args", "arg") % ("X", "target: 1"), "no key 'init_arg'; did you mean 'init_args'?"),
        (CALLBACK % ("DimensionPruning", "targt: 0.5"), "no option 'targt'; did you mean 'target'?"),
        (
            CALLBACK % ("DimensionPruning", "schedule: {every_n_steps: often}"),
            "trainer.callbacks.schedule.every_n_steps of lightning_embcomp.PruningSchedule takes int, not 'often'",
        ),
        (
            CALLBACK % ("DimensionPruning", "schedule: {evry_n_steps: 5}"),
            "lightning_embcomp.PruningSchedule has no option 'evry_n_steps'; did you mean 'every_n_steps'?",
        ),
        ("data: {class_path: SyntheticClickLogDataModule, init_args: {log: {num_row: 5}}}", "did you mean 'num_rows'?"),
    ],
)
def test_mistakes_name_their_file(refused: Callable[..., str], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "good.yaml").write_text("trainer: {max_epochs: 3}")
    (tmp_path / "run.yaml").write_text(text)
    said = refused("fit", "-c", "run.yaml", "-c", "good.yaml")
    assert message in said
    assert said.startswith("embcomp fit: error: run.yaml: ")
    assert len(said.splitlines()) == 2


def test_missing_files_are_named(refused: Callable[..., str]) -> None:
    assert "missing.yaml: there is no such file" in refused("fit", "-c", "missing.yaml")


def test_options_come_in_named_groups(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--help")
    said = capsys.readouterr().out
    assert said.startswith("usage: embcomp fit ")
    assert [line for line in said.splitlines() if re.fullmatch(r"\S.*:", line)] == [
        f"{title}:" for title in ("options", "trainer", "model", "data", "checkpoint")
    ]
    assert ":paramref:" not in said and "<class" not in said


CLASSES = [
    *(getattr(lightning_embcomp, name) for name in lightning_embcomp.__all__),
    *(getattr(data, name) for name in ("ClickLogDataModule", "SyntheticClickLog", "SyntheticClickLogDataModule")),
    models.ClickModel,
]


@pytest.mark.parametrize(
    "configured",
    [kind for kind in CLASSES if inspect.isclass(kind) and not issubclass(kind, Exception)],
    ids=lambda kind: kind.__name__,
)
def test_every_option_is_explained(configured: type) -> None:
    parser = trainer_cli.EmbCompParser()
    parser.add_class_arguments(configured, "x")
    silent = [option for action in parser._actions if not action.help for option in action.option_strings]
    assert silent == {"CompressionAwarePlanner": ["--x.plan_loader"]}.get(configured.__name__, [])


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
    assert "unknown option '--stats'; did you mean '--status'?" in refused("weigh", "a.ckpt", "--stats", "3")
    assert "unknown option '--stat'; did you mean '--status'?" in refused("weigh", "a.ckpt", "--stat=3")
    assert "invalid int value: 'three'" in refused("weigh", "a.ckpt", "--status", "three")
    assert "the following arguments are required: checkpoint" in refused("weigh")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_listed_commands_exist(run: Run, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: embcomp {name}")
    explained = re.findall(r"^  (?:-\w(?: \S+)?, )?(--[\w-]+)(?: [^ ]+)*(?: {2,}|\n {10,})\w", said, flags=re.MULTILINE)
    assert explained == re.findall(r"^  (?:-\w(?: \S+)?, )?(--[\w-]+)", said, flags=re.MULTILINE)
