"""One of several processes that compare sharded rows with two moments with unsharded ones; run with a folder."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.optim import PartialRowWiseAdam

from lightning_embcomp.checkpoints import CheckpointReader, save_checkpoint
from tests.engine.sharded.storage_worker import bits, same, train
from tests.engine.sharded.worker import compare, reference, sharded


def save_and_load(optimizer: type[torch.optim.Optimizer], saved: str, other: str, folder: Path) -> None:
    """Saved in one way, trained on after loading it in the same way, bit for bit, and in another."""
    host, unsharded = sharded(saved, optimizer), reference(optimizer)
    host.norms.wanted = True
    for one in (host, unsharded):
        train(one, 0, 4)
    state = {f"bags.{name}": tensor for name, tensor in host.distributed_state().items()}
    save_checkpoint(folder / "last.ckpt", tensors=state, common={}, per_rank={})
    for one in (host, unsharded):
        train(one, 4, 6)
    for kind in (saved, other):
        loaded = sharded(kind, optimizer)
        loaded.norms.wanted = True
        loaded.load_distributed_state("bags.", CheckpointReader(folder / "last.ckpt"))
        train(loaded, 4, 6)
        same(loaded, unsharded, exact_state=False)
        if kind == saved:
            assert all(torch.equal(one, two) for one, two in zip(bits(loaded), bits(host), strict=True))


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    compare("mixed", torch.optim.Adam, steps=5)
    compare("row_wise", PartialRowWiseAdam, steps=5)  # where columns are cut, each part has a second moment of its own
    save_and_load(torch.optim.Adam, "mixed", "row_wise", Path(sys.argv[1]))
    print("equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
