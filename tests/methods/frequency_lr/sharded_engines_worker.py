"""One of several processes that train sharded tables beside unsharded ones; run with a folder and sharding types."""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_embcomp import CounterSettings, FrequencyAwareLR
from lightning_embcomp.engine.counters import CounterConflictError, counters_of
from lightning_embcomp.engine.host import EngineHost, HeldTable
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.sharded.collection import ShardedRoutedBags
from lightning_embcomp.methods.frequency_lr.agreement import refused_together
from lightning_embcomp.methods.frequency_lr.fbgemm import FbgemmRates
from lightning_embcomp.methods.frequency_lr.module import FrequencyRates
from lightning_embcomp.surgery import part_of
from tests.engine.sharded.worker import BATCH, DIM, KEYS, ROWS, batch, reference, sharded

STEPS, LR = 50, 0.2
GENTLE = 0.1  # larger steps let rounding errors grow
FORMS: dict[str, dict[str, Any]] = {
    "running, exact": {"counter": CounterSettings(encoding="exact", counted="presence")},
    "running, log": {},
    "half-life, log": {"counter": CounterSettings(half_life=3.0)},  # sweeps every 6 steps
    "half-life, exact": {"counter": CounterSettings(encoding="exact", half_life=1.0)},  # and every 32
    "horizon": {"form": "horizon"},
    "known, log": {"form": "known", "horizon": 2 * STEPS},
    "known, exact": {"form": "known", "counter": CounterSettings(encoding="exact", counted="presence")},
    "cap": {"max_rate": 0.07},
    "fbgemm": {"backend": "fbgemm"},
    "fbgemm, half-life": {
        "backend": "fbgemm",
        "counter": CounterSettings(encoding="exact", counted="presence", half_life=4.0),
    },
}


def use(callback: FrequencyAwareLR, host: EngineHost, tables: Sequence[int] = (0, 1, 2)) -> FrequencyAwareLR:
    """What a trainer has the callback do before the first step."""
    callback.owned = [HeldTable(host, t, f"bags.t{t}") for t in tables]
    callback.on_tables_ready(fresh=False)
    trainer: Any = SimpleNamespace(
        num_training_batches=STEPS, estimated_stepping_batches=STEPS, accumulate_grad_batches=1, datamodule=None
    )
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    return callback


