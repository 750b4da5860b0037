"""``embcomp plan`` as the console script runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_embcomp import DimensionPruning, cli
from lightning_embcomp.models import ClickModel
from lightning_embcomp.planners import TableFootprint, checkpoint_footprints, engine_footprint

_ROOT = Path(__file__).resolve().parents[2]
_DLRM = str(_ROOT / "examples" / "dlrm.yaml")
_FIITED = str(_ROOT / "callbacks" / "fiited.yaml")
_TABLES = """
dim: 64
tables:
- {name: user, rows: 300000, pooling: 2}
- {name: item, rows: 300000}
- {name: tiny, rows: 20}
"""
Plan = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs the command; gives its status, what it printed, and its JSON."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables.yaml").write_text(_TABLES)
    command = cli.Command("lightning_embcomp.planners.command", "plan")
    monkeypatch.setitem(cli.COMMANDS, "plan", command)

    def call(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        status = 0
        try:
            cli.main(["plan", *arguments, "--json", "plan.json"])
        except SystemExit as stop:
            status = int(str(stop.code))
        said = capsys.readouterr()
        file = tmp_path / "plan.json"
        return status, said.out + said.err, json.loads(file.read_text()) if file.exists() else {}

    return call


def fragment(folder: Path, **settings: Any) -> str:
    file = folder / "prune.yaml"
    callback = {"class_path": "lightning_embcomp.DimensionPruning", "init_args": settings}
    file.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    return str(file)


def test_tables_that_fit_only_when_pruned(plan: Plan, tmp_path: Path) -> None:
    pruned = fragment(tmp_path, target=0.65, scope="table")
    status, said, found = plan("--tables", "tables.yaml", "-c", pruned, "--world-size", "2", "--hbm", "60MB")
    assert status == 0, said
    assert found["plain"]["plan"] is None and "prune the tables: DimensionPruning(target=0.5) fits" in said
    ranks = found["compressed"]["plan"]["ranks"]
    assert len(ranks) == 2 and all(0 < rank["device_bytes"] < 0.85 * 60e6 for rank in ranks)
    assert {table["name"] for table in found["compressed"]["plan"]["tables"]} == {"user", "item", "tiny"}
    assert found["weights_kept"]["user"] == pytest.approx(0.35, abs=1e-3)
    assert "35.0 %" in said and "one budget" not in said


def test_no_plan_at_all(plan: Plan) -> None:
    status, said, found = plan("--tables", "tables.yaml", "--world-size", "2", "--ddr", "1MB")
    assert status == 1
    assert "2 ranks with 1.0 MB of ddr each" in said and "What helps" in said
    assert found["plain"]["plan"] is None and "compressed" not in found


def test_types_and_pooling(plan: Plan) -> None:
    base = ("--tables", "tables.yaml", "--world-size", "4", "--hbm", "1GB")
    _, _, found = plan(*base, "--sharding", "user=row_wise", "*=table_wise")
    placed = {table["name"]: table for table in found["plain"]["plan"]["tables"]}
    assert placed["user"]["sharding"] == "row_wise" and placed["user"]["ranks"] == [0, 1, 2, 3]
    assert placed["item"]["sharding"] == "table_wise" and len(placed["item"]["ranks"]) == 1
    _, _, longer = plan(*base, "--sharding", "user=row_wise", "*=table_wise", "--pooling", "item=50")
    times = {table["name"]: table["milliseconds"] for table in longer["plain"]["plan"]["tables"]}
    assert times["item"] > 5 * placed["item"]["milliseconds"]
    assert times["user"] == placed["user"]["milliseconds"]


def test_a_configuration_is_planned_without_its_tables(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[ClickModel] = []
    configure = ClickModel.configure_model

    def keep(self: ClickModel) -> None:
        configure(self)
        built.append(self)

    monkeypatch.setattr(ClickModel, "configure_model", keep)
    status, said, found = plan("-c", _DLRM, "-c", _FIITED, "--world-size", "2", "--ddr", "1GB")
    assert status == 0, said
    assert "8 tables" in said and "one budget (scope: global)" in said and "t_feature_7" in said
    assert all("model.sparse_arch" in name for name in found["weights_kept"])
    tables = [weight for name, weight in built[0].named_parameters() if "embedding_bag" in name]
    assert len(tables) == 8 and all(weight.is_meta for weight in tables)
    rows = torch.tensor([table["rows"] for table in found["plain"]["plan"]["tables"]], dtype=torch.float64)
    kept = torch.tensor(list(found["weights_kept"].values()), dtype=torch.float64)
    assert float((rows * kept).sum() / rows.sum()) == pytest.approx(0.2, abs=1e-3)


def test_the_strategy_of_the_configuration_counts(plan: Plan, tmp_path: Path) -> None:
    strategy = {
        "class_path": "lightning_embcomp.strategies.TorchRecStrategy",
        "init_args": {"sharding": {"*": "table_wise"}, "ddr": "3MB", "batch_size": 64},
    }
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "devices": 64}}))
    status, said, found = plan("-c", _DLRM, "-c", "sharded.yaml", "--world-size", "2")
    assert "3.0 MB of ddr" in said and "64 samples per rank" in said
    assert status == 1 and "Table 'model.sparse_arch" in said and "allow row_wise" in said
    status, _, found = plan("-c", _DLRM, "-c", "sharded.yaml", "--world-size", "2", "--ddr", "1GB")
    assert {table["sharding"] for table in found["plain"]["plan"]["tables"]} == {"table_wise"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[str, dict[str, TableFootprint]]:
    """A checkpoint of a pruned run, and the footprints of its live engine."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    ids = torch.randint(0, 2000, (64,), generator=torch.Generator().manual_seed(0))
    sparse = KeyedJaggedTensor(["user"], ids, lengths=torch.ones(64, dtype=torch.int64))
    batches = [(torch.ones(64, 2), sparse, (ids % 2).float())] * 4
    model = ClickModel(
        embedding_dim=16, features=[{"name": "user", "num_embeddings": 2000}], num_dense=2, over_layers=(8,)
    )
    callback = DimensionPruning(target=0.7)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, loader)
    path = str(tmp_path / "run.ckpt")
    trainer.save_checkpoint(path)
    [held] = callback.owned
    [shard] = held.shards
    return path, {held.name: engine_footprint(shard.engine, shard.index)}


