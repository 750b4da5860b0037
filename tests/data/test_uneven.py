"""Training rows that processes cannot share equally."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule


@pytest.mark.parametrize(("world_size", "dropped"), [(1, False), (2, False), (3, True)])
def test_a_last_batch_that_cannot_be_shared_is_left_out(world_size: int, dropped: bool) -> None:
    data = SyntheticClickLogDataModule(SyntheticClickLog(num_rows=1000), batch_size=64)
    data.setup("fit")
    whole = data.train_dataloader()
    rows = sum(len(label) for _, _, label in whole)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size, global_rank=0, current_epoch=0, overfit_batches=0
    )
    loader: Any = data.train_dataloader()
    shares = rows % world_size > 0
    assert shares == dropped
    assert len(loader) == (rows // (64 * world_size) if dropped else -(-rows // (64 * world_size)))
