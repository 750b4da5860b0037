"""What the processes of test_pipeline do."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from lightning_embcomp.strategies import ShardingError, TorchRecStrategy
from tests.strategies.checks import assert_same, start_values, trainer
from tests.strategies.evaluating import Pair
from tests.strategies.models import Batch, Batches, Clicks, loader, train_plain
from tests.strategies.resuming import ROWS, Stateful
from tests.strategies.training import SGD, THREE


def ids_ahead() -> None:
    """The same training, with ids sent ahead; validation and checkpoints in between."""
    dist.init_process_group("gloo")
    sent: list[int] = []
    own = ShardedEmbeddingBagCollection.input_dist

    def input_dist(self: Any, ctx: Any, features: Any) -> Any:
        sent.append(step[0])
        return own(self, ctx, features)

    ShardedEmbeddingBagCollection.input_dist = input_dist  # type: ignore
    step = [0]

    class Stepping(Clicks):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            step[0] += 1
            return super().training_step(batch, batch_idx)

    module, plain = Stepping(**SGD), Clicks(**SGD)
    plain.load_state_dict(start_values(module))
    train_plain(plain, Batches(10, whole=True))
    train_plain(plain, Batches(10, whole=True))
    strategy = TorchRecStrategy(sharding=THREE, pipeline="sparse_dist")
    trainer(strategy, max_epochs=2).fit(module, loader(10))
    assert_same(module, plain.state_dict())
    # Number of steps begun when ids were sent. The first step shows what to send: before the second one begins, those
    # of the third batch go ahead, and so on. The first batch of each epoch has nobody to send it ahead.
    assert sent == [1, 1, 2, *range(2, 9), 10, 11, *range(11, 19)], sent
    ShardedEmbeddingBagCollection.input_dist = own  # type: ignore

    module, plain = Clicks(**SGD), Clicks(**SGD)
    plain.load_state_dict(start_values(module))
    train_plain(plain, Batches(8, whole=True))
    trainer(TorchRecStrategy(sharding=THREE, pipeline="sparse_dist"), val_check_interval=2).fit(
        module, loader(8), loader(3)
    )
    assert_same(module, plain.state_dict())

    stateful = Stateful(10)
    trainer(TorchRecStrategy(pipeline="sparse_dist"), max_steps=4).fit(Clicks(**SGD), stateful)
    assert stateful.position == 5 and ROWS == 12

    with pytest.raises(ShardingError, match="nothing to send ahead: 'first', 'blocks.0.bags'|looks up"):
        trainer(TorchRecStrategy(pipeline="sparse_dist")).fit(Twice(), loader(3))

    class Hooked(Clicks):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    with pytest.raises(ShardingError, match="Hooked.on_before_batch_transfer would not see batches"):
        trainer(TorchRecStrategy(pipeline="sparse_dist")).fit(Hooked(), loader(3))


class Twice(Pair):
    """Looks everything up twice."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)
