"""Ids of the next batch on their way while this one trains."""

import lightning.pytorch as pl
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.strategies import ShardingError
from lightning_embcomp.strategies.pipeline import Lookahead, StatefulLookahead, features_in
from lightning_embcomp.strategies.refusals import check_pipeline
from tests.strategies.resuming import Stateful


def test_gloo_is_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ShardingError, match="needs CUDA and NCCL.*pipeline='none'"):
        check_pipeline(trainer)


def test_features_are_found_wherever_they_are() -> None:
    first, second = (KeyedJaggedTensor(["f"], torch.tensor([1]), lengths=torch.tensor([1])) for _ in range(2))
    found = dict(features_in(({"a": first}, [torch.zeros(1), second])))
    assert found == {(0, "a"): first, (1, 1): second}


def test_state_of_a_loader_does_not_count_the_batch_ahead() -> None:
    loader = StatefulLookahead(Stateful(5))
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    assert loader.state_dict() == {"position": 2}
    assert [b for b in Lookahead([])] == []
