"""Names and configurations of the strategy, and how its processes are started."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_embcomp.strategies import ShardingError, TorchRecStrategy
from tests.strategies.models import Clicks, global_batch, loader, train_plain

_SCRIPT = Path(__file__).with_name("script.py")
_ROOT = _SCRIPT.parents[2]
_CONFIG = """
seed_everything: 1
data: {init_args: {batch_size: 64, log: {num_rows: 4000, num_embeddings: [50, 20, 30]}}}
trainer:
  accelerator: cpu
  devices: 2
  max_steps: 5
  limit_val_batches: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy: STRATEGY
"""


def run_script(tmp_path: Path, strategy: str, *launcher: str, **variables: str) -> str:
    config = tmp_path / "config.yaml"
    config.write_text(_CONFIG.replace("STRATEGY", strategy))
    command = [*(launcher or [sys.executable]), str(_SCRIPT), "fit", "-c", str(config)]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), **variables}
    # A session of its own: launchers leave their processes behind when they are killed.
    started = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = started.communicate(timeout=240)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert "rank 0 ends" in text and "rank 1 ends" in text, text[-4000:]
    return text


def test_by_name_in_processes_of_lightning(tmp_path: Path) -> None:
    run_script(tmp_path, "torchrec")


def test_configured_under_torchrun(tmp_path: Path) -> None:
    configured = """
    class_path: lightning_embcomp.strategies.TorchRecStrategy
    init_args:
      sharding: {"t_*0": table_wise}
      ddr: 4GB
      timeout: 0:05:00
      ddp: {find_unused_parameters: true}
"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    assert "rank 0 ends: table_wise" in run_script(tmp_path, configured, *torchrun)


def test_names() -> None:
    for name, start_method in (("torchrec", "popen"), ("torchrec_spawn", "spawn")):
        strategy = StrategyRegistry.get(name)
        assert isinstance(strategy, TorchRecStrategy) and strategy._start_method == start_method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharding": {"t": "rowwise"}}, "no such sharding type; choose from .*row_wise"),
        ({"sharding": {"t": []}}, "leaves no sharding type"),
        ({"fused_params": {"optimizer": "sgd"}}, "give both 'optimizer' and 'learning_rate'"),
        ({"fused_params": {"optimizer": "lion", "learning_rate": 1.0}}, "no optimizer 'lion'; choose from sgd"),
        ({"ddr": "much"}, "is not a size in bytes"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchRecStrategy(**arguments)


def spawned(module: Clicks) -> None:
    trainer = pl.Trainer(
        strategy="torchrec_spawn",
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(6))


@pytest.mark.filterwarnings("ignore")
def test_spawned_processes_hand_tables_back() -> None:
    module, plain = Clicks(), Clicks()
    plain.load_state_dict(module.state_dict())
    spawned(module)
    train_plain(plain, (global_batch(step, 12) for step in range(6)))
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key])
    with pytest.raises(ShardingError, match="without the optimizer that apply_optimizer_in_backward"):
        spawned(Clicks(in_backward=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}))
