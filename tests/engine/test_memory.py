"""Bytes: from storages, from the memory table, and from the operating system."""

import subprocess
import sys

import pytest
import torch

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import engine_bytes, table_memory
from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.pages import release_prefix
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.statistics import GAIN_BYTES, RowUtility

from .engines import TABLES, make_engine, random_codes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("codes", [None, random_codes(3)], ids=["whole", "pruned"])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad", None])
def test_tables_add_up_to_the_storages(
    kind: FusedKind | None, dtype: torch.dtype, tracked: bool, codes: list[torch.Tensor] | None
) -> None:
    engine = make_engine(kind, codes, dtype=dtype)
    if tracked:
        engine.track_utility(RowUtility(TABLES, parts=3, device=torch.device("cpu")))
    memories = [table_memory(engine, t) for t in range(3)]
    assert sum(memory.total for memory in memories) == engine_bytes(engine)
    size = dtype.itemsize
    for t, (memory, table) in enumerate(zip(memories, TABLES, strict=True)):
        mine = codes[t] if codes is not None else torch.full((table.rows,), table.full_code)
        chunks = [len(table.live_chunks(code)) for code in mine.tolist()]
        assert memory.weights == sum(chunks) * table.chunk_width * size
        stored = sum(count > 0 for count in chunks)
        state = {"sgd": 0, None: 0, "rowwise_adagrad": 4 * stored, "adagrad": 4 * sum(chunks) * table.chunk_width}
        assert memory.optimizer_state == state[kind]
        assert memory.statistics == (2 * 3 * table.rows + GAIN_BYTES if tracked else 0)
        per_row = {"sgd": 0, None: 0, "rowwise_adagrad": 4, "adagrad": 4 * table.dim}[kind]
        assert memory.plain_total == table.rows * (table.dim * size + per_row)
        assert memory.as_dict()["ratio"] == memory.plain_total / memory.total


@pytest.mark.parametrize("kind", ["rowwise_adagrad", None])
def test_storages_shrink(kind: FusedKind | None) -> None:
    table = LogicalTable(name="t", rows=10_000, dim=16, chunks=4)
    engine = make_engine(kind, tables=(table,), features=(0,))

    def held() -> int:
        return sum(weights.untyped_storage().nbytes() for weights in engine.split_embedding_weights())

    assert held() == 10_000 * 64
    engine.move(FixedPlan([1]))
    assert held() == 10_000 * 16
    if kind is None:
        assert sum(p.untyped_storage().nbytes() for p in engine.parameters()) == 10_000 * 16
    engine.move(FixedPlan([0]))
    assert held() == 0


def test_released_pages_read_as_zero() -> None:
    tensor = torch.ones(5 * 4096 // 4 * 4)
    release_prefix(tensor, 3 * 4096)
    if sys.platform == "linux":
        assert not tensor[1024 : 2 * 4096].any()
    assert tensor[3 * 4096 :].all()
    small = torch.ones(3)
    release_prefix(small, 3)
    assert small.all()


SCRIPT = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.plan import FixedPlan, ReadPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def make(rows):
    table = LogicalTable(name="t", rows=rows, dim=32, chunks=4)
    engine = RoutedEmbeddings([table], options=RoutedOptions(optimizer=FusedOptimizerSpec(kind="rowwise_adagrad")))
    return engine

# Everything that is compiled or loaded on first use is used first.
small = make(1000)
small.move(FixedPlan([4])); small.move(FixedPlan([3])); small.move(FixedPlan([0]))
"""


def measure(code: str) -> list[int]:
    result = subprocess.run([sys.executable, "-c", SCRIPT + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [int(number) for number in result.stdout.split()]


@linux
def test_the_process_gives_memory_back() -> None:
    before, after, freed = measure(
        """
engine = make(1_500_000)
engine.move(FixedPlan([4]))
for weights in engine.split_embedding_weights():
    weights.fill_(1.0)
engine.clear_row_state()
before, held = status("VmRSS"), engine_bytes(engine)
assert held > 190e6
kept = (torch.arange(1_500_000) % 10 == 0).to(torch.uint8) * 4
engine.move(ReadPlan(lambda t, start, stop: kept[start:stop]))
print(before, status("VmRSS"), held - engine_bytes(engine))
"""
    )
    assert freed > 170e6
    assert before - after > 0.85 * freed


@linux
@pytest.mark.parametrize("code", [3, 4])
def test_a_move_needs_little_beside_the_live_bytes(code: int) -> None:
    """Old storage is given back as it is read: never twice the live bytes."""
    before, peak, live = measure(
        f"""
engine = make(3_000_000)
engine.move(FixedPlan([4]))
for weights in engine.split_embedding_weights():
    weights.fill_(1.0)
engine.clear_row_state()
live, before = engine_bytes(engine), status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
engine.move(FixedPlan([{code}]))
assert engine.split_embedding_weights()[{code - 1}].min() == 1.0
print(before, status("VmHWM"), live)
"""
    )
    assert live > 380e6
    assert peak - before <= 0.1 * live + 64e6
