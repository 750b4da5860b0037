"""Checkpoints read without their module, and the command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lightning_embcomp import (
    Granularity,
    MixedPrecisionSearch,
    ModelExport,
    PrecisionSearch,
    cli,
    deferred_tables,
)
from lightning_embcomp.export import ExportError, build, dense_state, hosts_of, load, load_model, read, write
from lightning_embcomp.export.checkpoint import hosts_of_checkpoint
from lightning_embcomp.report.checkpoint import open_checkpoint

from .pipeline import (
    DIM,
    PRUNING,
    ROWS,
    Clicks,
    bag_collection,
    built_model,
    click_model,
    compressed,
    fitted,
    precision_of,
    same_exports,
    trainer,
)

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("layout", [None, "prefix", "chunks"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "none"])
def test_a_checkpoint_gives_what_the_module_gives(tmp_path: Path, optimizer: str, layout: Any, pooling: str) -> None:
    callbacks = [PRUNING(granularity=Granularity(layout=layout))] if layout else []
    model, path = fitted(tmp_path, *callbacks, embedding_optimizer=optimizer, pooling=pooling)
    live = build(hosts_of(model), 8, dense=dense_state(model))
    hosts, dense = hosts_of_checkpoint(open_checkpoint(path), path)
    saved = build(hosts, 8, dense=dense)
    same_exports(live, saved)
    [host] = saved.manifest.hosts
    assert host.kind == "bag_collection"  # known from the hyperparameters
    assert [table.features for table in host.tables] == [("user",), ("item",), ("tags",)]
    write(saved, tmp_path / "out")
    batch = Clicks().batches[0][1]
    with torch.no_grad():
        expected = model.model.sparse_arch.embedding_bag_collection(batch).values()  # type: ignore[union-attr]
    torch.testing.assert_close(load(tmp_path / "out")(batch).values(), expected, atol=0.02, rtol=0)


def test_a_pruned_run_exports_pruned(tmp_path: Path) -> None:
    model, path = fitted(tmp_path, PRUNING())
    full = 4 * DIM * sum(ROWS.values())
    hosts, dense = hosts_of_checkpoint(open_checkpoint(path), path)
    artefact = build(hosts, 8, dense=dense)
    widths = {spec.format.width for spec in artefact.manifest.classes}
    assert widths <= {4, 8, 12, 16} and len(widths) > 1
    live = sum(spec.rows * spec.format.width for spec in artefact.manifest.classes)
    stored = sum(
        p.numel() for host in model.modules() if hasattr(host, "engine") for p in host.engine.split_embedding_weights()
    )
    assert live == stored <= 0.4 * full / 4
    write(artefact, tmp_path / "out")
    exported = load_model(tmp_path / "out", click_model())
    dense_input, sparse, _ = Clicks().batches[0]
    with torch.no_grad():
        torch.testing.assert_close(exported(dense_input, sparse), model(dense_input, sparse), atol=0.02, rtol=0)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_rounding_is_read_from_the_checkpoint(tmp_path: Path, shuffled: bool) -> None:
    source = compressed(built_model(), round_with=partial(precision_of, shuffled=shuffled))
    assert isinstance(source, pl.LightningModule)
    checkpoint = {"state_dict": source.state_dict(), "hyper_parameters": dict(source.hparams)}
    hosts, dense = hosts_of_checkpoint(checkpoint, "x.ckpt")
    assert all(table.precision is not None for host in hosts for table in host.tables)
    same_exports(build(hosts_of(source), dense=dense_state(source)), build(hosts, dense=dense))
    del checkpoint["state_dict"]["model.sparse_arch.embedding_bag_collection.engine.tables.t_item.precision.steps"]
    with pytest.raises(ExportError, match="the precision of table 't_item' is damaged"):
        hosts_of_checkpoint(checkpoint, "x.ckpt")


def test_kinds_and_features_that_a_checkpoint_does_not_know(tmp_path: Path) -> None:
    root = nn.ModuleDict({"bags": bag_collection(), "user": nn.EmbeddingBag(30, 8, mode="mean")})
    source = compressed(root)
    hosts, dense = hosts_of_checkpoint({"state_dict": source.state_dict()}, "x.ckpt")
    assert {host.path: host.kind for host in hosts} == {"bags": "unknown", "user": "unknown"}
    write(build(hosts, 32, dense=dense), tmp_path / "out")
    with pytest.raises(ExportError, match="does not say what kind of module 'bags' is.*load_model"):
        load(tmp_path / "out")
    root = nn.ModuleDict({"bags": bag_collection(), "user": nn.EmbeddingBag(30, 8, mode="mean")})
    loaded = load_model(tmp_path / "out", root)
    ids = torch.tensor([[1, 2], [29, 29]])
    assert isinstance(source, nn.ModuleDict) and isinstance(loaded, nn.ModuleDict)
    torch.testing.assert_close(loaded["user"](ids), source["user"](ids).detach())


@pytest.mark.parametrize("routed", [False, True])
def test_the_padding_row_of_a_checkpoint_reads_as_zero(tmp_path: Path, routed: bool) -> None:
    """What training left in the padding row of a compressed table is never read."""
    source: Any = nn.ModuleDict({"user": nn.Embedding(30, 8, padding_idx=3)})
    source = compressed(source)
    source["user"].engine.load_rows(0, 0, torch.randn(30, 8))
    ids = torch.tensor([[3, 1], [29, 3]])
    expected = source["user"](ids).detach()
    assert not bool(expected[0, 0].any()) and bool(source["user"].engine.read_rows(0, 0, 4)[3].any())
    hosts, dense = hosts_of_checkpoint({"state_dict": source.state_dict()}, "x.ckpt")
    write(build(hosts, 32, dense=dense), tmp_path / "out")
    fresh: Any = nn.ModuleDict({"user": nn.Embedding(30, 8, padding_idx=3)})
    loaded: Any = load_model(tmp_path / "out", compressed(fresh) if routed else fresh)
    assert torch.equal(loaded["user"](ids), expected)


@pytest.mark.parametrize("deferred", [False, True])
def test_plain_embeddings_of_a_checkpoint_stay_plain(tmp_path: Path, deferred: bool) -> None:
    def model() -> Any:
        return nn.ModuleDict(
            {"bags": bag_collection(), "user": nn.Embedding(30, 8), "offer": nn.EmbeddingBag(20, 4, mode="sum")}
        )

    source = model()
    hosts, dense = hosts_of_checkpoint({"state_dict": source.state_dict()}, "x.ckpt")
    assert [host.path for host in hosts] == ["bags"]
    write(build(hosts, 8, dense=dense), tmp_path / "out")
    with deferred_tables() if deferred else nullcontext():
        fresh = model()
    loaded: Any = load_model(tmp_path / "out", fresh)
    for name in ("user", "offer"):
        assert type(loaded[name]) is type(source[name]) and torch.equal(loaded[name].weight, source[name].weight)
    assert not hasattr(loaded["bags"], "embedding_bags")
    other = model()
    other["extra"] = nn.Embedding(5, 4)
    with pytest.raises(ExportError, match="only the model holds tables at 'extra'"):
        load_model(tmp_path / "out", other)


def test_checkpoints_without_tables() -> None:
    with pytest.raises(ExportError, match="x.ckpt: it holds no embedding table that can be recognised"):
        hosts_of_checkpoint({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, "x.ckpt")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["embcomp", *arguments])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


TINY = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "filename": "best"}}],
    },
    "model": {"class_path": "lightning_embcomp.models.ClickModel", "init_args": {"over_layers": [8]}},
    "data": {
        "class_path": "lightning_embcomp.data.SyntheticClickLogDataModule",
        "init_args": {
            "batch_size": 256,
            "log": {
                "class_path": "lightning_embcomp.data.SyntheticClickLog",
                "init_args": {"num_rows": 3000, "num_embeddings": [50, 400]},
            },
        },
    },
}


def test_command_with_and_without_the_run(run: Callable[..., Any], tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads(json.dumps(TINY))
    config["data"]["init_args"]["log"] = {"num_rows": 3000, "num_embeddings": [50, 400]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    status, _, error = run("fit", "-c", "run.yaml", "-c", str(_ROOT / "callbacks" / "fiited.yaml"))
    assert status == 0, error
    both = ("-c", "run.yaml", "-c", str(_ROOT / "callbacks" / "fiited.yaml"))
    status, said, error = run("export", "--ckpt", "kept/best.ckpt", "--out", "alone", "--format", "packed")
    assert status == 0, error
    assert "NE guard: not run" in said and "ratio" in said
    status, said, error = run(
        "export", "--ckpt", "kept/best.ckpt", "--out", "guarded", "--bits=4", "--tables", "t_feature_0=16", *both
    )
    assert status == 0, error
    assert "Validation, 3" in said and "largest" in said
    manifest = read(tmp_path / "guarded").manifest
    assert manifest.source["checkpoint"] == "best.ckpt" and manifest.source["global_step"] == 10
    assert manifest.metrics["val_ne_after"] / manifest.metrics["val_ne_before"] <= 1.0005
    [host] = manifest.hosts
    assert {manifest.classes[c].format.bits for c in host.tables[0].classes} == {16}
    # The saved configuration of the run works as well.
    [saved] = (tmp_path / "lightning_logs").rglob("config.yaml")
    status, _, error = run("export", "--ckpt", "kept/best.ckpt", "--out", "guarded", "-c", str(saved), "--overwrite")
    assert status == 0, error


def test_command_errors(run: Callable[..., Any], tmp_path: Path) -> None:
    _, path = fitted(tmp_path)
    checkpoint = ("export", "--ckpt", str(path), "--out", "out")

    def refused(*arguments: str) -> str:
        status, _, error = run(*arguments)
        assert status == 2
        assert "Traceback" not in error
        return error

    assert "there is no such file" in refused("export", "--ckpt", "no.ckpt", "--out", "out")
    assert "GLOB=BITS" in refused(*checkpoint, "--tables", "t_user")
    assert "no embedding table matches 't_usr'" in refused(*checkpoint, "--tables", "t_usr=4")
    assert "add -c FILE" in refused(*checkpoint, "--strict")
    assert "invalid choice: 5" in refused(*checkpoint, "--bits", "5")
    assert not (tmp_path / "out").exists()
    assert run(*checkpoint)[0] == 0
    assert "there is an export already" in refused(*checkpoint)
    assert run(*checkpoint, "--overwrite")[0] == 0


def test_fragment_shows_the_defaults(run: Callable[..., Any]) -> None:
    text = (_ROOT / "callbacks" / "export.yaml").read_text()
    shown = yaml.safe_load(re.sub(r"^( +)# (\w+: )", r"\1\2", text, flags=re.MULTILINE))
    [callback] = shown["trainer"]["callbacks+"]
    assert callback["class_path"] == "lightning_embcomp.ModelExport"
    given = callback["init_args"]
    made, default = ModelExport(**given), ModelExport("served")
    assert (made.options, made.checkpoint, made.guarded) == (default.options, default.checkpoint, default.guarded)
    status, said, error = run(
        "fit",
        "-c",
        str(_ROOT / "examples" / "dlrm.yaml"),
        "-c",
        str(_ROOT / "callbacks" / "export.yaml"),
        "--print_config",
    )
    assert status == 0, error
    assert "ModelExport" in said and np.isclose(
        yaml.safe_load(said)["trainer"]["callbacks"][-1]["init_args"]["max_ne_loss"], 0.0005
    )


def test_a_state_that_is_still_searched_is_not_exported(tmp_path: Path) -> None:
    """The same words for a model in memory and for its checkpoint."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")
            with pytest.raises(ExportError, match="bits of table .* are still being searched"):
                hosts_of(pl_module)
            assert len(hosts_of(pl_module, trained=False)) == 1  # its tables have names all the same

    search = MixedPrecisionSearch(ratio=20, search=PrecisionSearch(frequency="rank"))
    trainer(search, Save(), folder=tmp_path, max_steps=2).fit(click_model(), datamodule=Clicks())
    with pytest.raises(ExportError, match="bits of table .* are still being searched"):
        hosts_of_checkpoint(open_checkpoint(tmp_path / "early.ckpt"), tmp_path / "early.ckpt")
