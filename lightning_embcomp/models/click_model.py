"""The reference pipeline: a LightningModule around TorchRec's click-through models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.errors import NonFiniteLossError
from lightning_embcomp.kernels.route.watch import check, report_later
from lightning_embcomp.metrics import Calibration, LogLoss, NormalizedEntropy
from lightning_embcomp.models.architectures import Architecture, build_dcn, build_deepfm, build_dlrm
from lightning_embcomp.models.collections import EmbeddingOptimizer, Pooling, build_collection, table_configs
from lightning_embcomp.models.features import FeatureLike, feature_records

Batch: TypeAlias = tuple[Tensor, KeyedJaggedTensor, Tensor]

EMBEDDINGS_PATH = "sparse_arch.embedding_bag_collection"
"""Where the embedding tables are in each of the architectures, relative to ``ClickModel.model``."""

_DENSE_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}
# SGD needs more: its gradients are averaged over the batch, and most rows are seen rarely.
_FUSED_LR = {"rowwise_adagrad": 0.02, "sgd": 1.0}
_FUSED_STATE_KEY = "fused_embedding_optimizer"


class ClickModel(pl.LightningModule):
    """Predict clicks from dense and categorical features, with TorchRec's DLRM, DCN-v2 or DeepFM.

    A batch is ``(dense, sparse, label)``: float32 ``(B, num_dense)``, a ``KeyedJaggedTensor`` with one key for
    each feature, and float32 ``(B,)`` of 0 and 1. With ``num_dense == 0`` a constant column takes the place
    of the dense features.

    Logged: ``train_loss`` on every step; at the end of an epoch ``val_auc``, ``val_logloss``, ``val_ne`` and
    ``val_calibration``, and the same with ``test_``.

    Args:
        architecture: ``dlrm``, ``dcn`` (DCN-v2) or ``deepfm``.
        embedding_dim: Columns of every embedding table; a multiple of 4 if the optimizer is fused.
        dense_layers: Hidden sizes of the MLP over the dense features; a last layer of ``embedding_dim`` is added.
        over_layers: Hidden sizes of the top MLP; a last layer of size 1 is added.
        cross_layers: Cross layers of ``dcn``, 3 by default; refused for another architecture.
        cross_rank: Rank of the cross layers of ``dcn``, 64 by default; refused for another architecture.
        pooling: How the rows of a multi-valued feature are combined.
        embedding_optimizer: Optimizer fused into the backward pass of the tables; ``none`` trains the tables in
            the dense optimizer instead.
        embedding_lr: Learning rate of the tables. By default 0.02 for ``rowwise_adagrad``, 1.0 for ``sgd``, and
            ``dense_lr`` for ``none``.
        dense_optimizer: Optimizer of everything else.
        dense_lr: Learning rate of everything else.
        features: Categorical features: objects with ``name``, ``num_embeddings`` and ``multi_valued``. By default
            those of the trainer's data module.
        num_dense: Number of dense features. By default that of the trainer's data module.

    Raises:
        ValueError: If a size or a learning rate is not positive, or a setting has no effect.

    Example:
        >>> model = ClickModel(features=[{"name": "user", "num_embeddings": 10}], num_dense=2, embedding_dim=4)
        >>> model.configure_model()
        >>> sparse = KeyedJaggedTensor(["user"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 2]))
        >>> model(torch.rand(2, 2), sparse).shape
        torch.Size([2])
    """

    model: nn.Module | None

    def __init__(
        self,
        architecture: Architecture = "dlrm",
        embedding_dim: int = 16,
        dense_layers: Sequence[int] = (64,),
        over_layers: Sequence[int] = (256, 128),
        cross_layers: int | None = None,
        cross_rank: int | None = None,
        pooling: Pooling = "sum",
        embedding_optimizer: EmbeddingOptimizer = "rowwise_adagrad",
        embedding_lr: float | None = None,
        dense_optimizer: Literal["adam", "sgd", "adagrad"] = "adam",
        dense_lr: float = 1e-3,
        features: Sequence[FeatureLike | Mapping[str, Any]] | None = None,
        num_dense: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        _check_choice("architecture", architecture, ("dlrm", "dcn", "deepfm"))
        _check_choice("pooling", pooling, ("sum", "mean"))
        _check_choice("embedding_optimizer", embedding_optimizer, ("rowwise_adagrad", "sgd", "none"))
        _check_choice("dense_optimizer", dense_optimizer, tuple(_DENSE_OPTIMIZERS))
        if not over_layers:
            raise ValueError("over_layers is empty: give at least one hidden size, e.g. (64,)")
        for name, value in (
            ("embedding_dim", embedding_dim),
            ("dense_layers", min(dense_layers, default=1)),
            ("over_layers", min(over_layers)),
            ("cross_layers", cross_layers),
            ("cross_rank", cross_rank),
            ("embedding_lr", embedding_lr),
            ("dense_lr", dense_lr),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if embedding_optimizer != "none" and embedding_dim % 4:
            raise ValueError(f"embedding_dim must be a multiple of 4 for fused tables, got {embedding_dim}")
        if num_dense is not None and num_dense < 0:
            raise ValueError(f"num_dense must not be negative, got {num_dense}")
        if architecture != "dcn" and not cross_layers is cross_rank is None:
            raise ValueError(
                f"cross_layers and cross_rank have no effect with architecture={architecture!r}; drop them"
            )
        if features is not None:
            features = feature_records(features)
        # Plain values only: a checkpoint must load with torch.load(weights_only=True).
        self.save_hyperparameters()
        self.model = None
        self.val_metrics = click_metrics("val_")
        self.test_metrics = click_metrics("test_")

    def configure_model(self) -> None:
        """Build the model, once: a second call does nothing.

        Features and ``num_dense`` that were not given are taken from the trainer's data module, and are
        kept in ``hparams``, so that ``load_from_checkpoint`` needs no data.

        Raises:
            ValueError: If they were not given and there is no data module that has them.
        """
        if self.model is not None:
            return
        hparams = self.hparams
        if hparams["features"] is None:
            hparams["features"] = feature_records(self._from_datamodule("features"))
        if hparams["num_dense"] is None:
            hparams["num_dense"] = int(self._from_datamodule("num_dense"))
        device = self.trainer.strategy.root_device if self._trainer is not None else None
        collection = build_collection(
            table_configs(hparams["features"], hparams["embedding_dim"], hparams["pooling"]),
            hparams["embedding_optimizer"],
            self.embedding_lr,
            device,
        )
        sizes = (max(hparams["num_dense"], 1), hparams["dense_layers"], hparams["over_layers"])
        architecture = hparams["architecture"]
        if architecture == "dlrm":
            self.model = build_dlrm(collection, *sizes)
        elif architecture == "deepfm":
            self.model = build_deepfm(collection, *sizes)
        else:
            given = {key: hparams[key] for key in ("cross_layers", "cross_rank") if hparams[key] is not None}
            self.model = build_dcn(collection, *sizes, **given)

    @property
    def embedding_lr(self) -> float:
        """Learning rate of the tables, with the default resolved."""
        if self.hparams["embedding_lr"] is not None:
            return float(self.hparams["embedding_lr"])
        return _FUSED_LR.get(self.hparams["embedding_optimizer"], float(self.hparams["dense_lr"]))

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Compute the logit of a click.

        Args:
            dense: Dense features, float32 ``(B, num_dense)``.
            sparse: Categorical features, one key for each feature.

        Returns:
            Logits, float32 ``(B,)``.

        Raises:
            RuntimeError: If ``configure_model`` has not been called.
        """
        if self.model is None:
            raise RuntimeError("ClickModel is not built yet: call configure_model() or run it in a Trainer")
        if self.hparams["num_dense"] == 0:
            dense = torch.ones(sparse.stride(), 1, device=dense.device, dtype=torch.float32)
        if not torch.is_inference_mode_enabled():
            return self.model(dense, sparse).squeeze(1)
        # FBGEMM's CPU kernels for training are registered for autograd only, which inference mode bypasses.
        with torch.inference_mode(False), torch.no_grad():
            return self.model(dense, sparse).squeeze(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Average log loss of a batch.

        Args:
            batch: ``(dense, sparse, label)``.
            batch_idx: Position in the epoch.

        Returns:
            Scalar loss.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite; on a GPU, in a later step, so that no step waits.
        """
        dense, sparse, label = batch
        loss = binary_cross_entropy_with_logits(self(dense, sparse), label)
        where = f"at global step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx})"
        explain = partial(self._explain_non_finite, loss.detach(), batch, where)
        if loss.device.type == "cuda":
            report_later(torch.isfinite(loss.detach()).logical_not().long().view(1), explain)
        elif not torch.isfinite(loss):
            explain()
        self.log("train_loss", loss, prog_bar=True, batch_size=label.numel())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation metrics.

        Args:
            batch: ``(dense, sparse, label)``.
            batch_idx: Position in the epoch.
        """
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics.

        Args:
            batch: ``(dense, sparse, label)``.
            batch_idx: Position in the epoch.
        """
        self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict click probabilities.

        Args:
            batch: ``(dense, sparse, label)``; the label is not read and may be left out.
            batch_idx: Position in the epoch.

        Returns:
            Probabilities, float32 ``(B,)``.
        """
        return torch.sigmoid(self(batch[0], batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the one optimizer that Lightning steps.

        Everything below :data:`EMBEDDINGS_PATH` is left out if the tables train in backward. The path decides,
        not the type: the tables may have been exchanged for another module with the same interface.

        Returns:
            The dense optimizer.
        """
        embeddings = list(self._parameters_under(EMBEDDINGS_PATH, inside=True))
        groups: list[dict[str, Any]] = [
            {"params": list(self._parameters_under(EMBEDDINGS_PATH, inside=False)), "name": "dense"}
        ]
        if self.hparams["embedding_optimizer"] == "none" and embeddings:
            groups.append({"params": embeddings, "lr": self.embedding_lr, "name": "embeddings"})
        return _DENSE_OPTIMIZERS[self.hparams["dense_optimizer"]](groups, lr=self.hparams["dense_lr"])

    def on_fit_start(self) -> None:
        """Refuse trainer settings that would not reach tables trained in backward.

        Raises:
            ValueError: If gradient clipping, gradient accumulation or a gradient scaler is asked for.
        """
        if self.hparams["embedding_optimizer"] == "none":
            return
        trainer = self.trainer
        refused = {
            f"gradient_clip_val={trainer.gradient_clip_val}": trainer.gradient_clip_val not in (None, 0),
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}": trainer.accumulate_grad_batches > 1,
            f"precision={trainer.precision}": trainer.precision == "16-mixed",
        }
        for setting in (text for text, asked in refused.items() if asked):
            raise ValueError(
                f"Trainer({setting}) does not reach the embedding tables, which embedding_optimizer="
                f"{self.hparams['embedding_optimizer']!r} trains inside backward; drop the setting, or set "
                "embedding_optimizer='none'"
            )

    def on_fit_end(self) -> None:
        """Wait for the losses that a GPU has not reported yet."""
        check(self.device, wait=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the fused optimizer, which Lightning does not see; not of a model that a GPU reports lost.

        Args:
            checkpoint: The checkpoint to be written.
        """
        check(self.device, wait=True)
        fused = self._fused_state()
        if fused:
            checkpoint[_FUSED_STATE_KEY] = {name: tensor.detach().clone() for name, tensor in fused.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the state of the fused optimizer back.

        Args:
            checkpoint: The checkpoint that was read.

        Raises:
            ValueError: If the checkpoint's state is not that of this model's tables.
        """
        saved = checkpoint.get(_FUSED_STATE_KEY)
        fused = self._fused_state()
        if saved is None or not fused:
            return
        if saved.keys() != fused.keys():
            raise ValueError(
                "the fused optimizer's state in the checkpoint does not match the model: it differs in "
                f"{sorted(saved.keys() ^ fused.keys())}; use the same embedding_optimizer and features"
            )
        for name, tensor in fused.items():
            tensor.copy_(saved[name])

    def _evaluate(self, batch: Batch, metrics: MetricCollection) -> None:
        dense, sparse, label = batch
        # In float64, so that a float32 logit of 20 is not yet a certain click.
        probability = torch.sigmoid(self(dense, sparse).double())
        if self.trainer.sanity_checking:
            # Its few batches may hold one class only, and nothing of it is logged.
            return
        metrics.update(probability, label.to(torch.int64))
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=label.numel())

    def _parameters_under(self, path: str, inside: bool) -> Iterator[nn.Parameter]:
        if self.model is None:
            raise RuntimeError("ClickModel is not built yet: call configure_model() or run it in a Trainer")
        for name, parameter in self.model.named_parameters():
            if name.startswith(f"{path}.") is inside and parameter.requires_grad:
                yield parameter

    def _fused_state(self) -> dict[str, Tensor]:
        """State tensors of TorchRec's fused optimizer, by name; they share memory with the optimizer."""
        collection = self.model.get_submodule(EMBEDDINGS_PATH) if self.model is not None else None
        if not isinstance(collection, FusedEmbeddingBagCollection):
            return {}
        state = collection.fused_optimizer().state_dict()["state"]
        return {name: tensor for table in state.values() for name, tensor in table.items()}

    def _from_datamodule(self, attribute: str) -> Any:  # noqa: ANN401 - whatever the data module holds
        datamodule = getattr(self._trainer, "datamodule", None)
        if not hasattr(datamodule, attribute):
            source = (
                "there is no data module" if datamodule is None else f"{type(datamodule).__name__} has no {attribute}"
            )
            raise ValueError(
                f"ClickModel({attribute}=None) reads {attribute!r} from the trainer's data module, but {source}; "
                f"pass ClickModel({attribute}=...) or a data module such as lightning_embcomp.data.ClickLogDataModule"
            )
        return getattr(datamodule, attribute)

    def _explain_non_finite(self, loss: Tensor, batch: Batch, where: str, wrong: int = 1) -> None:
        if not wrong:
            return
        for name, tensor in (("dense features", batch[0]), ("labels", batch[2])):
            if not torch.isfinite(tensor).all():
                raise NonFiniteLossError(
                    f"the loss is {loss.item()} {where}: the {name} of this batch hold NaN or infinity; clean the data"
                )
        raise NonFiniteLossError(
            f"the loss is {loss.item()} {where} although the batch is finite: the weights have diverged; lower"
            f" dense_lr={self.hparams['dense_lr']} or embedding_lr={self.embedding_lr}"
        )


def click_metrics(prefix: str) -> MetricCollection:
    """Collect the metrics of a click model: AUC, log loss, normalised entropy and calibration.

    Args:
        prefix: Put before each name, e.g. ``"val_"``.

    Returns:
        Metrics named ``{prefix}auc``, ``{prefix}logloss``, ``{prefix}ne`` and ``{prefix}calibration``; all take
        probabilities and integer labels. With labels of one class, the AUC is 0 with torchmetrics' warning.

    Example:
        >>> sorted(click_metrics("val_").keys())
        ['val_auc', 'val_calibration', 'val_logloss', 'val_ne']
    """
    return MetricCollection(
        {"auc": BinaryAUROC(), "logloss": LogLoss(), "ne": NormalizedEntropy(), "calibration": Calibration()},
        prefix=prefix,
        compute_groups=False,
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
