"""Reports read from a checkpoint file, against the engine that wrote it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_embcomp import DimensionPruning, Granularity, PruningSchedule
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.layout import ChunkLayout, LogicalTable
from lightning_embcomp.engine.memory import TableMemory, engine_bytes, table_memory
from lightning_embcomp.engine.optimizer import FusedKind, FusedOptimizerSpec
from lightning_embcomp.engine.plan import ReadPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.models import ClickModel
from lightning_embcomp.report import MemoryReport, read_report
from lightning_embcomp.report.account import total_memory
from lightning_embcomp.report.live import measure, storage_bytes
from lightning_embcomp.report.view import render

TABLES = [("user", 300, 16, 4), ("item", 1000, 8, 2), ("whole", 70, 16, 1), ("gone", 10, 16, 2)]


def new_engine(kind: FusedKind | None, dtype: torch.dtype, layout: ChunkLayout, utility: bool) -> RoutedEmbeddings:
    tables = [LogicalTable(name=n, rows=r, dim=d, chunks=c, layout=layout) for n, r, d, c in TABLES]
    optimizer = FusedOptimizerSpec(kind=kind) if kind else None
    engine = RoutedEmbeddings(tables, options=RoutedOptions(optimizer=optimizer, dtype=dtype))
    codes = [torch.randint(table.codes, (table.rows,), dtype=torch.uint8) for table in tables]
    codes[3].zero_()
    engine.move(ReadPlan(lambda t, start, stop: codes[t][start:stop]))
    for c in range(len(engine.classes)):
        nn.init.normal_(engine.split_embedding_weights()[c])
    engine.clear_row_state()
    if utility:
        engine.track_utility(RowUtility(tables, parts=2, device=torch.device("cpu")))
    return engine


class Host(nn.Module):
    def __init__(self, engine: RoutedEmbeddings) -> None:
        super().__init__()
        self.bags = nn.Module()
        self.bags.engine = engine
        self.top = nn.Linear(16, 4)


def saved(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = (), **more: Any) -> MemoryReport:
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"state_dict": module.state_dict(), "optimizer_states": states, **more}, path)
    return read_report(path)


@pytest.mark.parametrize("layout", ["prefix", "chunks"])
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad", "adam", "partial_rowwise_lamb"])
@pytest.mark.parametrize("utility", [False, True])
def test_fused_tables_are_counted_as_the_engine_counts_them(
    tmp_path: Path, kind: FusedKind, layout: ChunkLayout, utility: bool
) -> None:
    torch.manual_seed(0)
    engine = new_engine(kind, torch.float32, layout, utility)
    report = saved(tmp_path / "a.ckpt", Host(engine))
    assert [table.memory for table in report.tables] == [table_memory(engine, t) for t in range(len(TABLES))]
    assert report.total.total == engine_bytes(engine)
    assert [table.name for table in report.tables] == [f"bags.{name}" for name, *_ in TABLES]


def test_half_precision_is_counted_in_halves(tmp_path: Path) -> None:
    engine = new_engine("rowwise_adagrad", torch.float16, "prefix", True)
    report = saved(tmp_path / "a.ckpt", Host(engine))
    assert [table.memory for table in report.tables] == [table_memory(engine, t) for t in range(len(TABLES))]
    assert report.tables[0].memory.plain_weights == 300 * 16 * 2


def test_live_ratio_per_chunk_is_that_of_the_codes(tmp_path: Path) -> None:
    engine = RoutedEmbeddings([LogicalTable(name="t", rows=5, dim=16, chunks=4)])
    codes = torch.tensor([0, 1, 1, 2, 4], dtype=torch.uint8)
    engine.move(ReadPlan(lambda t, start, stop: codes[start:stop]))
    [table] = saved(tmp_path / "a.ckpt", Host(engine)).tables
    assert table.live == (0.8, 0.4, 0.2, 0.2)
    assert table.memory.weights == (4 + 2 + 1 + 1) * 4 * 4
    assert table.nominal_ratio == 80 / 32


def trained_by(optimizer: type[torch.optim.Optimizer], **options: Any) -> tuple[Host, torch.optim.Optimizer]:
    torch.manual_seed(0)
    host = Host(new_engine(None, torch.float32, "prefix", True))
    instance = optimizer(host.parameters(), **options)  # type: ignore[call-arg]
    for parameter in host.parameters():
        parameter.grad = torch.ones_like(parameter)
    instance.step()
    return host, instance


@pytest.mark.parametrize(
    ("optimizer", "options", "numbers"),
    [
        (torch.optim.Adam, {"lr": 0.1}, 2),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
        (torch.optim.SGD, {"lr": 0.1}, 0),
        (torch.optim.Adagrad, {"lr": 0.1}, 1),
    ],
)
def test_state_of_the_users_optimizer_is_found(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], options: dict[str, Any], numbers: int
) -> None:
    host, instance = trained_by(optimizer, **options)
    report = saved(tmp_path / "a.ckpt", host, [instance])
    engine = host.bags.engine
    assert isinstance(engine, RoutedEmbeddings)
    for t, table in enumerate(report.tables):
        live = table_memory(engine, t)
        assert table.memory.weights == live.weights
        assert table.memory.optimizer_state == numbers * live.weights
        assert table.memory.plain_optimizer_state == numbers * live.plain_weights
    in_memory = sum(
        value.untyped_storage().nbytes()
        for parameter in engine.parameters()
        for value in instance.state[parameter].values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    assert report.total.optimizer_state == in_memory


def small_log() -> SyntheticClickLogDataModule:
    return SyntheticClickLogDataModule(SyntheticClickLog(num_rows=4000, num_embeddings=(60, 700)), batch_size=256)


@pytest.mark.parametrize("embedding_optimizer", ["rowwise_adagrad", "sgd", "none"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_trained_model_is_reported_as_it_was_in_memory(
    tmp_path: Path, embedding_optimizer: Any, compressed: bool
) -> None:
    callbacks: list[pl.Callback] = []
    if compressed:
        callbacks.append(
            DimensionPruning(target=0.7, schedule=PruningSchedule(every_n_steps=4), granularity=Granularity(chunks=2))
        )
    model = ClickModel(embedding_dim=8, over_layers=(8,), embedding_optimizer=embedding_optimizer)
    trainer = pl.Trainer(
        max_steps=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    trainer.fit(model, small_log())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    report, live = read_report(tmp_path / "a.ckpt"), measure(model, trainer.optimizers)
    kinds = ("weights", "optimizer_state", "router", "statistics", "total")
    assert {kind: getattr(report.total, kind) for kind in kinds} == {kind: getattr(live, kind) for kind in kinds}
    assert report.global_step == 10
    numbers = {"rowwise_adagrad": 1 / 8, "sgd": 0, "none": 2}[embedding_optimizer]
    assert report.total.plain_total == 760 * 8 * 4 * (1 + numbers)
    assert (report.total.ratio == 1.0) is not compressed
    assert bool(report.notes) is (embedding_optimizer == "sgd")


def test_storages_are_counted_once_and_whole() -> None:
    table = torch.zeros(100, 4)
    assert storage_bytes([table[:1], table.view(-1), torch.zeros(2, dtype=torch.float16)]) == 1600 + 4


def test_totals_are_sums() -> None:
    one = TableMemory(
        name="a",
        rows=1,
        dim=4,
        weights=2,
        optimizer_state=3,
        router=4,
        statistics=5,
        plain_weights=60,
        plain_optimizer_state=7,
    )
    total = total_memory([one, one])
    assert (total.rows, total.total, total.plain_total, total.ratio) == (2, 28, 134, 134 / 28)


def test_json_holds_every_number(tmp_path: Path) -> None:
    report = saved(tmp_path / "a.ckpt", Host(new_engine("sgd", torch.float32, "prefix", True)), epoch=3, global_step=9)
    values = json.loads(json.dumps(report.as_dict()))
    assert values["epoch"] == 3 and values["global_step"] == 9
    assert values["total"]["total"] == sum(table["total"] for table in values["tables"])
    assert len(values["tables"][0]["live_ratio"]) == 4
    # Nothing is stored of the last table: there is no nominal ratio.
    assert values["tables"][3]["nominal_ratio"] is None


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    report = saved(tmp_path / "a.ckpt", Host(new_engine("sgd", torch.float32, "prefix", True)))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(report))
    text = capture.get()
    assert "…" not in text
    for name, rows, *_ in TABLES:
        assert name in text and f"{rows:,}" in text
