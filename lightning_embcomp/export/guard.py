"""The NE guard: compare validation NE before and after, and give tables that cost too much a higher precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_embcomp.export.artefact import Artefact
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.evaluation import Evaluation, MixedTables, Predict, evaluate, predict, swapped
from lightning_embcomp.export.hosts import ServedEmbeddingBagCollection, ServedEmbeddingCollection
from lightning_embcomp.export.loading import serve_by_path
from lightning_embcomp.export.rows import PRECISIONS
from lightning_embcomp.export.tables import full_name


class NEGuardError(ExportError):
    """The exported model is worse than allowed."""


@dataclass(frozen=True, kw_only=True)
class GuardResult:
    """What the guard measured.

    Args:
        rows: Validation rows.
        ne_before: NE of the source.
        ne_after: NE of the exported model.
        auc_before: AUC of the source.
        auc_after: AUC of the exported model.
        max_logit_difference: Largest difference of a logit on the validation rows.
        fallbacks: Bits by table name that were raised, as (wanted, used).
    """

    rows: int
    ne_before: float
    ne_after: float
    auc_before: float
    auc_after: float
    max_logit_difference: float
    fallbacks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ne_loss(self) -> float:
        """Relative increase of NE."""
        return self.ne_after / self.ne_before - 1

    def metrics(self) -> dict[str, Any]:
        """Numbers for the manifest."""
        return {
            "val_rows": self.rows,
            "val_ne_before": self.ne_before,
            "val_ne_after": self.ne_after,
            "val_auc_before": self.auc_before,
            "val_auc_after": self.auc_after,
            "max_logit_difference": self.max_logit_difference,
        }


def guarded_build(
    build: Callable[[Mapping[str, int]], Artefact],
    bits: Mapping[str, int],
    module: nn.Module,
    batches: Iterable[Any],
    *,
    max_ne_loss: float = 0.0005,
    strict: bool = False,
    predictions: Predict = predict,
) -> tuple[Artefact, GuardResult]:
    """Build an export whose validation NE is close enough to that of its source.

    Where it is not, the NE is measured with one table exported at a time: error of weights alone says nothing about
    what the model makes of them. The tables that cost most, as many as make up the excess, go to the next precision,
    and the whole is measured again. Tables that were rounded in training are no candidates: their source rounds too.

    Args:
        build: Makes the export for given bits by table name.
        bits: Wanted bits of every table.
        module: The source.
        batches: Validation batches; read several times.
        max_ne_loss: Allowed relative increase of NE.
        strict: Raise instead of falling back.
        predictions: Maps (model, batch) to logits and labels.

    Returns:
        The export and what was measured.

    Raises:
        NEGuardError: If the export is worse than allowed and may not or cannot be improved.
    """
    source = evaluate(module, batches, predictions)
    used = dict(bits)
    costs: dict[str, float] = {}
    while True:
        artefact = build(used)
        modules = {
            path: served.to(_device_of(module.get_submodule(path))) for path, served in serve_by_path(artefact).items()
        }
        with swapped(module, modules):
            exported = evaluate(module, batches, predictions)
        result = _result(
            source, exported, {name: (bits[name], used[name]) for name in bits if used[name] != bits[name]}
        )
        if result.ne_loss <= max_ne_loss:
            return artefact, result
        message = (
            f"validation NE rises from {source.ne:.6f} to {exported.ne:.6f}, by {100 * result.ne_loss:.3f} %; allowed"
            f" are {100 * max_ne_loss:.3f} %"
        )
        if strict:
            raise NEGuardError(f"{message}. Allow more (max_ne_loss), give more bits, or let tables fall back")
        candidates = [name for name in _rounded_rows(artefact) if used[name] < PRECISIONS[-1]]
        if not candidates:
            raise NEGuardError(f"{message}, and no table is left that could have more bits")
        for name in candidates:
            if name not in costs:
                with swapped(module, _only(module, artefact, modules, name)):
                    costs[name] = evaluate(module, batches, predictions).ne - source.ne
        excess = exported.ne - source.ne * (1 + max_ne_loss)
        for name in _worst(candidates, costs, excess):
            used[name] = PRECISIONS[PRECISIONS.index(used[name]) + 1]
            del costs[name]


def _worst(candidates: Iterable[str], costs: Mapping[str, float], excess: float) -> list[str]:
    """Tables that cost most, as many as make up the excess.

    Example:
        >>> _worst(["a", "b", "c"], {"a": 0.1, "b": 0.5, "c": 0.3}, excess=0.6)
        ['b', 'c']
    """
    chosen: list[str] = []
    for name in sorted(candidates, key=lambda name: -costs[name]):
        if chosen and (excess <= 0 or costs[name] <= 0):
            break
        chosen.append(name)
        excess -= costs[name]
    return chosen


def _device_of(host: nn.Module) -> torch.device:
    """Where a module that holds tables looks them up."""
    # Parameters first: TorchRec's plain collections go on naming the device that they began on.
    parameter = next(host.parameters(), None)
    where: Any = host.device if parameter is None else parameter.device
    return torch.device(where)


def _rounded_rows(artefact: Artefact) -> list[str]:
    """Tables with rows that the export itself rounded."""
    manifest = artefact.manifest
    return [
        full_name(host.path, table.name)
        for host in manifest.hosts
        for table in host.tables
        if any(not manifest.classes[c].format.shared for c in table.classes)
    ]


def _only(module: nn.Module, artefact: Artefact, modules: Mapping[str, nn.Module], name: str) -> dict[str, nn.Module]:
    """Modules that leave a single table exported."""
    for host in artefact.manifest.hosts:
        for table in host.tables:
            if full_name(host.path, table.name) == name:
                served = modules[host.path]
                if isinstance(served, ServedEmbeddingBagCollection | ServedEmbeddingCollection):
                    return {host.path: MixedTables(module.get_submodule(host.path), served, {table.name})}
                return {host.path: served}
    raise KeyError(name)


def _result(source: Evaluation, exported: Evaluation, fallbacks: Mapping[str, tuple[int, int]]) -> GuardResult:
    return GuardResult(
        rows=source.labels.numel(),
        ne_before=source.ne,
        ne_after=exported.ne,
        auc_before=source.auc,
        auc_after=exported.auc,
        max_logit_difference=float((source.logits - exported.logits).abs().max()),
        fallbacks=fallbacks,
    )
