"""Which optimizer drives the rows: one fused into the backward pass, or the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec import optim as torchrec_optim

FusedKind = Literal[
    "sgd",
    "rowwise_adagrad",
    "adagrad",
    "counter_sgd",
    "adam",
    "lamb",
    "partial_rowwise_adam",
    "partial_rowwise_lamb",
]

_FBGEMM = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "counter_sgd": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "lamb": EmbOptimType.LAMB,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "partial_rowwise_lamb": EmbOptimType.PARTIAL_ROWWISE_LAMB,
}
_TORCH: dict[type[torch.optim.Optimizer], FusedKind] = {
    torch.optim.SGD: "sgd",
    torchrec_optim.SGD: "sgd",
    torchrec_optim.RowWiseAdagrad: "rowwise_adagrad",
    torch.optim.Adagrad: "adagrad",
    torchrec_optim.Adagrad: "adagrad",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adam",
    torchrec_optim.Adam: "adam",
    torchrec_optim.LAMB: "lamb",
    torchrec_optim.PartialRowWiseAdam: "partial_rowwise_adam",
    torchrec_optim.PartialRowWiseLAMB: "partial_rowwise_lamb",
}
_STATE: dict[FusedKind, dict[str, bool]] = {
    "sgd": {},
    "rowwise_adagrad": {"momentum1": True},
    "adagrad": {"momentum1": False},
    "counter_sgd": {"momentum1": True, "prev_iter": True, "row_counter": True},
    "adam": {"momentum1": False, "momentum2": False},
    "lamb": {"momentum1": False, "momentum2": False},
    "partial_rowwise_adam": {"momentum1": False, "momentum2": True},
    "partial_rowwise_lamb": {"momentum1": False, "momentum2": True},
}
"""FBGEMM's names of the state tensors, and whether they hold one number per row instead of one per weight."""
MOMENT_KINDS = frozenset(kind for kind, state in _STATE.items() if "momentum2" in state)
"""Optimizers with two moments: FBGEMM has them on CUDA only, the project's kernels everywhere."""
_MOMENT_OPTIONS = frozenset({"beta1", "beta2", "weight_decay"})
_IGNORED = frozenset({"foreach", "fused", "capturable"})  # ways to compute the same


class UnsupportedOptimizerError(ValueError):
    """The optimizer of a table cannot be fused into the engine."""


