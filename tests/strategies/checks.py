"""Build trainers, and compare sharded models with whole ones."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor

from lightning_embcomp.strategies import TorchRecStrategy


def trainer(strategy: Any, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": dist.get_world_size() if dist.is_initialized() else _world(),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(strategy=strategy, **{**settings, **kwargs})


def _world() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def from_first(value: Any) -> Any:
    """What process 0 has."""
    found = [copy.deepcopy(value)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def start_values(module: pl.LightningModule) -> dict[str, Tensor]:
    """The weights of process 0, which all are to start from; before anything is sharded."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return from_first({key: value.clone() for key, value in module.state_dict().items()})


def worst(module: pl.LightningModule, wanted: Mapping[str, Tensor]) -> float:
    """Largest difference of the parts that this process holds."""
    differences = [0.0]
    state = module.state_dict()
    assert state.keys() == wanted.keys()
    for key, value in state.items():
        if hasattr(value, "local_shards"):
            assert value.size() == wanted[key].shape
            for shard in value.local_shards():
                place = tuple(
                    slice(o, o + s)
                    for o, s in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
                )
                if shard.tensor.numel():
                    differences.append(float((shard.tensor - wanted[key][place]).abs().max()))
        else:
            differences.append(float((value - wanted[key]).abs().max()))
    return max(differences)


def assert_same(module: pl.LightningModule, wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert worst(module, wanted) <= tolerance, worst(module, wanted)


def kinds(strategy: TorchRecStrategy) -> dict[str, str]:
    assert strategy.plan is not None
    return {name: choice.sharding_type for plan in strategy.plan.plan.values() for name, choice in plan.items()}
