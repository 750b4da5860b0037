"""One of several processes that train sharded collections on a pretended GPU; run with sharding types."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torchrec.optim import RowWiseAdagrad

from tests.engine.sharded.worker import compare
from tests.pretend import GPU, PretendGPU, pretended_gpu

STEPS = 6
EXCHANGE = ("lightning_embcomp", "engine/sharded/lookup.py", "tolist")
"""Copies wait once per step, for the sizes of the batches of other processes."""


def train(kind: str, gpu: PretendGPU) -> None:
    """Equal to an unsharded run on the CPU, without waiting for the device once layouts are made."""
    seen: list[int] = []
    optimizer = torch.optim.SGD if kind in ("column_wise", "mixed") else RowWiseAdagrad
    compare(kind, optimizer, STEPS, GPU, lambda step: seen.append(len(gpu.waits)))
    waits = [wait for wait in gpu.waits[seen[2] : seen[STEPS]] if wait[0] == "lightning_embcomp"]
    copies = STEPS - 2 if kind in ("data_parallel", "mixed") else 0
    assert waits == [EXCHANGE] * copies, waits


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for kind in sys.argv[1:]:
        with pretended_gpu() as gpu:
            train(kind, gpu)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
