"""What the processes of test_memory do."""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from lightning_embcomp.strategies import TorchRecStrategy
from tests.strategies.checks import trainer
from tests.strategies.models import FEATURES, Clicks, apply_optimizer_in_backward, loader

ROWS, COLUMNS = 1_600_000, 64
SHARE = ROWS * COLUMNS * 4 // 2
"""Bytes of the half of a table of 410 MB."""


def status(field: str) -> int:
    """A value of ``/proc/self/status``, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def normal(tensor: torch.Tensor) -> None:
    nn.init.normal_(tensor, mean=3.0, std=0.1)


def tables() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name="big", num_embeddings=ROWS, embedding_dim=COLUMNS, feature_names=FEATURES[:1], init_fn=normal
        )
    ]


class Large(Clicks):
    """Built in ``configure_model`` or at once; looked up by one feature."""

    def __init__(self, kind: str) -> None:
        super().__init__(bags=nn.Identity, dense=False)
        self.kind = kind
        self.bags: Any = None
        if kind.endswith("init"):
            self.build()

    def build(self) -> None:
        device = torch.device("cpu")
        if self.kind.startswith("fused"):
            self.bags = FusedEmbeddingBagCollection(tables(), torch.optim.SGD, {"lr": 0.1}, device=device)
            return
        self.bags = EmbeddingBagCollection(tables=tables(), device=device)
        apply_optimizer_in_backward(torch.optim.SGD, self.bags.parameters(), {"lr": 0.1})

    def configure_model(self) -> None:
        if self.bags is None:
            self.build()

    def forward(self, dense: torch.Tensor, ids: Any) -> torch.Tensor:
        return self.bags(ids).to_dict()[FEATURES[0]].mean(1)

    def configure_optimizers(self) -> None:
        return None


def peak(kind: str) -> None:
    """No process holds more than its share, and a fifth of it."""
    dist.init_process_group("gloo")
    # The first run loads kernels and threads, which are not the tables' memory.
    trainer(TorchRecStrategy()).fit(Clicks(in_backward=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}), loader(2))
    before = status("VmRSS")
    module = Large(kind)
    strategy = TorchRecStrategy(sharding={"big": "row_wise"})
    trainer(strategy).fit(module, loader(2))
    gc.collect()
    if kind.endswith("init"):
        # The whole table was there, and is gone.
        assert status("VmHWM") - before > 1.9 * SHARE
        assert status("VmRSS") - before < 1.2 * SHARE, (status("VmRSS") - before) / SHARE
    else:
        assert status("VmHWM") - before < 1.2 * SHARE, (status("VmHWM") - before) / SHARE
    [shard] = module.state_dict()["bags.embedding_bags.big.weight"].local_shards()
    assert shard.tensor.shape == (ROWS // 2, COLUMNS)
    if kind == "fused_init":
        return  # the fused collection draws uniformly, whatever the initialiser
    assert abs(float(shard.tensor[:1000].mean()) - 3.0) < 0.01
    # Processes that are seeded alike do not draw the same rows.
    rows: list[Any] = [None, None]
    dist.all_gather_object(rows, shard.tensor[:10].clone())
    assert not torch.equal(rows[0], rows[1])
