"""The reference pipeline: what it computes, trains, logs, saves and refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.models import ClickModel, NonFiniteLossError

Make = Callable[..., Any]
FEATURES = [
    {"name": "type", "num_embeddings": 20, "multi_valued": False},
    {"name": "genres", "num_embeddings": 7, "multi_valued": True},
]
TABLES = "model.sparse_arch.embedding_bag_collection.embedding_bags"


def build(seed: int = 0, **kwargs: Any) -> ClickModel:
    torch.manual_seed(seed)
    model = ClickModel(**{"features": FEATURES, "num_dense": 3, "embedding_dim": 8, **kwargs})
    model.configure_model()
    return model


def weights(model: ClickModel) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def pooled(table: np.ndarray, sparse: KeyedJaggedTensor, key: str, mean: bool) -> np.ndarray:
    ids, lengths = sparse[key].values().numpy(), sparse[key].lengths().numpy()
    bags = np.split(ids, np.cumsum(lengths)[:-1])
    return np.stack([table[bag].sum(0) / (max(len(bag), 1) if mean else 1) for bag in bags])


def relu_mlp(x: np.ndarray, state: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    for name in sorted(name for name in state if name.startswith(prefix) and name.endswith("weight")):
        x = np.maximum(x @ state[name].T + state[name.replace("weight", "bias")], 0)
    return x


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("embedding_optimizer", ["rowwise_adagrad", "none"])
def test_dlrm_forward_against_numpy(tiny_data: Make, pooling: str, embedding_optimizer: str) -> None:
    model = build(pooling=pooling, embedding_optimizer=embedding_optimizer, dense_layers=(5,), over_layers=(6,))
    dense, sparse, _ = tiny_data().batches[0]
    state = weights(model)
    parts = [relu_mlp(dense.double().numpy(), state, "model.dense_arch")]
    for key in ("type", "genres"):
        parts.append(pooled(state[f"{TABLES}.t_{key}.weight"], sparse, key, pooling == "mean"))
    dots = [(parts[i] * parts[j]).sum(1) for i in range(3) for j in range(i + 1, 3)]
    hidden = relu_mlp(np.column_stack([parts[0], *dots]), state, "model.over_arch.model.0")
    expected = hidden @ state["model.over_arch.model.1.weight"].T + state["model.over_arch.model.1.bias"]
    np.testing.assert_allclose(model(dense, sparse).detach().numpy(), expected[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["dlrm", "dcn", "deepfm"])
@pytest.mark.parametrize("embedding_optimizer", ["rowwise_adagrad", "sgd", "none"])
@pytest.mark.parametrize("num_dense", [0, 3])
def test_every_weight_trains(
    tiny_data: Make, quiet_trainer: Make, architecture: Any, embedding_optimizer: Any, num_dense: int
) -> None:
    torch.manual_seed(0)
    model = ClickModel(architecture, embedding_dim=8, embedding_optimizer=embedding_optimizer, dense_layers=(8, 8))
    trainer = quiet_trainer(num_sanity_val_steps=0, limit_val_batches=0, limit_train_batches=0)
    trainer.fit(model, tiny_data(num_dense=num_dense))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quiet_trainer(max_epochs=4).fit(model, tiny_data(num_dense=num_dense))
    unchanged = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert len(before) > 8
    assert unchanged == []


@pytest.mark.parametrize("architecture", ["dlrm", "dcn", "deepfm"])
def test_it_learns_the_planted_feature(tiny_data: Make, quiet_trainer: Make, architecture: Any) -> None:
    torch.manual_seed(0)
    model = ClickModel(architecture, embedding_dim=8, embedding_lr=0.1, dense_lr=0.01)
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(model, tiny_data(num_batches=16))
    assert trainer.callback_metrics["val_auc"] > 0.7
    assert trainer.callback_metrics["val_ne"] < 0.9


def test_fused_sgd_is_plain_sgd(tiny_data: Make, quiet_trainer: Make) -> None:
    settings: dict[str, Any] = {"embedding_lr": 0.3, "dense_optimizer": "sgd", "dense_lr": 0.1}
    fused = build(embedding_optimizer="sgd", **settings)
    plain = build(embedding_optimizer="none", **settings)
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        quiet_trainer().fit(model, tiny_data())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_first_rowwise_adagrad_step_by_hand(tiny_data: Make, quiet_trainer: Make) -> None:
    fused = build(embedding_lr=0.5)
    plain = build(embedding_optimizer="none")
    plain.load_state_dict(fused.state_dict())
    batch = tiny_data().batches[0]
    torch.nn.functional.binary_cross_entropy_with_logits(plain(*batch[:2]), batch[2]).backward()
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(fused, tiny_data())
    for key in ("t_type", "t_genres"):
        parameter = plain.get_parameter(f"{TABLES}.{key}.weight")
        assert parameter.grad is not None
        before, gradient = parameter.detach().double().numpy(), parameter.grad.double().numpy()
        accumulator = (gradient**2).mean(1, keepdims=True)
        expected = before - 0.5 * gradient / (np.sqrt(accumulator) + 1e-8)
        touched = accumulator[:, 0] > 0
        after = weights(fused)[f"{TABLES}.{key}.weight"]
        np.testing.assert_allclose(after[touched], expected[touched], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(after[~touched], before[~touched])


def test_fused_tables_stay_out_of_the_lightning_optimizer() -> None:
    model = build()
    optimizer = model.configure_optimizers()
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in given}
    assert names == {name for name, _ in model.named_parameters() if "embedding_bag_collection" not in name}
    assert names


def test_unfused_tables_get_their_own_learning_rate() -> None:
    optimizer = build(embedding_optimizer="none", embedding_lr=0.25, dense_lr=0.125).configure_optimizers()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"dense": 0.125, "embeddings": 0.25}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(build().parameters()))


@pytest.mark.parametrize(("optimizer", "lr"), [("rowwise_adagrad", 0.02), ("sgd", 1.0), ("none", 0.125)])
def test_default_learning_rate_of_the_tables(optimizer: Any, lr: float) -> None:
    assert ClickModel(embedding_optimizer=optimizer, dense_lr=0.125).embedding_lr == lr
    assert ClickModel(embedding_optimizer=optimizer, embedding_lr=0.5).embedding_lr == 0.5


def test_a_replaced_collection_is_told_by_its_path(tiny_data: Make, quiet_trainer: Make) -> None:
    """Another module where the tables were trains on its own terms: its parameters are not the dense optimizer's."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: EmbeddingBagCollection) -> None:
            super().__init__()
            self.inner = inner

        def embedding_bag_configs(self) -> Any:
            return self.inner.embedding_bag_configs()

        def forward(self, features: KeyedJaggedTensor) -> Any:
            return self.inner(features)

    class Replace(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            pl_module.configure_model()
            sparse_arch: Any = pl_module.get_submodule("model.sparse_arch")
            stock = EmbeddingBagCollection(tables=sparse_arch.embedding_bag_collection.embedding_bag_configs())
            sparse_arch.embedding_bag_collection = Wrapper(stock)

    model = ClickModel(embedding_dim=8)
    trainer = quiet_trainer(callbacks=[Replace()])
    trainer.fit(model, tiny_data())
    assert isinstance(model.get_submodule("model.sparse_arch.embedding_bag_collection"), Wrapper)
    table = model.get_parameter("model.sparse_arch.embedding_bag_collection.inner.embedding_bags.t_type.weight")
    given = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert not any(parameter is table for parameter in given)
    assert len(given) == len(list(model.parameters())) - 2


def test_sizes_come_from_the_data_module(tiny_data: Make, quiet_trainer: Make) -> None:
    model = ClickModel(embedding_dim=4)
    quiet_trainer(max_steps=1).fit(model, tiny_data(num_dense=2))
    assert model.get_parameter(f"{TABLES}.t_genres.weight").shape == (7, 4)
    assert model.hparams["features"] == FEATURES
    assert model.hparams["num_dense"] == 2


def test_configure_model_is_idempotent() -> None:
    model = build()
    before = model.model
    model.configure_model()
    assert model.model is before


def test_logged_metrics_are_those_of_the_predictions(tiny_data: Make, quiet_trainer: Make) -> None:
    model, data = build(), tiny_data()
    trainer = quiet_trainer()
    trainer.fit(model, data)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    preds = torch.cat(quiet_trainer().predict(model, data)).double().numpy()
    label = torch.cat([batch[2] for batch in data.batches]).numpy()
    rate = label.mean(dtype=np.float64)
    loss = log_loss(label, preds)
    expected = {
        "auc": roc_auc_score(label, preds),
        "logloss": loss,
        "ne": loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)),
        "calibration": preds.sum() / label.sum(),
    }
    assert {name: logged[f"val_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    [tested] = quiet_trainer().test(model, data, verbose=False)
    assert tested == pytest.approx({f"test_{name}": value for name, value in expected.items()}, rel=1e-5)
    assert logged["train_loss"] > 0


def test_predictions_are_probabilities_and_need_no_label(tiny_data: Make) -> None:
    for architecture in ("dlrm", "dcn", "deepfm"):
        model = build(architecture=architecture)
        dense, sparse, _ = tiny_data().batches[0]
        with torch.inference_mode():
            preds = model.predict_step((dense, sparse), 0)  # type: ignore[arg-type]
            torch.testing.assert_close(torch.logit(preds), model(dense, sparse), rtol=1e-4, atol=1e-5)
        assert preds.shape == (32,)


def test_deepfm_gives_logits_not_probabilities(tiny_data: Make) -> None:
    model = build(architecture="deepfm")
    with torch.no_grad():
        model.get_parameter("model.over_arch.bias").fill_(-7.0)
        assert (model(*tiny_data().batches[0][:2]) < -3).all()


def test_resume_is_bit_exact(tiny_data: Make, quiet_trainer: Make, tmp_path: Path) -> None:
    whole, half, resumed = build(), build(), build(seed=1)
    quiet_trainer(max_epochs=2).fit(whole, tiny_data())
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(half, tiny_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(max_epochs=2).fit(resumed, tiny_data(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_loads_without_data_and_without_trusting_it(
    tiny_data: Make, quiet_trainer: Make, tmp_path: Path
) -> None:
    model = ClickModel(embedding_dim=8)
    trainer = quiet_trainer(enable_checkpointing=True, default_root_dir=tmp_path, max_steps=2)
    trainer.fit(model, tiny_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ClickModel.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    batch = tiny_data().batches[0]
    assert torch.equal(loaded(*batch[:2]), model(*batch[:2]))


def test_fused_state_of_other_tables_is_refused(tiny_data: Make) -> None:
    checkpoint: dict[str, Any] = {}
    build().on_save_checkpoint(checkpoint)
    other = build(features=[{"name": "user", "num_embeddings": 20}])
    with pytest.raises(
        ValueError, match=r"differs in \['t_genres\.weight\.momentum_1', 't_type.*same embedding_optimizer"
    ):
        other.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("poison", "cause"),
    [("batch", "dense features of this batch hold NaN"), ("weights", "weights have diverged.*dense_lr=0.001")],
)
def test_a_loss_that_is_not_finite_stops_the_run(tiny_data: Make, quiet_trainer: Make, poison: str, cause: str) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx != 3:
                return
            with torch.no_grad():
                target = batch[0] if poison == "batch" else next(pl_module.model.over_arch.parameters())
                target.fill_(torch.nan)

    with pytest.raises(NonFiniteLossError, match=rf"global step 3 \(epoch 0, batch 3\).*{cause}"):
        quiet_trainer(callbacks=[Poison()]).fit(build(), tiny_data())


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_trainer_settings_that_miss_fused_tables_are_refused(
    tiny_data: Make, quiet_trainer: Make, setting: dict[str, Any]
) -> None:
    [name] = setting
    with pytest.raises(ValueError, match=rf"Trainer\({name}=.*embedding_optimizer='none'"):
        quiet_trainer(**setting).fit(build(), tiny_data())
    quiet_trainer(**setting).fit(build(embedding_optimizer="none"), tiny_data())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"architecture": "dlmr"}, "architecture must be one of dlrm, dcn, deepfm, got 'dlmr'"),
        ({"pooling": "max"}, "pooling must be one of sum, mean"),
        ({"embedding_optimizer": "adam"}, "embedding_optimizer must be one of"),
        ({"dense_optimizer": "lamb"}, "dense_optimizer must be one of"),
        ({"embedding_dim": 0}, "embedding_dim must be positive, got 0"),
        ({"embedding_dim": 10}, "multiple of 4 for fused tables, got 10"),
        ({"over_layers": ()}, "over_layers is empty"),
        ({"dense_layers": (8, -1)}, "dense_layers must be positive, got -1"),
        ({"dense_lr": 0.0}, "dense_lr must be positive"),
        ({"num_dense": -1}, "num_dense must not be negative"),
        ({"cross_layers": 2}, "no effect with architecture='dlrm'"),
        ({"features": []}, "features is empty"),
        ({"features": [*FEATURES, FEATURES[0]]}, "'type' occurs twice"),
        ({"features": [{"name": "a.b", "num_embeddings": 3}]}, "'a.b' must not be empty or hold a dot"),
        ({"features": [{"name": "a", "num_embeddings": 0}]}, "'a' has num_embeddings=0"),
        ({"features": [{"name": "a"}]}, r"lacks \['num_embeddings'\]"),
    ],
)
def test_bad_settings_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClickModel(**kwargs)


def test_cross_settings_reach_dcn() -> None:
    model = build(architecture="dcn", cross_layers=2, cross_rank=5)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if "crossnet" in name]
    assert shapes.count((5, 24)) == 2


def test_unfused_dimension_is_free(tiny_data: Make) -> None:
    model = build(embedding_dim=5, embedding_optimizer="none")
    assert model(*tiny_data().batches[0][:2]).shape == (32,)


def test_without_a_data_module_the_missing_argument_is_named(tiny_data: Make, quiet_trainer: Make) -> None:
    with pytest.raises(ValueError, match="there is no data module; pass ClickModel\\(features="):
        ClickModel().configure_model()
    with pytest.raises(ValueError, match="LightningDataModule has no num_dense"):
        data = pl.LightningDataModule.from_datasets(tiny_data().batches, tiny_data().batches)
        quiet_trainer().fit(ClickModel(features=FEATURES), data)


def test_use_before_configure_model_is_an_error(tiny_data: Make) -> None:
    with pytest.raises(RuntimeError, match="configure_model"):
        ClickModel(features=FEATURES, num_dense=3)(*tiny_data().batches[0][:2])
