"""The part of the strategy that brings batches to the devices."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from lightning_embcomp.strategies.base import ShardsTables
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.moving import move_batch
from lightning_embcomp.strategies.pipeline import InputPipeline


class FeedsBatches(ShardsTables):
    """The part of the strategy that moves batches, ahead of time if there is a pipeline."""

    _pipeline: InputPipeline | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the module's step, with the next batch on its way if there is a pipeline."""
        if self._pipeline is None:
            return super().training_step(*args, **kwargs)
        self._pipeline.start_step(args[0] if args else next(iter(kwargs.values())), self.batch_to_device)
        output = super().training_step(*args, **kwargs)
        self._pipeline.end_step()
        return output

    def process_dataloader(self, dataloader: object) -> object:
        """Look one batch ahead in the training loader, if there is a pipeline.

        Args:
            dataloader: The loader.
        """
        assert self.lightning_module is not None
        if self._pipeline is None or not self.lightning_module.trainer.training:
            return dataloader
        return self._pipeline.wrap(dataloader)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        """Move a batch; hooks of the module or data module for it are called as usual.

        Args:
            batch: The batch.
            device: Where to move it.
            dataloader_idx: Index of its loader.
        """
        device = device or self.root_device
        module = self.lightning_module
        ahead = self._pipeline.moved(batch) if self._pipeline is not None and device == self.root_device else None
        if ahead is not None:
            return ahead
        if module is None:
            return move_batch(batch, device)
        trainer = module.trainer
        selector = trainer._data_connector._datahook_selector
        owner = selector.get_instance("transfer_batch_to_device") if selector is not None else module
        base = pl.LightningDataModule if isinstance(owner, pl.LightningDataModule) else pl.LightningModule
        if type(owner).transfer_batch_to_device is not base.transfer_batch_to_device:
            return super().batch_to_device(batch, device, dataloader_idx)
        return module._call_batch_hook("on_after_batch_transfer", move_batch(batch, device), dataloader_idx)

    def on_train_start(self) -> None:
        """Check that all processes have batches for the same number of steps: a lookup needs all of them.

        Raises:
            ShardingError: If they have not.
        """
        super().on_train_start()
        assert self.lightning_module is not None
        if self._pipeline is not None and len(self.lightning_module.trainer.fit_loop._combined_loader.flattened) != 1:  # type: ignore[union-attr]
            raise ShardingError("pipeline='sparse_dist' works with one training loader: use 'none' with several")
        counts: list[Any] = [None] * self.world_size
        dist.all_gather_object(counts, self.lightning_module.trainer.num_training_batches)
        if len(set(counts)) > 1:
            raise ShardingError(
                f"the processes have {counts} training batches, and some would wait for the others for ever: divide the"
                " data evenly (use_distributed_sampler, drop_last), or set limit_train_batches"
            )