@dataclass(frozen=True, kw_only=True)
class FusedOptimizerSpec:
    """An optimizer that updates rows inside the backward pass.

    Moments move, and weights decay, in the steps in which a row is looked up; what corrects young moments counts the
    steps of the table. LAMB's norms are over the columns that a row stores. See
    :func:`lightning_embcomp.kernels.update.update_rows`.

    Args:
        kind: ``sgd`` (no state), ``rowwise_adagrad`` (one float32 per row), ``adagrad`` (one float32 per weight),
            ``counter_sgd`` (three float32 per row; see :mod:`lightning_embcomp.engine.counter_sgd`), ``adam`` or
            ``lamb`` (two float32 per weight), ``partial_rowwise_adam`` or ``partial_rowwise_lamb`` (one float32 per
            weight and one per row).
        options: FBGEMM's own names: ``learning_rate``, ``eps``, ``stochastic_rounding`` (of float16 rows; off unless
            given), for those with two moments ``beta1``, ``beta2`` and ``weight_decay`` (decoupled, as in AdamW), for
            the others what else FBGEMM has on the CPU.

    Raises:
        UnsupportedOptimizerError: If an optimizer with two moments gets an option that the kernels do not have.
        ValueError: If a value is out of range.

    Example:
        >>> FusedOptimizerSpec(kind="partial_rowwise_adam", options={"beta1": 0.8}).state_columns(16)
        17
    """

    kind: FusedKind
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = ", ".join(sorted(set(self.options) - self.direct_options))
        if self.options.get("stochastic_rounding") and (unknown or self.kind == "counter_sgd"):
            extra = f" with {unknown}" if unknown else ""
            raise UnsupportedOptimizerError(
                f"fused {self.kind}{extra} is run by FBGEMM, and stochastic_rounding by the project's kernels:"
                " leave one of them out"
            )
        if self.kind not in MOMENT_KINDS:
            return
        if unknown:
            known = ", ".join(sorted(self.direct_options))
            raise UnsupportedOptimizerError(f"fused {self.kind} does not have {unknown}: it takes {known}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= float(self.options.get(name, 0.0)) < 1.0:
                raise ValueError(f"fused {self.kind}: {name}={self.options[name]} must be from 0 to below 1")
        for name in ("eps", "weight_decay"):
            if float(self.options.get(name, 0.0)) < 0.0:
                raise ValueError(f"fused {self.kind}: {name}={self.options[name]} must not be negative")

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
            UnsupportedOptimizerError: If there is no such fused optimizer, or it would decay weights in another way.
        """
        kind = _TORCH.get(optimizer)
        if kind is None:
            known = ", ".join(sorted({known.__name__ for known in _TORCH}))
            raise UnsupportedOptimizerError(
                f"table {table!r} is trained by {optimizer.__name__} in the backward pass, which there is no kernel"
                f" for. Use one of {known} there, or return {optimizer.__name__} from configure_optimizers"
            )
        translated = dict(options)
        if "lr" in translated:
            translated["learning_rate"] = translated.pop("lr")
        if "betas" in translated:
            translated["beta1"], translated["beta2"] = translated.pop("betas")
        if optimizer is torch.optim.Adam and translated.get("weight_decay"):
            raise UnsupportedOptimizerError(
                f"table {table!r} is trained by torch.optim.Adam with weight_decay={translated['weight_decay']} in the"
                " backward pass, which adds it to the gradient; fused weight decay is decoupled: use torch.optim.AdamW"
            )
        return cls(kind=kind, options=translated)

    @classmethod
    def from_in_backward(
        cls, optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], table: str
    ) -> FusedOptimizerSpec:
        """Translate an optimizer that ``apply_optimizer_in_backward`` attached to a table, with its own defaults.

        Raises:
            UnsupportedOptimizerError: If there is no such fused optimizer, or an option that it does not have is set.
        """
        parameters = inspect.signature(optimizer.__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        kind = _TORCH.get(optimizer)
        known = {"lr", "eps", "stochastic_rounding"}
        if kind in MOMENT_KINDS:
            known |= _MOMENT_OPTIONS | {"betas"}
        for name, value in options.items():
            if name in known | _IGNORED or not value or value == defaults.get(name):
                continue
            raise UnsupportedOptimizerError(
                f"table {table!r} is trained by {optimizer.__name__} with {name}={value} in the backward pass, which"
                f" its kernel does not have: {', '.join(sorted(known))} can be set. Leave it out, or return"
                f" {optimizer.__name__} from configure_optimizers"
            )
        kept: dict[str, Any] = {}
        for name in sorted(known):
            if name in options:
                kept[name] = options[name]
            elif name in defaults:
                kept[name] = defaults[name]
        return cls.from_torch(optimizer, kept, table)

    @property
    def fbgemm(self) -> EmbOptimType:
        """FBGEMM's name."""
        return _FBGEMM[self.kind]

    @property
    def direct_options(self) -> frozenset[str]:
        """Options that the project's kernels know."""
        common = frozenset({"learning_rate", "eps", "stochastic_rounding"})
        return common | _MOMENT_OPTIONS if self.kind in MOMENT_KINDS else common

    @property
    def state(self) -> Mapping[str, bool]:
        """Names of the state tensors, and whether they hold one number per row instead of one per weight."""
        return _STATE[self.kind]

    @property
    def per_row(self) -> int:
        """Optimizer state of a row, whatever its width, in float32 numbers."""
        return sum(self.state.values())

    @property
    def per_weight(self) -> int:
        """Optimizer state of a weight, in float32 numbers."""
        return len(self.state) - self.per_row

    def check_on_cpu(self) -> None:
        """Raise if a lookup that FBGEMM has to run on the CPU, because per-sample weights are trained, cannot be.

        Raises:
            UnsupportedOptimizerError: If only the project's kernels run the optimizer there.
        """
        if self.kind in MOMENT_KINDS or self.options.get("stochastic_rounding"):
            extra = "" if self.kind in MOMENT_KINDS else " and stochastic rounding"
            raise UnsupportedOptimizerError(
                f"rows with fused {self.kind}{extra} cannot be looked up with per-sample weights that are trained: that"
                " is left to FBGEMM, which has no such kernel for the CPU. Detach the weights, or train the tables from"
                " configure_optimizers"
            )

    def state_columns(self, width: int) -> int:
        """Optimizer state per row of that width, in float32 numbers."""
        return self.per_row + self.per_weight * width

    def plain_state_columns(self, width: int) -> int:
        """The same for the plain table, whose optimizer a method may have put another one in place of."""
        return 0 if self.kind == "counter_sgd" else self.state_columns(width)
