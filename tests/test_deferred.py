"""Tables that are not allocated, and what they hold once they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from lightning_embcomp import deferred_tables
from lightning_embcomp.deferred import DeferredTableError
from lightning_embcomp.engine.plan import ReadPlan
from lightning_embcomp.surgery import build_host, fill, to_plain
from lightning_embcomp.tables import find_hosts

CPU = torch.device("cpu")
HUGE = 10**9


def threes(weight: Tensor) -> None:
    nn.init.constant_(weight, 3.0)


def bags(rows: int, **extra: Any) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=64, feature_names=["f"], **extra)]


def fused(rows: int, **extra: Any) -> nn.Module:
    return FusedEmbeddingBagCollection(
        tables=bags(rows, **extra), optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}, device=CPU
    )


MODULES: dict[str, Callable[[int], nn.Module]] = {
    "bag": lambda rows: nn.EmbeddingBag(rows, 64, padding_idx=1),
    "embedding": lambda rows: nn.Embedding(rows, 64, padding_idx=1),
    "bags": lambda rows: EmbeddingBagCollection(tables=bags(rows)),
    "bags on cpu": lambda rows: EmbeddingBagCollection(tables=bags(rows), device=CPU),
    "rows": lambda rows: EmbeddingCollection(
        tables=[EmbeddingConfig(name="t", num_embeddings=rows, embedding_dim=64, feature_names=["f"])], device=CPU
    ),
    "fused": fused,
    "bags with init_fn": lambda rows: EmbeddingBagCollection(tables=bags(rows, init_fn=threes), device=CPU),
    "bags with range": lambda rows: EmbeddingBagCollection(
        tables=bags(rows, weight_init_min=0.25, weight_init_max=0.5), device=CPU
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_huge_table_costs_nothing(name: str) -> None:
    with deferred_tables():
        module, dense = MODULES[name](HUGE), nn.Linear(3, 4)
    [host] = find_hosts(module)
    weight = host.tables[0].weight
    assert weight is not None and weight.is_meta and weight.shape == (HUGE, 64)
    assert dense.weight.device == CPU and dense.weight.any()
    assert nn.Embedding(3, 4).weight.device == CPU  # outside, all is as before


@pytest.mark.parametrize("name", MODULES)
def test_live_rows_get_the_initial_values_of_the_table(name: str) -> None:
    rows = 4000
    torch.manual_seed(0)
    with deferred_tables():
        root = nn.ModuleDict({"host": MODULES[name](rows)})
    [host] = find_hosts(root)
    stand_in = build_host(host, {host.tables[0].name: (4, "prefix")}, CPU)
    codes = (torch.arange(rows) % 5).byte()
    stand_in.engine.move(ReadPlan(lambda t, start, stop: codes[start:stop]))
    fill(stand_in, 0, host)
    values = stand_in.engine.read_rows(0, 0, rows)
    stored = codes.unsqueeze(1) * 16 > torch.arange(64)
    assert not values[~stored].any()
    kept = values[stored]
    reference = MODULES[name](rows)
    wanted = next(iter(reference.state_dict().values())).flatten()
    assert kept.mean() == pytest.approx(float(wanted.mean()), abs=0.02)
    assert kept.std() == pytest.approx(float(wanted.std()), rel=0.03, abs=1e-7)
    assert kept.min() >= wanted.min() - 1.0 * (name in ("bag", "embedding"))
    if name == "embedding":
        assert not stand_in(torch.tensor([1])).any()
        assert not to_plain(stand_in)(torch.tensor([1])).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: nn.init.xavier_uniform_(weight),
        lambda weight: weight.data.uniform_(-1, 1),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data.copy_(torch.ones(5, 8)),
        lambda weight: weight.data.__setitem__(0, 1.0),
        lambda weight: weight.data.__imul__(2),
    ],
)
def test_changes_that_would_be_lost_are_refused(change: Callable[[Tensor], Any]) -> None:
    with deferred_tables():
        table = nn.Embedding(5, 8)
        with (
            pytest.raises(DeferredTableError, match=r"table of shape \(5, 8\) that is not allocated.*init_fn"),
            torch.no_grad(),
        ):
            change(table.weight)


def test_dense_parameters_may_be_changed_and_tables_looked_at() -> None:
    with deferred_tables():
        table, dense = nn.Embedding(5, 8), nn.Linear(8, 2)
        nn.init.xavier_uniform_(dense.weight)
        table.requires_grad_(True)
        assert table.weight.shape == (5, 8) and table.weight.numel() == 40


def test_constructors_are_restored_after_an_error() -> None:
    originals = [cls.__init__ for cls in (nn.Embedding, nn.EmbeddingBag, EmbeddingBagCollection)]
    with pytest.raises(RuntimeError, match="mine"), deferred_tables():
        with deferred_tables():
            assert nn.Embedding(5, 8).weight.is_meta
        assert nn.Embedding(5, 8).weight.is_meta
        raise RuntimeError("mine")
    assert [cls.__init__ for cls in (nn.Embedding, nn.EmbeddingBag, EmbeddingBagCollection)] == originals
    assert not nn.Embedding(5, 8).weight.is_meta
