"""One of the processes of test_sharded: a run on one kind of device; prints nothing, leaves files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_embcomp.strategies import TorchRecStrategy
from tests.strategies.pruned import KINDS, data, engines, model, runner, tables


def main(device: str, optimizer: str, epochs: str, built: str, load: str, out: str) -> None:
    """Train, save, evaluate; leave ``out.ckpt`` and the rows that each process holds.

    Args:
        device: ``cpu`` or ``gpu``.
        optimizer: Of the tables; chooses the sharding types too.
        epochs: Last epoch.
        built: Whether tables are built ``early`` or ``late``.
        load: Checkpoint to go on from, or ``-``.
        out: Where to write, without suffix.
    """
    module = model(optimizer, late=built == "late")
    fitting = runner(TorchRecStrategy(KINDS[optimizer]), int(epochs), accelerator=device)
    torch.manual_seed(4)
    fitting.fit(module, data(), ckpt_path=None if load == "-" else load)
    wanted = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "gpu" else torch.device("cpu")
    rows = [tensor for engine in engines(module) for tensor in engine.split_embedding_weights()]
    assert {tensor.device for tensor in (*rows, *module.parameters())} == {wanted}
    fitting.save_checkpoint(f"{out}.ckpt")
    dense = {name: value.detach().cpu() for name, value in module.named_parameters()}
    torch.save((dense, tables(module)), f"{out}.{dist.get_rank()}.pt")
    [losses] = fitting.validate(module, data(), verbose=False)
    assert all(value == value for value in losses.values())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    main(*sys.argv[1:])
    dist.barrier()
    dist.destroy_process_group()