def train(bags: ShardedRoutedBags, whole: RoutedHost, steps: int) -> None:
    """The sharded tables see the samples of this process, the others all of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    for step in range(steps):
        signs = torch.randn(world * BATCH, len(KEYS), DIM, generator=torch.Generator().manual_seed(900 + step))
        everything = whole(batch(step, world=world)).to_dict()
        part = bags(batch(step, mine, world)).wait().to_dict()
        # TorchRec divides gradients by the number of processes.
        for found, samples, factor in ((everything, slice(None), 1), (part, mine, world)):
            pooled = torch.stack([found[key] for key in KEYS], 1)
            (factor * GENTLE * (pooled * signs[samples]).sin().sum()).backward()


def compare(kind: str, name: str) -> None:
    settings = FORMS[name]
    if settings.get("form") == "known":
        settings = {**settings, "frequencies": sys.argv[1]}
    bags, whole = sharded(kind, torch.optim.SGD), reference(torch.optim.SGD)
    rates = use(FrequencyAwareLR(**settings), bags).rates
    wanted = use(FrequencyAwareLR(**settings), whole).rates
    train(bags, whole, STEPS)
    assert rates is not None and wanted is not None
    [engine] = whole.engines
    copies = torch.zeros(len(ROWS))
    for t, rows in enumerate(ROWS):
        expected = engine.read_rows(t, 0, rows)
        for shard in bags.shards(t):
            copies[t] += bags.is_cut_by_columns(t) or shard.primary and shard.first_row == 0
            span = slice(shard.first_row, shard.first_row + shard.logical.rows)
            found = shard.engine.read_rows(shard.index, 0, shard.logical.rows)
            torch.testing.assert_close(found, part_of(expected, shard.logical), rtol=1e-5, atol=1e-5)
            assert shard.engine.attached.keys() == engine.attached.keys()
            for state, mine in shard.engine.attached.items():
                theirs, by_row = mine.tensors(shard.index), mine.row_tensors(shard.index)
                assert len(by_row) == 1 and len(theirs) == 2
                for tensor, value in engine.attached[state].tensors(t).items():
                    assert torch.equal(theirs[tensor], value[span] if tensor in by_row else value), (t, state, tensor)
    torch.testing.assert_close(rates.rate_deciles([LR] * 3), wanted.rate_deciles([LR] * 3), rtol=1e-6, atol=0)
    if isinstance(rates, FrequencyRates):
        copies = bags.group.sum(copies)
        held = float((copies * torch.tensor(ROWS)).sum()) / sum(ROWS)
        torch.testing.assert_close(rates.bytes_per_row(), held * wanted.bytes_per_row(), rtol=1e-6, atol=0)
    elif not any(bags.is_cut_by_columns(t) for t in range(3)):
        assert isinstance(rates, FbgemmRates)
        torch.testing.assert_close(rates.bytes_per_row(), wanted.bytes_per_row(), rtol=1e-6, atol=0)


def refused(kind: type[ValueError], message: str, made: Any) -> None:
    try:
        made()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def refusals(folder: Path) -> None:
    """Every process refuses, whichever of them has the reason."""
    rank = dist.get_rank()
    bags = sharded("table_wise", torch.optim.SGD)
    with_files = FrequencyAwareLR(form="known", frequencies=str(folder / f"of_{rank}.npz"))
    if rank == 0:
        np.savez(folder / "of_0.npz", t0=np.ones(ROWS[0]), t1=np.ones(ROWS[1]), t2=np.ones(ROWS[2]))
    refused(ValueError, "there is no file", lambda: use(with_files, bags))
    if rank == 1:
        np.savez(folder / "of_1.npz", t0=np.ones(ROWS[0]), t1=np.full(ROWS[1], 2), t2=np.ones(ROWS[2]))
    refused(ValueError, "frequencies of table 'bags.t1' differ between the processes", lambda: use(with_files, bags))

    # Tables of one collection count alike, also on a process that holds one of them only.
    first = use(FrequencyAwareLR(), bags, [0])
    other = FrequencyAwareLR(counter=CounterSettings(counted="presence"))
    refused(CounterConflictError, "count the rows of one embedding collection", lambda: use(other, bags, [1]))
    refused(ValueError, "'t0' is not selected", lambda: use(FrequencyAwareLR(backend="fbgemm"), bags, [1]))

    def of_one() -> None:
        with refused_together(bags.group):
            if rank == 1:
                raise CounterConflictError("größer")

    refused(ValueError, "größer", of_one)
    assert first.rates is not None


def later_tables() -> None:
    """Tables that are counted later on than others of their collection go on from the same step."""
    bags, whole = sharded("table_wise", torch.optim.SGD), reference(torch.optim.SGD)
    for host in (bags, whole):
        use(FrequencyAwareLR(), host, [0])
    train(bags, whole, 5)
    found = [counters_of(engine) for engine in bags.engines]
    assert [counters.step for counters in found if counters is not None] == [5]
    for counters in found:
        if counters is not None and dist.get_rank() == 1:
            assert counters.values[0] is None
            counters.step = 0  # as after a checkpoint, of which this process has read no counters
    for host in (bags, whole):
        use(FrequencyAwareLR(tables="t1"), host, [1])
    train(bags, whole, 5)
    reached = counters_of(whole.engines[0])
    assert reached is not None and reached.step == 10
    for t in range(2):
        for shard in bags.shards(t):
            counters = counters_of(shard.engine)
            assert counters is not None and counters.step == 10
            assert torch.equal(counters.counts(shard.index), reached.counts(t))


def main() -> None:
    """Compare under every sharding type that was named."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for kind in sys.argv[2:]:
        for name in list(FORMS)[:: dist.get_world_size() - 1]:  # all of them in two processes
            compare(kind, name)
            if dist.get_rank() == 0:
                print(kind, name, "equal", flush=True)
    if "table_wise" in sys.argv:
        refusals(Path(sys.argv[1]).parent)
        later_tables()
    print("all checks passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