def test_a_checkpoint_says_what_its_tables_take(
    plan: Plan, tmp_path: Path, checkpoint: tuple[str, dict[str, TableFootprint]]
) -> None:
    path, live = checkpoint
    assert checkpoint_footprints(path) == live
    [(name, footprint)] = live.items()
    assert footprint.kept == pytest.approx(0.3, abs=0.01) and footprint.row_bytes == pytest.approx(3, abs=0.1)
    model = {
        "class_path": "lightning_embcomp.models.ClickModel",
        "init_args": {
            "embedding_dim": 16,
            "features": [{"name": "user", "num_embeddings": 2000}],
            "num_dense": 2,
            "over_layers": [8],
        },
    }
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    status, said, found = plan("-c", "model.yaml", "--ckpt", path, "--world-size", "2", "--ddr", "1GB")
    assert status == 0, said
    assert found["weights_kept"] == {name: footprint.kept}
    status, said, _ = plan("--tables", "tables.yaml", "--ckpt", path, "--world-size", "2", "--ddr", "1GB")
    assert status == 2 and f"its table {name!r} is none of the tables to plan: item, tiny, user" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "2", "--hbm", "1GB"], "give a configuration (-c FILE), or a list of tables"),
        (["--tables", "tables.yaml", "--world-size", "2"], "--hbm 80GB for a GPU"),
        (["--tables", "tables.yaml", "--world-size", "2", "--hbm", "much"], "'much' is not a size"),
        (["--tables", "none.yaml", "--world-size", "2", "--hbm", "1GB"], "none.yaml: it cannot be read"),
        (
            ["--tables", "tables.yaml", "--world-size", "2", "--hbm", "1GB", "--pooling", "usr=3"],
            "'usr' matches no table; there are user, item, tiny",
        ),
        (
            ["--tables", "tables.yaml", "--world-size", "2", "--hbm", "1GB", "--sharding", "user=rowwise"],
            "there is no such sharding type",
        ),
        (
            ["--tables", "tables.yaml", "--world-size", "2", "--ddr", "1GB", "--sharding", "user=grid_shard"],
            "table 'user' cannot be sharded grid_shard on cpu",
        ),
        (["--tables", "tables.yaml", "--world-size", "2", "--hbm", "1GB", "--reserve", "1"], "--reserve is a share"),
        (["--tables", "tables.yaml", "--world-size", "2", "--hbm", "1GB", "--ckpt", "x.ckpt"], "no such file"),
    ],
)
def test_mistakes_are_named(plan: Plan, arguments: list[str], message: str) -> None:
    status, said, _ = plan(*arguments)
    assert status == 2
    assert message in said
    assert said.startswith("embcomp plan: error: ")


def test_globs_of_callbacks_are_checked(plan: Plan, tmp_path: Path) -> None:
    wrong = fragment(tmp_path, target=0.5, tables="t_*")
    status, said, _ = plan("--tables", "tables.yaml", "-c", wrong, "--world-size", "2", "--hbm", "1GB")
    assert status == 2 and "no embedding table matches 't_*'. Tables of the model: user, item, tiny" in said


def test_what_training_would_refuse_is_said(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "adam.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {
                    "class_path": "lightning_embcomp.models.ClickModel",
                    "init_args": {"embedding_optimizer": "none"},
                }
            }
        )
    )
    _, said, _ = plan("-c", _DLRM, "-c", "adam.yaml", "-c", _FIITED, "--world-size", "2", "--ddr", "1GB")
    assert "Training on several ranks refuses this" in said and "configure_optimizers" in said


def test_a_budget_is_planned_by_its_callbacks(plan: Plan, tmp_path: Path) -> None:
    callback = {"class_path": "lightning_embcomp.CompressionBudget", "init_args": {"ratio": 10, "start": 0.25}}
    (tmp_path / "budget.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    status, said, found = plan("--tables", "tables.yaml", "-c", "budget.yaml", "--world-size", "2", "--hbm", "200MB")
    assert status == 0, said
    kept = found["weights_kept"]
    assert kept["user"] == pytest.approx(0.25, abs=0.02) and set(kept) == {"user", "item", "tiny"}
    assert found["compressed"]["plan"]["bytes"] < 0.4 * found["plain"]["plan"]["bytes"]
    said = " ".join(said.split())
    assert "CompressionBudget[*] works in one process only so far: training on several ranks refuses it" in said
    assert "the plan is that of its start. Plan again from a checkpoint" in said and "one budget" not in said
