"""Which optimizer drives the rows: one fused into FBGEMM's backward pass, or the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.optim import RowWiseAdagrad

FusedKind = Literal["sgd", "rowwise_adagrad", "adagrad", "counter_sgd"]

_FBGEMM = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "counter_sgd": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
_TORCH: dict[type[torch.optim.Optimizer], FusedKind] = {
    torch.optim.SGD: "sgd",
    RowWiseAdagrad: "rowwise_adagrad",
    torch.optim.Adagrad: "adagrad",
}


class UnsupportedOptimizerError(ValueError):
    """The optimizer of a table cannot be fused into the engine."""


@dataclass(frozen=True, kw_only=True)
class FusedOptimizerSpec:
    """An optimizer that updates rows inside the backward pass.

    Args:
        kind: ``sgd`` (no state), ``rowwise_adagrad`` (one float32 per row), ``adagrad`` (one float32 per weight)
            or ``counter_sgd`` (three float32 per row; see :mod:`lightning_embcomp.engine.counter_sgd`).
        options: FBGEMM's own names: ``learning_rate``, ``eps``, ``weight_decay``, …
    """

    kind: FusedKind
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_torch(
        cls, optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], table: str
    ) -> FusedOptimizerSpec:
        """Translate what TorchRec's fused modules and ``apply_optimizer_in_backward`` are given.

        Args:
            optimizer: Optimizer class.
            options: Its keyword arguments; ``lr`` is the learning rate.
            table: Name for the error message.

        Raises:
            UnsupportedOptimizerError: If FBGEMM has no such optimizer on every device.
        """
        kind = _TORCH.get(optimizer)
        if kind is None:
            known = ", ".join(sorted(known.__name__ for known in _TORCH))
            raise UnsupportedOptimizerError(
                f"table {table!r} is trained by {optimizer.__name__} in the backward pass, which FBGEMM does not offer"
                f" on every device. Use one of {known} there, or return {optimizer.__name__} from configure_optimizers"
            )
        translated = dict(options)
        if "lr" in translated:
            translated["learning_rate"] = translated.pop("lr")
        return cls(kind=kind, options=translated)

    @classmethod
    def from_in_backward(
        cls, optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], table: str
    ) -> FusedOptimizerSpec:
        """Translate an optimizer that ``apply_optimizer_in_backward`` attached to a table, with PyTorch's defaults.

        Raises:
            UnsupportedOptimizerError: If FBGEMM has no such optimizer, or an option that it does not have is set.
        """
        defaults = {
            name: parameter.default for name, parameter in inspect.signature(optimizer.__init__).parameters.items()
        }
        for name, value in options.items():
            if name not in ("lr", "eps") and value and value != defaults.get(name):
                raise UnsupportedOptimizerError(
                    f"table {table!r} is trained by {optimizer.__name__} with {name}={value} in the backward pass,"
                    " which FBGEMM does not offer: only lr and eps can be set. Leave it out, or return"
                    f" {optimizer.__name__} from configure_optimizers"
                )
        kept: dict[str, Any] = {name: options.get(name, defaults[name]) for name in ("lr", "eps") if name in defaults}
        return cls.from_torch(optimizer, kept, table)

    @property
    def fbgemm(self) -> EmbOptimType:
        """FBGEMM's name."""
        return _FBGEMM[self.kind]

    def state_columns(self, width: int) -> int:
        """Optimizer state per row of that width, in float32 numbers."""
        return {"sgd": 0, "rowwise_adagrad": 1, "adagrad": width, "counter_sgd": 3}[self.kind]

    def plain_state_columns(self, width: int) -> int:
        """The same for the plain table, whose optimizer a method may have put another one in place of."""
        return 0 if self.kind == "counter_sgd" else self.state_columns(width)
