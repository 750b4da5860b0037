"""What the processes of test_gpu do: whole runs on a pretended GPU, compared with the same runs on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from torch import Tensor

from lightning_embcomp.strategies import TorchRecStrategy
from tests.pretend import GPU, pretended_gpu
from tests.strategies.pruned import KINDS, assert_same, data, engines, held, model, runner


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """There is none."""


class _Strategy(TorchRecStrategy):
    @property
    def root_device(self) -> torch.device:
        return GPU

    def _get_process_group_backend(self) -> str:
        return "gloo"

    def determine_ddp_device_ids(self) -> list[int] | None:
        return None  # DDP's own code, which runs on the CPU


def run(optimizer: str, gpu: bool, epochs: int, late: bool, load: str | None, save: str) -> dict[str, Tensor]:
    """Train, save and evaluate."""
    with pretended_gpu() if gpu else nullcontext():
        module = model(optimizer, late=late)
        strategy = _Strategy(KINDS[optimizer], hbm="1GB") if gpu else TorchRecStrategy(KINDS[optimizer])
        fitting = runner(strategy, epochs, accelerator=_Accelerator() if gpu else "cpu")
        torch.manual_seed(4)
        fitting.fit(module, data(), ckpt_path=load)
        if gpu:
            rows = [tensor for engine in engines(module) for tensor in engine.split_embedding_weights()]
            assert {tensor.device for tensor in (*rows, *module.parameters())} == {GPU}
        fitting.save_checkpoint(save)
        found = held(module)
        fitting.validate(module, data(), verbose=False)
    return found


def training(optimizer: str, folder: str, built: str) -> None:
    """A run with pruning events, and a checkpoint of one device that both go on from."""
    dist.init_process_group("gloo")
    path, late = Path(folder), built == "late"
    whole = [run(optimizer, gpu, 2, late, None, str(path / f"whole_{gpu}.ckpt")) for gpu in (False, True)]
    assert_same(*whole)
    half = str(path / "half.ckpt")
    run(optimizer, late, 1, late, None, half)
    assert_same(*(run(optimizer, gpu, 2, late, half, str(path / f"end_{gpu}.ckpt")) for gpu in (False, True)))
