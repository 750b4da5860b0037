"""Routed stand-ins against the modules that they replace."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.optimizer import UnsupportedOptimizerError
from lightning_embcomp.engine.plan import FixedPlan, ReadPlan
from lightning_embcomp.surgery import UnsupportedTableError, build_host, fill, replace, to_plain
from lightning_embcomp.tables import find_hosts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions as it is imported
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

CPU = torch.device("cpu")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def routed(module: nn.Module, chunks: int = 2, code: int | None = None) -> Any:
    """The whole module in an engine (or every row with ``code``), beside the untouched original."""
    root = nn.ModuleDict({"host": copy.deepcopy(module)})
    [host] = find_hosts(root)
    stand_in = build_host(host, {table.name: (chunks, "prefix") for table in host.tables}, CPU)
    stand_in.engine.move(FixedPlan([t.full_code if code is None else code for t in stand_in.engine.tables]))
    stand_in.engine.clear_row_state()
    for t in range(len(host.tables)):
        fill(stand_in, t, host)
    replace(root, host.path, stand_in)
    assert root["host"] is stand_in
    return stand_in


def bag_configs(pooling: PoolingType = PoolingType.SUM, **extra: Any) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name="user", num_embeddings=50, embedding_dim=8, feature_names=["a", "c"], pooling=pooling, **extra
        ),
        EmbeddingBagConfig(
            name="item", num_embeddings=9, embedding_dim=16, feature_names=["b"], pooling=pooling, **extra
        ),
    ]


def row_configs() -> list[EmbeddingConfig]:
    return [
        EmbeddingConfig(name="user", num_embeddings=50, embedding_dim=8, feature_names=["a", "c"]),
        EmbeddingConfig(name="item", num_embeddings=9, embedding_dim=8, feature_names=["b"]),
    ]


def kjt(keys: str = "acb", weighted: bool = False, seed: int = 0, size: int = 6) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    per_key = {}
    for key in "abcd":
        lengths = torch.randint(0, 4, (size,), generator=generator)
        values = torch.randint(0, 9 if key == "b" else 50, (int(lengths.sum()),), generator=generator)
        per_key[key] = (values, lengths, torch.rand(values.numel(), generator=generator))
    return KeyedJaggedTensor(
        list(keys),
        torch.cat([per_key[k][0] for k in keys]),
        lengths=torch.cat([per_key[k][1] for k in keys]),
        weights=torch.cat([per_key[k][2] for k in keys]) if weighted else None,
    )


COLLECTIONS: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: EmbeddingBagCollection(tables=bag_configs()),
    "mean": lambda: EmbeddingBagCollection(tables=bag_configs(PoolingType.MEAN)),
    "weighted": lambda: EmbeddingBagCollection(tables=bag_configs(), is_weighted=True),
    "fused": lambda: FusedEmbeddingBagCollection(
        tables=bag_configs(), optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}, device=CPU
    ),
    "float16": lambda: EmbeddingBagCollection(tables=bag_configs(data_type=DataType.FP16)),
}


@pytest.mark.parametrize("keys", ["acb", "bac", "dbca"])
@pytest.mark.parametrize("name", COLLECTIONS)
def test_bag_collections(name: str, keys: str) -> None:
    module = COLLECTIONS[name]()
    stand_in = routed(module)
    batch = kjt(keys, weighted=name == "weighted")
    found, wanted = stand_in(batch), module(batch)
    assert found.keys() == wanted.keys() and found.length_per_key() == wanted.length_per_key()
    torch.testing.assert_close(found.values(), wanted.values(), **CLOSE)
    assert [config.name for config in stand_in.embedding_bag_configs()] == ["user", "item"]
    assert stand_in.is_weighted() == module.is_weighted() and stand_in.device == CPU  # type: ignore[operator]


@pytest.mark.parametrize("need_indices", [False, True])
@pytest.mark.parametrize("keys", ["acb", "bdca"])
def test_row_collections(keys: str, need_indices: bool) -> None:
    module = EmbeddingCollection(tables=row_configs(), need_indices=need_indices)
    stand_in = routed(module)
    found, wanted = stand_in(kjt(keys)), module(kjt(keys))
    assert list(found) == list(wanted)
    for key in wanted:
        assert torch.equal(found[key].values(), wanted[key].values())
        assert torch.equal(found[key].lengths(), wanted[key].lengths())
        if need_indices:
            assert torch.equal(found[key].weights(), wanted[key].weights())
    assert stand_in.embedding_dim() == 8 and stand_in.need_indices() == need_indices
    assert stand_in.embedding_names_by_table() == module.embedding_names_by_table()


def test_one_feature_in_two_tables() -> None:
    configs = bag_configs()
    configs[1].feature_names = ["b", "a"]
    configs[1].num_embeddings = 60
    module = EmbeddingBagCollection(tables=configs)
    found, wanted = routed(module)(kjt("abc")), module(kjt("abc"))
    assert found.keys() == wanted.keys() == ["a@user", "c", "b", "a@item"]
    torch.testing.assert_close(found.values(), wanted.values(), **CLOSE)


def test_a_missing_feature_is_named() -> None:
    stand_in = routed(COLLECTIONS["sum"]())
    with pytest.raises(KeyError, match=r"the batch lacks feature 'c'; it has \['a', 'b'\]"):
        stand_in(kjt("ab"))


def test_batches_of_different_length_per_feature_are_refused() -> None:
    stand_in = routed(COLLECTIONS["sum"]())
    batch = KeyedJaggedTensor(
        ["a", "c", "b"],
        torch.arange(6),
        lengths=torch.ones(6, dtype=torch.int64),
        stride_per_key_per_rank=[[1], [2], [3]],
    )
    with pytest.raises(ValueError, match="batch size"):
        stand_in(batch)


BAG_OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "padding": {"mode": "mean", "padding_idx": 3},
    "negative padding": {"mode": "sum", "padding_idx": -1},
    "last offset": {"mode": "sum", "include_last_offset": True},
    "padding and last offset": {"mode": "mean", "include_last_offset": True, "padding_idx": 0},
    "sparse": {"mode": "sum", "sparse": True},
}


@pytest.mark.parametrize("two_d", [False, True])
@pytest.mark.parametrize("name", BAG_OPTIONS)
def test_embedding_bag(name: str, two_d: bool) -> None:
    options = BAG_OPTIONS[name]
    module = nn.EmbeddingBag(7, 8, **options)
    stand_in = routed(module)
    ids = torch.tensor([0, 3, 6, 3, 3, 0, 1, 5])
    if two_d:
        arguments: tuple[Tensor, ...] = (ids.view(4, 2),)
    else:
        arguments = (ids, torch.tensor([0, 2, 2, 5] + [8] * options.get("include_last_offset", False)))
    torch.testing.assert_close(stand_in(*arguments), module(*arguments), **CLOSE)
    if options["mode"] == "sum":
        weights = torch.rand(arguments[0].shape)
        torch.testing.assert_close(
            stand_in(*arguments, per_sample_weights=weights), module(*arguments, per_sample_weights=weights), **CLOSE
        )


def test_embedding_bag_arguments_are_checked() -> None:
    stand_in = routed(nn.EmbeddingBag(7, 8, mode="sum"))
    with pytest.raises(ValueError, match="offsets are needed when input is 1-D"):
        stand_in(torch.tensor([1]))
    with pytest.raises(ValueError, match="offsets must be None when input is 2-D"):
        stand_in(torch.tensor([[1]]), torch.tensor([0]))
    with pytest.raises(IndexError, match="id 7 at position 1 of the batch is outside table 'host' with 7 rows"):
        stand_in(torch.tensor([[1, 7]]))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (0,), (0, 4)])
@pytest.mark.parametrize("padding_idx", [None, 0, -2])
def test_embedding(padding_idx: int | None, shape: tuple[int, ...]) -> None:
    module = nn.Embedding(7, 8, padding_idx=padding_idx)
    stand_in = routed(module)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, stand_in)]
    ids = torch.randint(0, 7, shape)
    for _ in range(2):
        found, wanted = stand_in(ids), module(ids)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, **CLOSE)
        for out, optimizer in zip((wanted, found), optimizers, strict=True):
            optimizer.zero_grad()
            out.sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(to_plain(stand_in).weight, module.weight, **CLOSE)


@pytest.mark.parametrize("name", ["sum", "weighted"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0}),
        (RowWiseAdagrad, {"lr": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_optimizer_in_backward(name: str, optimizer: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    module = COLLECTIONS[name]()
    stand_in = module
    twin = copy.deepcopy(module)
    apply_optimizer_in_backward(optimizer, module.parameters(), options)
    root = nn.ModuleDict({"host": twin})
    apply_optimizer_in_backward(optimizer, twin.parameters(), options)
    [host] = find_hosts(root)
    stand_in = build_host(host, {}, CPU)
    stand_in.engine.move(FixedPlan([1, 1]))
    stand_in.engine.clear_row_state()
    for t in range(2):
        fill(stand_in, t, host)
    for seed in range(30):
        batch = kjt(weighted=name == "weighted", seed=seed)
        found, wanted = stand_in(batch).values(), module(batch).values()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        found.sin().sum().backward()
        wanted.sin().sum().backward()
    assert list(stand_in.parameters()) == []


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (
            torch.optim.RMSprop,
            {"lr": 0.1},
            "'host.user' is trained by RMSprop in the backward pass.*Adagrad, Adam, .*RowWiseAdagrad, SGD",
        ),
        (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}, "weight decay is decoupled: use torch.optim.AdamW"),
        (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}, "'host.user'.*amsgrad=True.*beta1, beta2, betas, eps, lr"),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "'host.user'.*momentum=0.9"),
        (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, "weight_decay=0.1"),
        (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}, "lr_decay=0.1"),
    ],
)
def test_optimizers_that_would_train_differently_are_refused(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any], message: str
) -> None:
    module = COLLECTIONS["sum"]()
    apply_optimizer_in_backward(optimizer, module.parameters(), options)
    with pytest.raises(UnsupportedOptimizerError, match=message):
        build_host(find_hosts(nn.ModuleDict({"host": module}))[0], {}, CPU)


def test_different_optimizers_of_one_collection_are_refused() -> None:
    module: Any = COLLECTIONS["sum"]()
    apply_optimizer_in_backward(torch.optim.SGD, module.embedding_bags["user"].parameters(), {"lr": 0.1})
    with pytest.raises(UnsupportedOptimizerError, match="'host' have different optimizers in backward"):
        build_host(find_hosts(nn.ModuleDict({"host": module}))[0], {}, CPU)


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledCollection(EmbeddingBagCollection):
    def forward(self, features: KeyedJaggedTensor) -> Any:
        return super().forward(features)


def frozen(module: nn.Module) -> nn.Module:
    next(module.parameters()).requires_grad_(False)
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def parametrized(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", nn.Tanh())


def mixed_dtypes() -> nn.Module:
    configs = bag_configs()
    configs[0].data_type = DataType.FP16
    return EmbeddingBagCollection(tables=configs)


def padded_with_values() -> nn.Module:
    return nn.Embedding.from_pretrained(torch.ones(5, 8), freeze=False, padding_idx=2)


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max": (lambda: nn.EmbeddingBag(5, 8, mode="max"), "'host' is pooled by max"),
    "max_norm": (lambda: nn.Embedding(5, 8, max_norm=1.0), "'host' uses max_norm"),
    "bag max_norm": (lambda: nn.EmbeddingBag(5, 8, max_norm=1.0), "'host' uses max_norm"),
    "frequency": (lambda: nn.EmbeddingBag(5, 8, scale_grad_by_freq=True), "'host' uses scale_grad_by_freq"),
    "frozen": (lambda: frozen(nn.Embedding(5, 8)), "'host' is frozen"),
    "frozen collection": (lambda: frozen(COLLECTIONS["sum"]()), "'host.user' is frozen"),
    "mixed dtypes": (mixed_dtypes, r"'host' mixes table dtypes.*float16.*float32"),
    "bfloat16": (lambda: nn.Embedding(5, 8, dtype=torch.bfloat16), "'host' holds torch.bfloat16 tables"),
    "subclass": (lambda: Doubled(5, 8), "'host'.*Doubled.*forward"),
    "collection subclass": (lambda: DoubledCollection(tables=bag_configs()), "'host'.*DoubledCollection.*forward"),
    "hook": (lambda: hooked(nn.Embedding(5, 8)), "'host'.*hook"),
    "parametrized": (lambda: parametrized(nn.Embedding(5, 8)), "'host'.*parametri"),
    "padding row": (padded_with_values, "'host'.*padding"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_features_that_would_be_lost_are_refused(name: str) -> None:
    make, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedTableError, match=message):
        build_host(find_hosts(nn.ModuleDict({"host": make()}))[0], {}, CPU)


def test_a_dim_that_cannot_be_cut_names_the_table() -> None:
    host = find_hosts(nn.ModuleDict({"host": COLLECTIONS["sum"]()}))[0]
    with pytest.raises(
        ValueError, match=r"table 'user' of dim 8 cannot be cut into 4 chunks.*use one of chunks=\[1, 2\]"
    ):
        build_host(host, {"host.user": (4, "prefix")}, CPU)


def test_a_shared_module_is_replaced_everywhere() -> None:
    shared = nn.Embedding(5, 8)
    root = nn.Module()
    root.first, root.second = shared, nn.ModuleList([nn.Linear(2, 2), shared])
    root.eval()
    hosts = find_hosts(root)
    assert [host.path for host in hosts] == ["first"]
    stand_in = build_host(hosts[0], {}, CPU)
    replace(root, "first", stand_in)
    assert root.first is stand_in and root.second[1] is stand_in and not stand_in.training
    assert isinstance(root.second[0], nn.Linear)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "bags": COLLECTIONS["mean"],
    "rows": lambda: EmbeddingCollection(tables=row_configs()),
    "bag": lambda: nn.EmbeddingBag(50, 8, mode="mean", padding_idx=4, include_last_offset=True),
    "embedding": lambda: nn.Embedding(50, 8, padding_idx=4, sparse=True),
}


def mixed_codes(stand_in: RoutedHost) -> None:
    stand_in.engine.move(ReadPlan(lambda t, a, b: (torch.arange(a, b) % stand_in.engine.tables[t].codes).byte()))


@pytest.mark.parametrize("name", PLAIN)
def test_write_back_to_plain(name: str) -> None:
    module = PLAIN[name]()
    back = to_plain(routed(module))
    assert type(back) is type(module)
    assert back.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(back.state_dict()[key], value) for key, value in module.state_dict().items())
    assert repr(back) == repr(module)
    stand_in = routed(module)
    mixed_codes(stand_in)
    for key, value in to_plain(stand_in).state_dict().items():
        rows, dim = value.shape
        kept = (torch.arange(rows) % 3).unsqueeze(1) * (dim // 2) > torch.arange(dim)
        assert torch.equal(value, module.state_dict()[key] * kept)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_checkpoint_is_a_warm_start(name: str) -> None:
    module, other = PLAIN[name](), PLAIN[name]()
    stand_in = routed(other)
    mixed_codes(stand_in)
    codes = [stand_in.engine.router.read(t, 0, table.rows)[0] for t, table in enumerate(stand_in.engine.tables)]
    checkpoint = {f"model.{key}": value.clone() for key, value in module.state_dict().items()}
    kept = dict(checkpoint)
    outer = nn.ModuleDict({"model": stand_in})
    outer.load_state_dict(checkpoint)
    assert checkpoint.keys() == kept.keys()
    for t, (key, value) in enumerate(module.state_dict().items()):
        rows, dim = value.shape
        mask = (torch.arange(rows) % 3).unsqueeze(1) * (dim // 2) > torch.arange(dim)
        assert torch.equal(stand_in.engine.read_rows(t, 0, rows), value * mask), key
        assert torch.equal(stand_in.engine.router.read(t, 0, rows)[0], codes[t])


def test_plain_checkpoints_that_do_not_fit_are_named() -> None:
    stand_in = routed(COLLECTIONS["sum"]())
    checkpoint = {key: value.clone() for key, value in COLLECTIONS["sum"]().state_dict().items()}
    before = [stand_in.engine.read_rows(t, 0, rows) for t, rows in enumerate((50, 9))]
    cut = {**checkpoint, "embedding_bags.item.weight": torch.zeros(9, 8)}
    with pytest.raises(
        RuntimeError, match=r"size mismatch for embedding_bags.item.weight.*\(9, 8\), table 'item' is \(9, 16\)"
    ):
        stand_in.load_state_dict(cut)
    assert all(torch.equal(stand_in.engine.read_rows(t, 0, rows), before[t]) for t, rows in enumerate((50, 9)))
    del checkpoint["embedding_bags.item.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*embedding_bags.item.weight"):
        stand_in.load_state_dict(checkpoint)
    assert stand_in.load_state_dict(checkpoint, strict=False).missing_keys == ["embedding_bags.item.weight"]


def test_plain_checkpoints_with_foreign_keys_are_named() -> None:
    stand_in = routed(COLLECTIONS["sum"]())
    checkpoint = {f"model.{key}": value for key, value in COLLECTIONS["sum"]().state_dict().items()}
    checkpoint["model.embedding_bags.z.weight"] = torch.zeros(3, 8)
    checkpoint["model.engine.steps"] = torch.zeros(2)
    outer = nn.ModuleDict({"model": stand_in})
    with pytest.raises(RuntimeError, match="Unexpected key.*model.embedding_bags.z.weight.*model.engine.steps"):
        outer.load_state_dict(checkpoint)
    found = outer.load_state_dict(checkpoint, strict=False)
    assert found.unexpected_keys == ["model.embedding_bags.z.weight", "model.engine.steps"] and not found.missing_keys
    own = {**outer.state_dict(), "model.embedding_bags.z.weight": torch.zeros(3, 8)}
    assert outer.load_state_dict(own, strict=False).unexpected_keys == ["model.embedding_bags.z.weight"]
    assert outer.load_state_dict({}, strict=False).missing_keys == ["model.engine.tables"]


def test_all_tables_that_do_not_fit_are_named_at_once() -> None:
    stand_in = routed(COLLECTIONS["sum"]())
    checkpoint: dict[str, Any] = {
        "embedding_bags.user.weight": torch.zeros(50, 4),
        "embedding_bags.item.weight": [1.0],
    }
    with pytest.raises(RuntimeError, match=r"(?s)user.weight.*\(50, 4\).*item.weight is a list, not a tensor"):
        stand_in.load_state_dict(checkpoint)


def test_a_warm_start_clears_the_state_of_its_tables() -> None:
    module = FusedEmbeddingBagCollection(
        tables=bag_configs(), optimizer_type=torch.optim.Adagrad, optimizer_kwargs={"lr": 0.1}, device=CPU
    )
    stand_in = routed(module)
    checkpoint = {key: value.clone() for key, value in module.state_dict().items()}
    stand_in(kjt()).values().sum().backward()

    def moments(table: str) -> bool:
        saved = stand_in.state_dict()
        return any(bool(v.any()) for k, v in saved.items() if f".{table}." in k and k.endswith("momentum1"))

    assert moments("user") and moments("item")
    item = checkpoint.pop("embedding_bags.item.weight")
    stand_in.load_state_dict(checkpoint, strict=False)
    assert not moments("user") and moments("item")
    stand_in.load_state_dict({**checkpoint, "embedding_bags.item.weight": item})
    assert not moments("item")
    assert torch.equal(stand_in.engine.read_rows(1, 0, 9), item)
    own = {key: value.clone() for key, value in stand_in.state_dict().items()}
    assert "engine.loaded" not in own
    stand_in(kjt()).values().sum().backward()
    stand_in.load_state_dict(own)  # an own checkpoint after a plain one is loaded as ever
    assert not moments("user") and not moments("item")


def test_the_scheduled_rate_is_saved_and_restored() -> None:
    stand_in, other = routed(COLLECTIONS["fused"]()), routed(COLLECTIONS["fused"]())
    optimizer = stand_in.fused_optimizer()
    optimizer.param_groups[0]["lr"] = 0.025  # a scheduler's step, not yet followed by one of the optimizer
    saved = {key: value.clone() for key, value in copy.deepcopy(stand_in).state_dict().items()}
    assert saved["engine.rate"].tolist() == [0.025] and stand_in.engine.classes[0].learning_rate == 0.1
    other.load_state_dict(saved)
    assert other.fused_optimizer().param_groups[0]["lr"] == 0.025
    other.fused_optimizer().step()
    assert {rows.learning_rate for rows in other.engine.classes} == {0.025}
    # What cannot be loaded, and a warm start, leave a rate alone that is still to be pushed.
    optimizer.param_groups[0]["lr"] = 0.0
    stand_in.load_state_dict(COLLECTIONS["fused"]().state_dict())
    with pytest.raises(RuntimeError, match="damaged"):
        stand_in.load_state_dict({**saved, "engine.steps": torch.zeros(1)})
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_fused_optimizer_handle() -> None:
    stand_in = routed(COLLECTIONS["fused"]())
    optimizer = stand_in.fused_optimizer()
    before = stand_in.engine.read_rows(0, 0, 50)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    stand_in(kjt("acb")).values().sum().backward()
    ids = torch.cat([kjt("a").values(), kjt("c").values()])
    wanted = before - 0.05 * torch.bincount(ids, minlength=50).unsqueeze(1)
    torch.testing.assert_close(stand_in.engine.read_rows(0, 0, 50), wanted, **CLOSE)
    with pytest.raises(RuntimeError, match="no fused optimizer"):
        routed(COLLECTIONS["sum"]()).fused_optimizer()
