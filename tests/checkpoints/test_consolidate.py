"""One ordinary file from a checkpoint directory, which a plain module loads."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_embcomp.checkpoints import (
    COMPRESSED,
    STATE_DICT,
    CheckpointError,
    CheckpointReader,
    Slices,
    command,
    consolidate,
    consolidation,
    save_checkpoint,
)
from lightning_embcomp.cli import COMMANDS, Command, main
from tests.checkpoints.tables import filled


class Model(pl.LightningModule):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.table = nn.Embedding(rows, 4)
        self.top = nn.Linear(4, 1)


class Custom:
    """Of a class that is not read from files for safety."""


def directory(folder: Path, **common: Any) -> Path:
    """A checkpoint of a model, its table in two parts, and an optimizer state."""
    weight = filled("table.weight", (6, 4))
    tensors = {
        STATE_DICT + "table.weight": Slices((6, 4), [((0, 0), weight[:2]), ((2, 0), weight[2:])]),
        STATE_DICT + "top.weight": filled("top.weight", (1, 4)),
        STATE_DICT + "top.bias": torch.ones(1),
        "optimizer/table.weight/momentum": torch.ones(6),
    }
    payload = {
        "epoch": 2,
        "global_step": 10,
        "pytorch-lightning_version": pl.__version__,
        "hyper_parameters": {"rows": 6},
        "optimizer_states": [{"by": "name"}],
        "lr_schedulers": [],
        **common,
    }
    save_checkpoint(folder / "sharded.ckpt", tensors=tensors, common=payload, per_rank={})
    return folder / "sharded.ckpt"


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_a_plain_module_loads_it(in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidation, "_IN_MEMORY_BYTES", in_memory)
    out = consolidate(directory(tmp_path), tmp_path / "new" / "plain.ckpt")
    model = Model.load_from_checkpoint(out)
    assert torch.equal(model.table.weight, filled("table.weight", (6, 4)))
    assert torch.equal(model.top.weight, filled("top.weight", (1, 4))) and model.top.bias.item() == 1
    content = torch.load(out)
    assert content["epoch"] == 2 and "optimizer_states" not in content and len(content["state_dict"]) == 3
    assert os.listdir(out.parent) == ["plain.ckpt"]


def test_compressed_tables_are_converted(tmp_path: Path) -> None:
    codes_key = COMPRESSED + "bags/engine.tables.t.row_codes"
    tensors = {
        codes_key: torch.tensor([1, 2]),
        COMPRESSED + "bags/engine.rate": torch.ones(1),
        STATE_DICT + "top.bias": torch.zeros(1),
    }
    save_checkpoint(tmp_path / "c", tensors=tensors, common={"state_dict": {"top._extra_state": 5}}, per_rank={})

    def convert(reader: CheckpointReader) -> dict[str, torch.Tensor]:
        codes = torch.empty(2, dtype=torch.int64)
        reader.read_into({codes_key: codes})
        return {"table.weight": codes.float()}

    with pytest.raises(CheckpointError, match="compressed tables"):
        consolidate(tmp_path / "c", tmp_path / "out.ckpt")
    state = torch.load(consolidate(tmp_path / "c", tmp_path / "out.ckpt", convert=convert))["state_dict"]
    assert state["table.weight"].tolist() == [1, 2] and state["top._extra_state"] == 5
    assert set(state) == {"table.weight", "top.bias", "top._extra_state"}


def test_refusals(tmp_path: Path) -> None:
    path = directory(tmp_path)
    save_checkpoint(tmp_path / "other", tensors={"a": torch.ones(1)}, common={}, per_rank={})
    with pytest.raises(CheckpointError, match="holds no weights"):
        consolidate(tmp_path / "other", tmp_path / "out.ckpt")
    with pytest.raises(CheckpointError, match="there is a directory of that name"):
        consolidate(path, tmp_path / "other")
    (tmp_path / "out.ckpt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        consolidate(path, tmp_path / "out.ckpt")
    assert (tmp_path / "out.ckpt").read_text() == "mine"
    consolidate(path, tmp_path / "out.ckpt", overwrite=True)
    assert torch.load(tmp_path / "out.ckpt")["global_step"] == 10


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COMMANDS, "consolidate", Command(command.__name__, "one file from a checkpoint directory"))
    path, out = directory(tmp_path, callbacks={"mine": Custom()}), tmp_path / "out.ckpt"
    with pytest.raises(SystemExit, match="2"):
        main(["consolidate", str(path), str(out)])
    said = capsys.readouterr().err
    assert said.startswith("embcomp consolidate: error:") and "Custom" in said and "(--trust)" in said
    main(["consolidate", str(path), str(out), "--trust"])
    assert str(out) in capsys.readouterr().out and out.exists()
    with pytest.raises(SystemExit, match="2"):
        main(["consolidate", str(tmp_path / "nothing"), str(out), "--overwrite"])
    assert "no such checkpoint" in capsys.readouterr().err
