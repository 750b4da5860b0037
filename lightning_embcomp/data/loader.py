"""Iterates over batches, for one process of possibly many, and can stop and go on anywhere."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from lightning_embcomp.data.batches import Batch, RowSource, to_batch
from lightning_embcomp.data.order import RowOrder
from lightning_embcomp.data.schema import CategoricalFeature


class _Epoch:
    """Holds the epoch of a loader where Lightning looks for it: in an object called ``sampler``."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch


class _SequentialEpoch(_Epoch, SequentialSampler):
    """The same for rows in their own order, which Lightning recognises by the type (``overfit_batches``)."""


class _BatchDataset(Dataset[Batch]):
    """Batches by the rows in them; what a worker process holds."""

    def __init__(self, source: RowSource, features: Sequence[CategoricalFeature]) -> None:
        self._source = source
        self._features = features

    def __getitem__(self, rows: np.ndarray) -> Batch:
        return to_batch(self._source.read(rows), self._features)


def _unchanged(batch: Any) -> Any:  # noqa: ANN401 - as in torch
    return batch


class BatchLoader:
    """Batches of whole tensors, made by slicing arrays and never row by row.

    The order of rows depends on ``seed`` and the epoch alone: Lightning sets the epoch through ``sampler.set_epoch``.
    ``state_dict`` holds the place within an epoch, so that a run resumed from a checkpoint in the middle of an epoch
    goes on with the very next batch.

    With several processes (``world_size``), each reads its own part of every global batch of
    ``batch_size * world_size`` rows, all make the same number of batches, and every row is read exactly once per
    epoch. It is no ``torch.utils.data.DataLoader``, so that Lightning puts no distributed sampler into it.

    Args:
        source: The rows.
        features: Their categorical features.
        batch_size: Rows per batch and process.
        shuffle: Whether every epoch has another order.
        seed: Seed of the order.
        drop_last: Whether to leave out a last global batch that is not full.
        num_workers: Worker processes that make batches; 0: none.
        rank: Index of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If a number is out of range, or there are fewer rows than processes.
    """

    def __init__(
        self,
        source: RowSource,
        features: Sequence[CategoricalFeature],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check the arguments; nothing is read yet."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if source.num_rows < world_size:
            raise ValueError(f"{source.num_rows} rows cannot be divided among {world_size} processes")
        if drop_last and source.num_rows < batch_size * world_size:
            raise ValueError(
                f"drop_last leaves nothing: {source.num_rows} rows are fewer than a global batch of "
                f"{batch_size * world_size}"
            )
        self.sampler = _Epoch() if shuffle else _SequentialEpoch()
        self.batch_sampler = None  # Lightning asks for it wherever there is a sampler
        self.batch_size = batch_size
        self._source = source
        self._features = features
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._num_workers = num_workers
        self._rank = rank
        self._world_size = world_size
        self._resume: tuple[int, int] | None = None
        self._place = (0, 0)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        step = self.batch_size * self._world_size
        full, rest = divmod(self._source.num_rows, step)
        # Fewer rows than processes would leave some without a batch: such a rest joins the last full step.
        return full if self._drop_last or rest < self._world_size else full + 1

    def _bounds(self, batch: int) -> tuple[int, int]:
        step = self.batch_size * self._world_size
        begin = batch * step
        last = batch == len(self) - 1 and not self._drop_last
        end = self._source.num_rows if last else begin + step
        rows = end - begin
        return begin + rows * self._rank // self._world_size, begin + rows * (self._rank + 1) // self._world_size

    def _rows(self, epoch: int, first_batch: int) -> Iterator[np.ndarray]:
        order = RowOrder(
            self._source.num_rows,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            block_rows=self._source.block_rows,
            window_rows=self._source.window_rows,
        )
        for batch in range(first_batch, len(self)):
            yield order.rows(*self._bounds(batch))

    def __iter__(self) -> Iterator[Batch]:
        """Go through one epoch, or the rest of it after ``load_state_dict``."""
        # A generator: the epoch that is set after iter() and before the first batch, as Lightning does, still counts.
        epoch = self.sampler.epoch
        resume, self._resume = self._resume, None
        first = resume[1] if resume is not None and resume[0] == epoch else 0
        if first >= len(self):  # saved at the very end of the epoch: who iterates again wants all of it
            first = 0
        dataset = _BatchDataset(self._source, self._features)
        rows = self._rows(epoch, first)
        batches: Iterator[Batch]
        if self._num_workers:
            loader: DataLoader[Batch] = DataLoader(
                dataset, batch_size=None, sampler=rows, num_workers=self._num_workers, collate_fn=_unchanged
            )
            batches = iter(loader)
        else:
            batches = map(dataset.__getitem__, rows)
        for index, batch in enumerate(batches, start=first):
            self._place = (epoch, index + 1)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and the number of batches of it that have been handed out."""
        epoch, batches = self._place
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state: the next iteration through its epoch starts after its last batch."""
        self._resume = self._place = (int(state_dict["epoch"]), int(state_dict["batches"]))
        self.sampler.set_epoch(self._place[0])
