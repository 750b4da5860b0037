"""One of several processes that round sharded tables beside unsharded ones; run with an action, a folder, and kinds."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import MixedPrecisionSearch, PrecisionSearch, RowQuantization, SetupError
from lightning_embcomp.checkpoints import CheckpointReader, read_common, save_checkpoint
from lightning_embcomp.engine.host import EngineHost, HeldTable
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.sharded.collection import RoutedBagsSharder, ShardedRoutedBags
from lightning_embcomp.methods.mpe.state import RoundingState
from lightning_embcomp.surgery import build_host, fill, part_of, reinitialise, sharded_spec
from lightning_embcomp.tables import find_hosts

ROWS, DIMS, SAMPLES = (200, 131, 1, 90), (16, 8, 16, 16), 12
FEATURES = [["a", "shared"], ["b"], ["c"], ["shared"]]  # the last table stays as it is
KEYS = ["a", "shared@t0", "b", "c", "shared@t3"]
OWNED = (0, 1, 2)
SEARCH, STEPS = 25, 50
CPU = torch.device("cpu")


def plan(kind: str, world: int) -> list[Any]:
    last = world - 1
    return {
        "table_wise": [table_wise(rank=t % world) for t in range(4)],
        "one_rank": [table_wise(rank=0) for _ in range(4)],
        "row_wise": [row_wise() for _ in range(4)],
        "data_parallel": [data_parallel() for _ in range(4)],
        "mixed": [row_wise(), data_parallel(), table_wise(rank=last), row_wise()],
        "column_wise": [column_wise(ranks=[0, last, last, 0]), column_wise(ranks=[last, 0]), row_wise(), row_wise()],
    }[kind.removesuffix("_pruned")]


def settings(kind: str) -> dict[str, dict[str, Any]]:
    """Callbacks by name; of tables that are cut by columns, only what does not look at whole rows."""

    def search(method: Any, **more: Any) -> PrecisionSearch:
        return PrecisionSearch(method=method, steps=SEARCH, groups=6, reset=False, **more)

    by_rank = search("softmax", frequency="rank")
    found: dict[str, dict[str, Any]] = {
        "bits": {"bits": 4},
        "softmax": {"ratio": 12.0, "search": search("softmax")},
        "offset": {"penalty": 1e-3, "search": by_rank, "quantization": RowQuantization(offset=True)},
        "sensitivity": {"ratio": 12.0, "search": search("sensitivity")},
    }
    return {name: found[name] for name in ("bits", "softmax")} if kind.startswith("column") else found


class Occurrences:
    """A data module that knows its counts: of table t1 they do not fall."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share

    def id_counts(self, feature: str) -> Tensor:
        table = next(t for t, names in enumerate(FEATURES) if feature in names)
        counts = 4 * torch.arange(ROWS[table], 0, -1)
        if table == 1:
            counts = counts[torch.randperm(ROWS[1], generator=torch.Generator().manual_seed(9))]
        return (counts * self.share).long()


def collection(optimizer: type[torch.optim.Optimizer]) -> EmbeddingBagCollection:
    torch.manual_seed(3)
    poolings = [PoolingType.SUM, PoolingType.MEAN, PoolingType.SUM, PoolingType.SUM]
    configs = [
        EmbeddingBagConfig(name=f"t{t}", num_embeddings=rows, embedding_dim=dim, feature_names=names, pooling=pooling)
        for t, (rows, dim, names, pooling) in enumerate(zip(ROWS, DIMS, FEATURES, poolings, strict=True))
    ]
    plain = EmbeddingBagCollection(tables=configs, device=CPU)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    _apply_optimizer_in_backward(optimizer, plain.parameters(), {"lr": 0.05})
    return plain


