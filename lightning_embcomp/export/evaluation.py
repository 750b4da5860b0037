"""Evaluate a model on validation batches, with its own tables or with exported ones in their place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.hosts import ServedEmbeddingBagCollection, ServedEmbeddingCollection
from lightning_embcomp.metrics.functional import normalized_entropy
from lightning_embcomp.surgery import replace

Predict = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""Maps (model, batch) to logits and labels of 0 and 1, of one shape."""

HOOK = "validation_predictions"
"""Method of a model that maps a batch to logits and labels, where batches are not ``(*inputs, label)``."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Predictions of a model on the validation rows.

    Args:
        logits: float32 ``(N,)``.
        labels: 0 or 1, float32 ``(N,)``.
    """

    logits: Tensor
    labels: Tensor

    @property
    def ne(self) -> float:
        """Normalised entropy."""
        return float(normalized_entropy(torch.sigmoid(self.logits.double()), self.labels))

    @property
    def auc(self) -> float:
        """Area under the ROC curve."""
        return float(binary_auroc(torch.sigmoid(self.logits.double()), self.labels.long()))


def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - the model's own batch
    """Logits and labels of a batch.

    A model with a method ``validation_predictions(batch) -> (logits, labels)`` is asked itself. Otherwise the batch
    must be ``(*inputs, label)``, as that of ``ClickModel``, and ``model(*inputs)`` give logits.

    Args:
        model: The model.
        batch: A validation batch.

    Raises:
        ExportError: If neither fits.
    """
    name = type(model).__name__
    hook = getattr(model, HOOK, None)
    if callable(hook):
        logits, labels = hook(batch)
    elif isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        logits, labels = model(*batch[:-1]), batch[-1]
    else:
        raise ExportError(_help(name, f"a validation batch is a {type(batch).__name__}, not (*inputs, label)"))
    if not isinstance(logits, Tensor) or logits.numel() != labels.numel() or not logits.is_floating_point():
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ExportError(_help(name, f"its output is {found} for labels of shape {tuple(labels.shape)}"))
    labels = labels.flatten().float()
    if bool(((labels != 0) & (labels != 1)).any()):
        raise ExportError(_help(name, "the labels are not 0 or 1"))
    return logits.flatten().float(), labels


def evaluate(model: nn.Module, batches: Iterable[Any], predictions: Predict = predict) -> Evaluation:
    """Collect predictions in evaluation mode; the mode of every module is as before afterwards.

    Args:
        model: The model.
        batches: Validation batches.
        predictions: Maps (model, batch) to logits and labels.

    Raises:
        ExportError: If there are no batches, labels of one class only, or predictions that are not finite.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            parts = [predictions(model, batch) for batch in batches]
    finally:
        for module, training in modes.items():
            module.training = training
    if not parts:
        raise ExportError("there are no validation batches: the NE guard needs some, or switch it off")
    logits, labels = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    if labels.min() == labels.max():
        raise ExportError(f"all {labels.numel()} validation labels are {int(labels[0])}: their NE is not defined")
    if not bool(torch.isfinite(logits).all()):
        raise ExportError("the model predicts NaN or infinity on the validation rows: export an earlier checkpoint")
    return Evaluation(logits=logits, labels=labels)


@contextmanager
def swapped(root: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules at some paths for the length of the block.

    Args:
        root: The model.
        modules: Module by path.
    """
    with ExitStack() as undo:
        for path, module in modules.items():
            old = root.get_submodule(path)
            replace(root, path, module)
            undo.callback(replace, root, path, old)
        yield


class MixedTables(nn.Module):
    """A collection whose tables come from two modules.

    Args:
        source: Module that most tables are taken from.
        exported: Served module of the same interface.
        names: Own names of the tables that are taken from the latter.
    """

    def __init__(
        self,
        source: nn.Module,
        exported: ServedEmbeddingBagCollection | ServedEmbeddingCollection,
        names: Collection[str],
    ) -> None:
        super().__init__()
        self.source, self.exported = source, exported
        configs = (
            exported.embedding_bag_configs()
            if isinstance(exported, ServedEmbeddingBagCollection)
            else exported.embedding_configs()
        )
        outputs = get_embedding_names_by_table(configs)
        tables = zip(configs, outputs, strict=True)
        self.chosen = {name for config, found in tables if config.name in names for name in found}

    def forward(self, features: Any) -> Any:  # noqa: ANN401 - as the collection
        """Look up in both, and choose."""
        own, other = self.source(features), self.exported(features)
        if isinstance(own, KeyedTensor):
            parts, others = own.to_dict(), other.to_dict()
            return KeyedTensor.from_tensor_list(
                list(own.keys()), [others[key] if key in self.chosen else parts[key] for key in own.keys()]
            )
        mixed: dict[str, JaggedTensor] = {key: other[key] if key in self.chosen else own[key] for key in own}
        return mixed


def _help(name: str, found: str) -> str:
    return (
        f"the NE guard cannot read predictions of {name}: {found}. Give it a method"
        f" {HOOK}(self, batch) -> (logits, labels), or switch the guard off"
    )
