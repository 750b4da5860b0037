"""Finding tables, and choosing among them."""

import warnings

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from lightning_embcomp.tables import UnknownTableError, find_hosts, in_backward_optimizer, select_tables

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions as it is imported
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward


def model() -> nn.Module:
    configs = [
        EmbeddingBagConfig(
            name="user", num_embeddings=5, embedding_dim=8, feature_names=["u"], pooling=PoolingType.MEAN
        ),
        EmbeddingBagConfig(
            name="item", num_embeddings=6, embedding_dim=8, feature_names=["i", "j"], pooling=PoolingType.MEAN
        ),
    ]
    root = nn.Module()
    root.sparse = nn.ModuleDict({"bags": EmbeddingBagCollection(tables=configs)})
    root.dense = nn.Linear(2, 2)
    root.user = nn.Embedding(7, 4)
    root.fused = FusedEmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="ad", num_embeddings=9, embedding_dim=4, feature_names=["ad"])],
        optimizer_type=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        device=torch.device("cpu"),
    )
    return root


def test_every_table_is_found_once() -> None:
    tables = [table for host in find_hosts(model()) for table in host.tables]
    assert [(t.name, t.rows, t.dim, t.mean, t.features) for t in tables] == [
        ("sparse.bags.user", 5, 8, True, ("u",)),
        ("sparse.bags.item", 6, 8, True, ("i", "j")),
        ("user", 7, 4, False, ()),
        ("fused.ad", 9, 4, False, ("ad",)),
    ]
    assert all(t.weight is not None and t.weight.shape == (t.rows, t.dim) for t in tables)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("*",), ["sparse.bags.user", "sparse.bags.item", "user", "fused.ad"]),
        (("user",), ["sparse.bags.user", "user"]),
        (("sparse.*",), ["sparse.bags.user", "sparse.bags.item"]),
        (("*item", "fused.ad"), ["sparse.bags.item", "fused.ad"]),
        (("bags",), ["sparse.bags.user", "sparse.bags.item"]),
        (("[ai]*",), ["sparse.bags.item", "fused.ad"]),
        ((), []),
        (("[!su]*",), ["sparse.bags.user", "sparse.bags.item", "fused.ad"]),
        (("*", "!fused.ad"), ["sparse.bags.user", "sparse.bags.item", "user"]),
        (("!item", "*"), ["sparse.bags.user", "user", "fused.ad"]),
        (("!user",), ["sparse.bags.item", "fused.ad"]),
        (("!sparse.*", "!fused.*"), ["user"]),
        (("sparse.*", "!ad"), ["sparse.bags.user", "sparse.bags.item"]),
    ],
)
def test_globs(patterns: tuple[str, ...], names: list[str]) -> None:
    assert [table.name for table in select_tables(find_hosts(model()), patterns, "me")] == names


def test_a_glob_without_a_table_is_named_with_what_there_is() -> None:
    with pytest.raises(
        UnknownTableError, match=r"me: no embedding table matches 'User'. Tables of the model: sparse.bags.user"
    ):
        select_tables(find_hosts(model()), ("*", "User"), "me")
    with pytest.raises(UnknownTableError, match="none: the model holds no embedding tables"):
        select_tables(find_hosts(nn.Linear(2, 2)), ("*",), "me")


@pytest.mark.parametrize("patterns", [("*", "!User"), ("!User",), ("!",), ("*", "!!user")])
def test_an_exclusion_without_a_table_is_named(patterns: tuple[str, ...]) -> None:
    with pytest.raises(UnknownTableError, match=rf"me: no embedding table matches '{patterns[-1]}'. Tables of the"):
        select_tables(find_hosts(model()), patterns, "me")


@pytest.mark.parametrize("patterns", [("!*",), ("*", "!*"), ("sparse.*", "!bags"), ("user", "!*user")])
def test_exclusions_must_leave_a_table(patterns: tuple[str, ...]) -> None:
    with pytest.raises(UnknownTableError, match=r"me: .*'![*\w]+' leave no embedding table: exclude fewer. Tables of"):
        select_tables(find_hosts(model()), patterns, "me")


def test_optimizer_in_backward_is_found() -> None:
    embedding = nn.Embedding(5, 4)
    assert in_backward_optimizer(embedding.weight) is None
    apply_optimizer_in_backward(torch.optim.SGD, [embedding.weight], {"lr": 0.5})
    assert in_backward_optimizer(embedding.weight) == (torch.optim.SGD, {"lr": 0.5})
    apply_optimizer_in_backward(torch.optim.Adam, [embedding.weight], {"lr": 0.5})
    with pytest.raises(ValueError, match="2 optimizers applied in backward"):
        in_backward_optimizer(embedding.weight)
