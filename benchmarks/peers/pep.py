"""Learned thresholds as in PEP, a reconstruction.

After *Learnable embedding sizes for recommender systems*, ICLR 2021, https://arxiv.org/abs/2101.07577, and its public
code, which is tied to PyTorch 1.1, to its own data loaders and to its own models, and so was not run.

As there: every weight has a threshold, weights are ``sign(v) * relu(|v| - sigmoid(s))``, ``s`` starts at -15 and is
pushed up by an L2 penalty of 1e-5 under Adam; when few enough weights are left, their places are kept, the values start
anew from where they started, and are trained without thresholds. Different here: only thresholds have the penalty, and
their rate is such that unused ones come near 0 within the epochs of the search, which here are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from benchmarks.peers.folded import Unreachable
from benchmarks.peers.magnitude import sparse_bytes
from lightning_embcomp.models.collections import table_configs

START, PENALTY = -15.0, 1e-5


def soft_threshold(values: Tensor, thresholds: Tensor) -> Tensor:
    """Move values towards zero by the sigmoid of their thresholds, and not past it.

    Example:
        >>> soft_threshold(torch.tensor([0.7, -0.2, -0.9]), torch.zeros(3))
        tensor([ 0.2000, -0.0000, -0.4000])
    """
    return values.sign() * torch.relu(values.abs() - torch.sigmoid(thresholds))


class ThresholdedBags(nn.Module):
    """A collection whose weights have learned thresholds; an optimizer of ``configure_optimizers`` trains both.

    Args:
        features: Records with ``name`` and ``num_embeddings``, one table each.
        dim: Columns.
        gain: How much faster thresholds move than the optimizer's rate.
    """

    starts: Tensor

    def __init__(self, features: Sequence[dict[str, Any]], dim: int, gain: float) -> None:
        super().__init__()
        self.configs = table_configs(features, dim)
        self.names = [feature["name"] for feature in features]
        self.gain = gain
        self.rows = [int(feature["num_embeddings"]) for feature in features]
        starts = torch.tensor([0, *self.rows[:-1]]).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)
        bound = torch.cat([torch.full((rows, 1), rows**-0.5) for rows in self.rows])
        self.values = nn.Parameter((torch.rand(len(bound), dim) * 2 - 1) * bound)
        self.moved = nn.Parameter(torch.zeros_like(self.values))
        self.initial: Tensor | None = self.values.detach().clone()
        self.mask: Tensor | None = None
        self.moved.register_hook(lambda gradient: gradient + PENALTY * (START + gain * self.moved.detach()))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Configurations of the tables."""
        return self.configs

    @property
    def kept(self) -> list[Tensor]:
        """Which weights are not zero, by table."""
        with torch.no_grad():
            mask = self.mask
            if mask is None:
                mask = self.values.abs() > torch.sigmoid(START + self.gain * self.moved)
        return list(mask.split(self.rows))

    def settle(self) -> None:
        """Keep the places of the weights that are not zero, and start their values anew."""
        assert self.initial is not None
        self.mask = torch.cat(self.kept)
        with torch.no_grad():
            self.values.copy_(self.initial * self.mask)
        self.initial = None
        self.moved.requires_grad_(False)
        self.moved.data = torch.empty(0)
        self.moved.grad = None

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool.

        Args:
            features: Ids, with the features in the order of the constructor.

        Returns:
            ``(B, features * dim)``.
        """
        counts = torch.tensor(features.length_per_key())
        ids = features.values() + torch.repeat_interleave(self.starts, counts)
        if self.mask is None:
            rows = soft_threshold(self.values[ids], START + self.gain * self.moved[ids])
        else:
            rows = self.values[ids] * self.mask[ids]
        lengths = features.lengths()
        bags = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
        pooled = rows.new_zeros(lengths.numel(), rows.shape[1]).index_add(0, bags, rows)
        return KeyedTensor.from_tensor_list(self.names, list(pooled.view(len(self.names), -1, rows.shape[1]).unbind()))


class ThresholdSearch(pl.Callback):
    """Ends the search when the tables, stored sparse, are small enough.

    Args:
        bags: The collection.
        size: Bytes to reach.
        epochs: Epochs of the search at most.
        every: Steps between looks.
    """

    def __init__(self, bags: ThresholdedBags, size: int, epochs: int, every: int = 20) -> None:
        self.bags, self.size, self.epochs, self.every = bags, size, epochs, every

    @property
    def searching(self) -> bool:
        """Whether the search goes on."""
        return self.bags.mask is None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        """Look, and perhaps settle."""
        if self.searching and trainer.global_step % self.every == 0 and sparse_bytes(self.bags.kept) <= self.size:
            self.bags.settle()
            for optimizer in trainer.optimizers:
                optimizer.state.pop(self.bags.values, None)
                optimizer.state.pop(self.bags.moved, None)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: object) -> None:
        """Give up after the last epoch of the search.

        Raises:
            Unreachable: If too many weights are left.
        """
        if self.searching and trainer.current_epoch >= self.epochs:
            left = sparse_bytes(self.bags.kept)
            raise Unreachable(f"{left:,} bytes are left after {self.epochs} epochs of search, not {self.size:,}")
