from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from lightning_embcomp.engine.routed import RoutedOptions
from lightning_embcomp.engine.sharded.collection import RoutedBagsSharder, ShardedSpec
from lightning_embcomp.planners import CompressionAwarePlanner, NoPlanError, TableFootprint
from lightning_embcomp.planners.options import Machine
from lightning_embcomp.planners.perf import lookup_factor
from lightning_embcomp.planners.router import in_engine
from lightning_embcomp.planners.rules import ENGINE_TYPES
from lightning_embcomp.planners.storage import shard_bytes
from lightning_embcomp.strategies.sharders import BagSharder

from .models import MIB, bags, constraints, options, planner, torchrec_planner

SIZES = {"a": (100_000, 64), "b": (30_000, 128), "c": (50, 16), "d": (400_000, 32)}
GPUS = Machine(ranks=4, hbm=200 * MIB)
CPUS = Machine(ranks=2, ddr=400 * MIB)
HALF = TableFootprint(live=(0.5,))


@pytest.mark.parametrize("machine", [GPUS, CPUS], ids=["cuda", "cpu"])
def test_without_footprints_the_plan_is_that_of_torchrec(machine: Machine) -> None:
    module = nn.ModuleDict({"x": bags(SIZES, None), "y": bags({"e": (10_000, 8)}, None)})
    sharders = [EmbeddingBagCollectionSharder()]
    wanted = torchrec_planner(machine.topology())
    found = planner(machine.topology(), {"x.a": TableFootprint()})
    assert str(found.plan(module, sharders)) == str(wanted.plan(module, sharders))
    assert [hash(option) for option in found.chosen] == [hash(option) for option in wanted._best_plan or []]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchRec's search in the order of the sharder's types; its own is that of a set, and breaks ties by chance."""
    search = EmbeddingEnumerator._filter_sharding_types

    def in_order(self: EmbeddingEnumerator, name: str, allowed: list[str], *args: Any) -> list[str]:
        found = search(self, name, allowed, *args)
        return [kind for kind in allowed if kind in found]

    monkeypatch.setattr(EmbeddingEnumerator, "_filter_sharding_types", in_order)


@pytest.mark.usefixtures("steady")
def test_with_fused_tables_the_plan_is_that_of_torchrec_without_copies() -> None:
    module, sharders = nn.ModuleDict({"x": bags(SIZES)}), [EmbeddingBagCollectionSharder()]
    types = [kind for kind in EmbeddingBagCollectionSharder().sharding_types("cuda") if kind != "data_parallel"]
    wanted = torchrec_planner(GPUS.topology(), constraints=constraints(list(SIZES), *types))
    found = planner(GPUS.topology(), constraints=constraints(list(SIZES), *types, "data_parallel"))
    assert str(found.plan(module, sharders)) == str(wanted.plan(module, sharders))


def test_tables_without_fused_optimizer_may_be_copied() -> None:
    allowed = constraints(["c"], "data_parallel", "table_wise")
    for optimizer, kinds in ((RowWiseAdagrad, {"table_wise"}), (None, {"data_parallel", "table_wise"})):
        made = planner(CPUS.topology(), constraints=allowed)
        found = made._enumerator.enumerate(bags({"c": (50, 16)}, optimizer), [EmbeddingBagCollectionSharder()])
        assert {option.sharding_type for option in found} == kinds


@pytest.mark.parametrize("kind", ["fused_collection", "fused_params"])
def test_copies_of_fused_tables_are_refused(kind: str) -> None:
    allowed = constraints(["t"], "data_parallel")
    if kind == "fused_params":
        module: nn.Module = bags({"t": (10, 8)}, None)
        sharder = EmbeddingBagCollectionSharder({"optimizer": RowWiseAdagrad, "learning_rate": 0.1})
    else:
        config = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=8, feature_names=["f"])
        module = FusedEmbeddingBagCollection(
            tables=[config], optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}, device=torch.device("meta")
        )
        sharder = FusedEmbeddingBagCollectionSharder()
    with pytest.raises(PlannerError, match=r"table 't' cannot be sharded: .*fused|No available sharding type") as error:
        planner(CPUS.topology(), constraints=allowed).plan(module, [sharder])
    assert "data_parallel" in str(error.value)


def test_hand_worked_bytes() -> None:
    """A table of 1000 rows of 64 float32, cut into 4 chunks, with row-wise Adagrad."""
    footprint = in_engine(TableFootprint(live=(0.8, 0.4, 0.2, 0.1), row_bytes=2.0), 4, "prefix")
    found = options(bags({"t": (1000, 64)}), Machine(ranks=2, hbm=10 * MIB), {"t": footprint})
    [whole] = found["table_wise"].shards
    # weights 0.375 · 1000 · 64 · 4, state of 800 rows · 4, router 1 and utility 2 bytes per row
    assert shard_bytes(found["table_wise"], whole, footprint) == 96_000 + 3_200 + 3_000
    # ids of both ranks: 8 samples each, 8 bytes; pooled rows: 16 · 64 · 4
    assert whole.storage is not None and whole.storage.hbm == 102_200 + 16 * 8 + 16 * 64 * 4
    first, second = (shard_bytes(found["row_wise"], shard, footprint) for shard in found["row_wise"].shards)
    # rows 0 to 499: all, 400 / 500, 200 / 500, 100 / 500 of the rows store the chunks
    assert first == 500 * 16 * 4 * (10 + 8 + 4 + 2) // 10 + 500 * 4 + 500 * 3
    # rows 500 to 999: an even spread holds more than the 300 / 500, 0, 0, 0 of ranked ids in all but the first chunk
    assert second == 500 * 16 * 4 * (8 + 4 + 2 + 1) // 10 + 400 * 4 + 500 * 3


def test_columns_hold_what_is_left_of_them() -> None:
    footprint = in_engine(TableFootprint(live=(0.8, 0.4, 0.2, 0.0), row_bytes=2.0), 4, "prefix")
    allowed = constraints(["t"], "column_wise")
    allowed["t"].min_partition = 32
    made = planner(Machine(ranks=2, hbm=10 * MIB).topology(), {"t": footprint}, constraints=allowed, batch_size=8)
    [option] = made._enumerator.enumerate(bags({"t": (1000, 64)}), [BagSharder()])
    left, right = option.shards
    # 1.4 chunks per row on average: 0.7 of the rows may store two of them, 0.35 all four.
    assert shard_bytes(option, left, footprint) == 1000 * 16 * 4 * 15 // 10 + 800 * 4 + 3000
    assert shard_bytes(option, right, footprint) == 1000 * 16 * 4 * 7 // 10 + 350 * 4 + 3000
    allowed["t"].min_partition = 8
    with pytest.raises(PlannerError, match="its shards of 8 columns cut through column chunks of 16"):
        planner(GPUS.topology(), {"t": footprint}, constraints=allowed).plan(bags({"t": (1000, 64)}), [BagSharder()])


def test_column_parts_are_not_chosen_for_row_wise_optimizers() -> None:
    """Each part would keep an accumulator of its own."""
    footprint = in_engine(TableFootprint(live=(0.5, 0.1)), 2, "prefix")
    for types, kinds in ((["column_wise", "row_wise"], {"row_wise"}), (["column_wise"], {"column_wise"})):
        allowed = constraints(["t"], *types)
        allowed["t"].min_partition = 32
        made = planner(GPUS.topology(), {"t": footprint}, constraints=allowed)
        found = made._enumerator.enumerate(bags({"t": (1000, 64)}), [BagSharder()])
        assert {option.sharding_type for option in found} == kinds


def test_copies_of_compressed_tables_are_trained_on_all_samples() -> None:
    machine, footprint = Machine(ranks=4, hbm=10 * MIB), in_engine(TableFootprint(live=(0.5,)), 1, "prefix")
    found = options(bags({"t": (1000, 64)}), machine, {"t": footprint})
    [whole] = found["table_wise"].shards
    copies = found["data_parallel"].shards
    assert len(copies) == 4 and all(copy.storage == whole.storage for copy in copies)
    for copy in copies:
        assert copy.perf is not None and whole.perf is not None
        assert copy.perf.fwd_comms == 0
        assert copy.perf.bwd_comms == whole.perf.bwd_comms + whole.perf.input_dist_comms
        assert copy.perf.fwd_compute == whole.perf.fwd_compute / 4
        assert copy.perf.bwd_compute == whole.perf.fwd_compute + whole.perf.bwd_compute


@pytest.mark.parametrize(
    ("optimizer", "state"), [(torch.optim.SGD, 0), (torch.optim.Adagrad, 0.5 * 64 * 4), (RowWiseAdagrad, 0.5 * 4)]
)
def test_optimizer_state_follows_rows(optimizer: type[torch.optim.Optimizer], state: float) -> None:
    found = options(bags({"t": (1000, 64)}, optimizer), GPUS, {"t": HALF})["table_wise"]
    assert shard_bytes(found, found.shards[0], HALF) == 1000 * (0.5 * 64 * 4 + state)


def test_time_follows_the_bytes_that_are_read_and_nothing_else() -> None:
    module, machine = bags({"t": (1_000_000, 128)}), Machine(ranks=2, hbm=1000 * MIB)
    footprint = TableFootprint(live=(0.5,), lookup_bytes=64)
    plain = options(module, machine, {})["table_wise"].shards[0].perf
    option = options(module, machine, {"t": footprint})["table_wise"]
    found = option.shards[0].perf
    assert plain is not None and found is not None
    # Ids 8 bytes, rows and pooled rows 512, for the 16 samples of both ranks, at 897 GiB/s.
    factor = footprint.read(1_000_000, slice(0, 1)) + 64 / 512
    assert lookup_factor(option, option.shards[0], footprint) == pytest.approx(factor)
    bandwidth = 897 * 2**30 / 1000
    assert found.fwd_compute == pytest.approx(16 * (8 + 512 * factor + 512) / bandwidth)
    assert found.bwd_compute == pytest.approx(2 * found.fwd_compute)
    assert (found.fwd_comms, found.bwd_comms, found.input_dist_comms) == (
        plain.fwd_comms,
        plain.bwd_comms,
        plain.input_dist_comms,
    )


def test_half_of_the_dims_makes_room() -> None:
    """40 MiB of weights for each of 2 tables, 35 MiB per rank."""
    sizes, rank = {"a": (163_840, 64), "b": (163_840, 64)}, Machine(ranks=2, ddr=35 * MIB)
    module, sharders = bags(sizes), [BagSharder()]
    with pytest.raises(PlannerError, match="insufficient storage"):
        torchrec_planner(rank.topology(), constraints=constraints(list(sizes), "table_wise", "row_wise")).plan(
            module, sharders
        )
    made = planner(rank.topology(), {"a": HALF, "b": HALF}, constraints=constraints(list(sizes), "table_wise"))
    assert {tuple(parameter.ranks) for parameter in made.plan(module, sharders).plan[""].values()} == {(0,), (1,)}


def test_compressed_tables_stay_where_engines_are() -> None:
    module = bags({"t": (1000, 64)})
    made = planner(Machine(ranks=2, hbm=MIB, ddr=100 * MIB).topology(), {"t": HALF})
    found = made._enumerator.enumerate(module, [EmbeddingBagCollectionSharder()])
    assert {option.compute_kernel for option in found} <= {"fused", "dense"}
    # One part with all columns is table-wise by another name.
    assert {option.sharding_type for option in found} == set(ENGINE_TYPES) - {"column_wise"}
    sharder = RoutedBagsSharder(ShardedSpec((), RoutedOptions(optimizer=None)))
    assert sharder.sharding_types("cpu") == list(ENGINE_TYPES)


def no_plan(made: CompressionAwarePlanner, module: nn.Module) -> str:
    with pytest.raises(NoPlanError) as error:
        made.plan(module, [BagSharder()])
    return str(error.value)


def test_too_little_memory_is_explained() -> None:
    sizes = {"a": (163_840, 64), "b": (163_840, 64), "tiny": (10, 64)}
    allowed = constraints(list(sizes), "table_wise", "row_wise")
    said = no_plan(planner(Machine(ranks=2, ddr=30 * 10**6).topology(), constraints=allowed), bags(sizes))
    assert "2 ranks with 30.0 MB of ddr each" in said
    assert "All tables take 86.0 MB at least, 26.0 MB more than the 60.0 MB of all ranks" in said
    assert "prune the tables: DimensionPruning(target=0.5) fits" in said
    assert "at least 3 ranks of this size" in said
    fits = planner(Machine(ranks=3, ddr=30 * 10**6).topology(), constraints=allowed)
    assert fits.plan(bags(sizes), [BagSharder()]).plan


def test_a_suggested_target_fits() -> None:
    from lightning_embcomp import DimensionPruning
    from lightning_embcomp.planners import callback_footprints
    from lightning_embcomp.tables import find_hosts

    sizes = {"a": (163_840, 64), "b": (163_840, 64)}
    module, allowed = bags(sizes), constraints(list(sizes), "table_wise", "row_wise")
    machine = Machine(ranks=2, ddr=30 * 10**6)
    for target, fits in ((0.25, False), (0.5, True)):
        footprints = callback_footprints(find_hosts(module), [DimensionPruning(target=target)])
        made = planner(machine.topology(), footprints, constraints=allowed, suggest=False)
        if fits:
            made.plan(module, [BagSharder()])
        else:
            assert "prune" not in no_plan(made, module)


def test_one_table_too_large_for_a_rank_is_named() -> None:
    sizes = {"wide": (163_840, 64), "tiny": (10, 64)}
    allowed = constraints(list(sizes), "table_wise")
    said = no_plan(planner(Machine(ranks=4, ddr=30 * 10**6).topology(), constraints=allowed), bags(sizes))
    assert "Table 'wide' needs a rank with 43.1 MB (allowed: table_wise), 13.1 MB more than there is." in said
    assert "allow row_wise for 'wide'" in said


def test_tables_that_cannot_be_pruned_get_no_target() -> None:
    said = no_plan(
        planner(Machine(ranks=2, ddr=10**6).topology(), constraints=constraints(["t"], "row_wise")),
        bags({"t": (200_000, 6)}),
    )
    assert "DimensionPruning" not in said and "at least 6 ranks" in said


def test_misplaced_footprints_are_refused() -> None:
    with pytest.raises(PlannerError, match="a footprint for 'x.t', but the tables are t"):
        planner(CPUS.topology(), {"x.t": HALF}).plan(bags({"t": (10, 8)}), [BagSharder()])


def test_an_enumerator_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match="enumerator"):
        CompressionAwarePlanner(CPUS.topology(), enumerator=object())