class _Any(EmbeddingBagCollectionSharder):
    """Lets the test plan what planners leave out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise", "column_wise", "data_parallel"]


def sharded(kind: str) -> ShardedRoutedBags:
    plain = collection(optimizer_of(kind))
    view, world = find_hosts(plain)[0], dist.get_world_size()
    sharding = {f"t{t}": of_table for t, of_table in enumerate(plan(kind, world))}
    module_plan = construct_module_sharding_plan(plain, sharding, sharder=_Any(), local_size=world, device_type="cpu")
    sharder = RoutedBagsSharder(sharded_spec(view, cuts(kind), CPU))
    bags = sharder.shard(plain, dict(module_plan), ShardingEnv.from_process_group(dist.GroupMember.WORLD), CPU)
    return start(bags, view)


def unsharded(kind: str) -> Any:
    view = find_hosts(collection(optimizer_of(kind)))[0]
    return start(build_host(view, cuts(kind), CPU), view)


def cuts(kind: str) -> dict[str, Any]:
    """Chunks of tables that dimension pruning works on, too."""
    return {"t0": (4, "prefix"), "t1": (2, "prefix")} if kind.endswith("_pruned") else {}


def optimizer_of(kind: str) -> type[torch.optim.Optimizer]:
    """Row-wise Adagrad has an accumulator per part where columns are cut."""
    return torch.optim.SGD if kind.startswith("column") else RowWiseAdagrad


def start(host: Any, view: Any) -> Any:
    for engine in host.engines:
        engine.move(FixedPlan([table.full_code for table in engine.tables]))
        engine.clear_row_state()
    for t in range(len(ROWS)):
        fill(host, t, view)
    return host


def use(host: EngineHost, data: Any = None, owned: Any = OWNED, **given: Any) -> MixedPrecisionSearch:
    """What a trainer has the callback do before training."""
    callback = MixedPrecisionSearch(**given)
    callback._data, callback._fitting = data or Occurrences(), True
    callback.owned = [HeldTable(host, t, f"bags.t{t}") for t in owned]
    callback.on_tables_ready(fresh=False)
    return callback


def batch(step: int, samples: slice) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(step)
    values, lengths = [], []
    for limit in (ROWS[0], ROWS[1], ROWS[2], ROWS[3]):
        counts = torch.randint(0, 4, (SAMPLES,), generator=generator)
        ids = (torch.rand(int(counts.sum()), generator=generator) ** 3 * limit).long().split(counts.tolist())
        lengths.append(counts[samples])
        values += ids[samples]
    return KeyedJaggedTensor(["a", "b", "c", "shared"], torch.cat(values), lengths=torch.cat(lengths))


def train(callback: MixedPrecisionSearch, first: int, last: int) -> None:
    """Train on the same samples, however many processes there are; rows may be dropped on the way."""
    host: Any = callback.owned[0].host
    trainer: Any = SimpleNamespace(optimizers=[])
    rank, world = host.group.rank, host.group.size
    mine = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    assert callback.training is not None
    for step in range(first, last):
        signs = torch.randn(SAMPLES, sum(DIMS) + DIMS[0], generator=torch.Generator().manual_seed(900 + step))
        pooled = host(batch(step, mine))
        found = (pooled.wait() if isinstance(host, ShardedRoutedBags) else pooled).to_dict()
        (world * (torch.cat([found[key] for key in KEYS], 1) * signs[mine]).sum()).backward()
        callback.training.step()
        if callback.training.searching and step + 1 == SEARCH:
            callback._end_search(trainer)


def state_of(callback: MixedPrecisionSearch) -> RoundingState:
    assert callback.training is not None
    (found,) = callback.training.states
    return found


def compare(one: MixedPrecisionSearch, other: MixedPrecisionSearch, what: str) -> None:
    """Settings on every process, and the rows of this one."""
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "msg": lambda message: f"{what}: {message}"}
    mine, whole = state_of(one), state_of(other)
    owned = list(OWNED)
    assert torch.equal(mine.bits, whole.bits), (what, mine.bits, whole.bits)
    for name in ("magnitude", "log_steps", "offset"):
        torch.testing.assert_close(getattr(mine, name)[owned], getattr(whole, name)[owned], **close)
    for name in ("logits", "error", "counts", "shares"):
        torch.testing.assert_close(getattr(mine, name), getattr(whole, name), **close)
    assert one.training is not None and other.training is not None
    assert abs(one.training.average_bits() - other.training.average_bits()) < 1e-5
    assert abs(one.training.price / other.training.price - 1) < 1e-5
    host, reference = one.owned[0].host, other.owned[0].host.engines[0]
    for t in range(len(ROWS)):
        for shard in host.shards(t):
            engine, index, part = shard.engine, shard.index, shard.logical
            rows = slice(shard.first_row, shard.first_row + part.rows)
            torch.testing.assert_close(
                engine.read_rows(index, 0, part.rows), part_of(reference.read_rows(t, 0, ROWS[t]), part), **close
            )
            stored, wanted_stored = engine.router.read(index, 0, part.rows)[0], reference.router.read(t, 0, ROWS[t])[0]
            assert torch.equal(stored > 0, wanted_stored[rows] > 0)
            precision, wanted = engine.precision(index), reference.precision(t)
            assert (precision is None) == (wanted is None)
            if precision is not None and wanted is not None:
                assert torch.equal(precision.bits_of(0, part.rows), wanted.bits_of(0, ROWS[t])[rows])
                local = part_of(wanted.round(reference.read_rows(t, 0, ROWS[t]), 0), part)
                different = (precision.round(engine.read_rows(index, 0, part.rows), 0) - local).abs() > 1e-4
                assert int(different.sum()) <= 2  # a value in the middle of two levels


def equal(kind: str) -> None:
    """Fifty steps with a search in the middle; counts of all data here, of a part of it on each process there."""
    for name, given in settings(kind).items():
        here, there = use(sharded(kind), **given), use(unsharded(kind), **given)
        compare(here, there, f"{kind} {name} 0")
        for first, last in ((0, SEARCH - 1), (SEARCH - 1, SEARCH), (SEARCH, STEPS)):
            train(here, first, last)
            train(there, first, last)
            compare(here, there, f"{kind} {name} {last}")
        if name != "bits":
            assert len(set(state_of(here).bits.tolist())) > 1
        assert_same_everywhere(here)
        # Another callback on the same tables goes on with what they hold, on processes without rows as well.
        again = use(here.owned[0].host, **given)
        assert again.training is not None and here.training is not None
        again.training.synchronise()
        again.training.price = here.training.price  # of the callback, not of the tables
        compare(again, there, f"{kind} {name} again")


def assert_same_everywhere(callback: MixedPrecisionSearch) -> None:
    """To the last bit: processes decide alike, and checkpoints take the state of any."""
    state, group = state_of(callback), callback.owned[0].group
    for name in ("bits", "log_steps", "magnitude", "offset", "shares"):
        for other in group.gather(getattr(state, name)):
            assert torch.equal(other, getattr(state, name)), name


def counts_of_parts() -> None:
    """Data modules that know a part of the data each are added up; those that know all of it are not."""
    world = dist.get_world_size()
    given = settings("row_wise")["sensitivity"]
    parts, wholes = use(sharded("row_wise"), Occurrences(1 / world), **given), use(sharded("row_wise"), **given)
    alone = use(unsharded("row_wise"), **given)
    # One process counts more than the others, so that their counts differ.
    mine = Occurrences(1.0 if dist.get_rank() == 0 else 0.5)
    uneven = use(sharded("row_wise"), mine, **given)
    assert torch.equal(state_of(wholes).counts, state_of(alone).counts)
    assert torch.equal(state_of(parts).counts * world, state_of(alone).counts)
    assert torch.equal(state_of(uneven).counts, state_of(alone).counts * (1 + 0.5 * (world - 1)))


def resets() -> None:
    """New values on every part, other than before; copies stay copies, and generators stay where they were."""
    for kind in ("row_wise", "data_parallel"):
        bags = sharded(kind)
        before = torch.get_rng_state()
        old = [s.engine.read_rows(s.index, 0, s.logical.rows) for s in bags.shards(0)]
        reinitialise(bags, 0, [])
        first = [s.engine.read_rows(s.index, 0, s.logical.rows) for s in bags.shards(0)]
        assert torch.equal(torch.get_rng_state(), before)
        assert not (old[0] == first[0]).any()
        assert not any(s.engine.get_optimizer_state()[-1]["momentum1"].any() for s in bags.shards(0))
        parts = bags.group.gather(first[0])
        assert torch.equal(parts[0], parts[-1]) == (kind == "data_parallel")
    given = settings("mixed")["sensitivity"]
    given = {**given, "search": PrecisionSearch(steps=SEARCH, groups=6)}
    callback = use(sharded("mixed"), **given)
    train(callback, 0, STEPS)
    assert_same_everywhere(callback)


def refusals() -> None:
    """What is refused, on all processes alike, before a lookup is changed."""
    pruned, whole = sharded("column_wise_pruned"), sharded("column_wise")
    by_columns = "'bags.t0' is sharded by columns"
    rows = settings("row_wise")
    for bags, given, messages in (
        (whole, rows["sensitivity"], (by_columns, "product over whole rows", "sharding={'t0': 'row_wise'}")),
        (whole, rows["offset"], (by_columns, "leave the offset out", "sharding={'t0': 'row_wise'}")),
        (pruned, rows["offset"], ("would fill the columns of 'bags.t0' that dimension pruning cuts",)),
    ):
        try:
            use(bags, **given)
        except SetupError as error:
            assert all(part in str(error) for part in messages), error
        else:
            raise AssertionError(f"not refused: {messages}")
    use(whole, owned=(2,), **rows["sensitivity"])  # its other tables are not of its concern


def save(kind: str, folder: Path) -> None:
    """Save in the middle of the search, and behind it."""
    for name, given in settings("row_wise").items():
        callback = use(sharded(kind), **given)
        for step in (10, 30):
            train(callback, 0 if step == 10 else 10, step)
            state = {f"bags.{key}": value for key, value in callback.owned[0].host.distributed_state().items()}  # type: ignore[attr-defined]
            save_checkpoint(folder / f"{name}_{step}", tensors=state, common=callback.state_dict(), per_rank={})


def load(kind: str, folder: Path) -> None:
    """Go on from checkpoints of other places of the rows, beside a run that was never interrupted."""
    for name, given in settings("row_wise").items():
        there = use(unsharded("row_wise"), **given)
        for step in (10, 30):
            train(there, 0 if step == 10 else 10, step)
            here = use(sharded(kind), **given)
            assert here.training is not None
            host: Any = here.owned[0].host
            host.load_distributed_state("bags.", CheckpointReader(folder / f"{name}_{step}"))
            here.training.synchronise()
            here.training.load_state_dict(read_common(folder / f"{name}_{step}"))
            compare(here, there, f"{kind} {name} loaded at {step}")
            if step == 10:
                train(here, 10, 30)
                continue
            train(here, 30, 40)
            train(there, 30, 40)
            compare(here, there, f"{kind} {name} behind {step}")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    action, folder = sys.argv[1], Path(sys.argv[2])
    for kind in sys.argv[3:]:
        if action == "save":
            save(kind, folder)
        elif action == "load":
            load(kind, folder)
        else:
            equal(kind)
    if action == "others":
        counts_of_parts()
        resets()
        refusals()
    print("all checks passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
