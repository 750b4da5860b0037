"""Plans that the codecs can and cannot serve, and TorchRec's planner with them."""

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from lightning_embcomp.methods.dct.codecs import PooledThresholding, UnsupportedShardingError, comm_codecs

META = torch.device("meta")


class Bags(nn.Module):
    """Tables of 8, 24 and 16 columns; the last has two features."""

    def __init__(self) -> None:
        super().__init__()
        tables = [("a", 8, ["fa"]), ("b", 24, ["fb"]), ("c", 16, ["fc", "fd"])]
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=100, embedding_dim=dim, feature_names=features)
                for name, dim, features in tables
            ],
            device=META,
        )


def check(shardings: dict[str, Any], **settings: Any) -> None:
    module = Bags()
    plan = construct_module_sharding_plan(module.bags, shardings, local_size=2, world_size=2, device_type="cpu")
    comm_codecs(PooledThresholding(**settings)).check_plan(ShardingPlan(plan={"bags": plan}), module)


FITS = {"a": table_wise(rank=0), "b": table_wise(rank=0), "c": table_wise(rank=1)}
SPLIT = {"a": data_parallel(), "b": column_wise(ranks=[0, 1]), "c": column_wise(ranks=[1, 0])}


@pytest.mark.parametrize("row_dim", [8, 16, 32])
def test_rows_may_span_the_tables_of_a_process(row_dim: int) -> None:
    """Rank 0 sends 8 + 24 columns per sample, rank 1 two features of 16."""
    check(FITS, row_dim=row_dim, forward_density=0.5)


def test_column_wise() -> None:
    """Each rank sends 12 columns of b and 16 of c."""
    check(SPLIT, row_dim=28, forward_density=0.5)
    with pytest.raises(
        UnsupportedShardingError,
        match=r"rank 0 \(column_wise\) of module 'bags' sends 28 columns .* row_dim=8: .* fits this module is 28",
    ):
        check(SPLIT, row_dim=8, forward_density=0.5)


@pytest.mark.parametrize("settings", [{"forward_density": 0.5}, {"forward": "int8", "backward": "int8"}])
def test_row_dim_that_does_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedShardingError, match="not a multiple of row_dim=24.* fits this module is 32"):
        check(FITS, row_dim=24, **settings)


@pytest.mark.parametrize("sharding", [row_wise(), table_row_wise(host_index=0)])
def test_row_wise_is_refused(sharding: Any) -> None:
    plan = {**FITS, "b": sharding}
    with pytest.raises(UnsupportedShardingError, match="table 'b' of module 'bags' is sharded .*row_wise: .*'topk'"):
        check(plan, row_dim=8, forward_density=0.5)
    with pytest.raises(UnsupportedShardingError, match="what 'int8' sends cannot be added"):
        check(plan, row_dim=8, forward="fp16", backward="int8")
    check(plan, forward="fp16", backward="bf16")


@pytest.mark.parametrize("sharding", [row_wise(), table_wise(rank=0)])
def test_sequences_may_be_row_wise(sharding: Any) -> None:
    module = EmbeddingCollection(
        tables=[EmbeddingConfig(name="s", num_embeddings=100, embedding_dim=24, feature_names=["f"])], device=META
    )
    shardings = construct_module_sharding_plan(module, {"s": sharding}, local_size=2, world_size=2, device_type="cpu")
    plan = ShardingPlan(plan={"": shardings})
    comm_codecs(PooledThresholding(row_dim=8, forward_density=0.5)).check_plan(plan, module)
    with pytest.raises(UnsupportedShardingError, match="table 's' of the module sends 24 columns"):
        comm_codecs(PooledThresholding(row_dim=16, forward_density=0.5)).check_plan(plan, module)


@pytest.mark.parametrize(
    "settings",
    [
        {"row_dim": 8, "forward_density": 0.25},
        {"forward": "fp32", "backward": "fp32"},
        {"forward": "fp16", "backward": "bf16"},
        {"row_dim": 8, "forward": "int8", "backward": "topk", "backward_density": 0.5},
    ],
)
def test_the_planner_runs_with_the_codecs(settings: dict[str, Any]) -> None:
    codecs = comm_codecs(PooledThresholding(**settings))
    sharder: Any = EmbeddingBagCollectionSharder(qcomm_codecs_registry=codecs)
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=2, compute_device="cpu", local_world_size=2),
        storage_reservation=FixedPercentageStorageReservation(percentage=0.1),
    )
    module = Bags()
    plan = planner.plan(module, [sharder])
    codecs.check_plan(plan, module)
    assert set(plan.plan["bags"]) == {"a", "b", "c"}  # type: ignore[call-overload]
