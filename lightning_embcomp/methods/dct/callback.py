"""The callback of gradient thresholding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_embcomp.callback import SetupError
from lightning_embcomp.methods.dct.config import (
    VALUE_TYPES,
    ErrorFeedback,
    ThresholdSettings,
    ValueType,
    check_density,
)
from lightning_embcomp.methods.dct.exchange import GradientExchange
from lightning_embcomp.methods.dct.hook import gradient_thresholding_hook
from lightning_embcomp.methods.dct.saved import gather_states, scatter_states
from lightning_embcomp.methods.dct.traffic import Traffic, all_gather_bytes, all_reduce_bytes
from lightning_embcomp.methods.dct.wire import encoded_bytes


class GradientThresholding(pl.Callback):
    """Exchange only the largest gradients between processes; the rest is added to the next ones (DCT) [1]_.

    Takes the place of the all-reduce of ``DistributedDataParallel``, under Lightning's ``ddp`` strategies and
    ``TorchRecStrategy``: every process sends positions and values of the entries above a threshold of its own, and all
    step along the mean of what was sent. With W processes, each receives W - 1 such messages: against an all-reduce,
    densities far below 1 / W are worth it.

    Logged: ``dct/bytes_sent`` and ``dct/bytes_received`` of a step on this process, ``dct/dense_bytes`` of the
    all-reduce in their place, ``dct/density``, ``dct/residual_ratio`` (what is unsent over the gradient, as norms),
    ``dct/selection_seconds`` and ``dct/exchange_seconds``.

    Args:
        density: Share of the entries of each parameter that is sent, over 0 and at most 1.
        parameters: Globs of parameters to threshold, by name in the module; one that starts with ``!`` excludes.
            Others are sent whole.
        min_numel: Parameters with fewer entries are sent whole.
        value_dtype: Type of the values on the wire: ``fp32``, ``fp16`` or ``bf16``. What rounding takes off is unsent,
            and treated like it.
        warmup_steps: First steps that are exchanged whole.
        feedback: What becomes of the entries that are not sent.
        thresholds: When thresholds are computed.
        log_every_n_steps: Steps between logged figures; 0 for none.

    Raises:
        ValueError: If a setting is out of range or has no effect.

    Example:
        >>> callback = GradientThresholding(density=0.01, value_dtype="fp16")
        >>> trainer = pl.Trainer(strategy="ddp", devices=2, accelerator="cpu", callbacks=[callback], logger=False)

    References:
        .. [1] Dynamic communication thresholding, KDD 2021, https://arxiv.org/abs/2010.08899
    """

    def __init__(
        self,
        density: float = 0.05,
        parameters: str | Sequence[str] = "*",
        min_numel: int = 256,
        value_dtype: ValueType = "fp32",
        warmup_steps: int = 100,
        feedback: ErrorFeedback | None = None,
        thresholds: ThresholdSettings | None = None,
        log_every_n_steps: int = 100,
    ) -> None:
        check_density(density)
        self.feedback = feedback or ErrorFeedback()
        self.feedback.gain(density)  # refuses an eta that does not fit the density
        self.patterns: tuple[str, ...] = (parameters,) if isinstance(parameters, str) else tuple(parameters)
        if not self.patterns:
            raise ValueError("GradientThresholding: give at least one glob of parameters; '*' matches all")
        if value_dtype not in VALUE_TYPES:
            raise ValueError(f"value_dtype must be one of {', '.join(map(repr, VALUE_TYPES))}, not {value_dtype!r}")
        for name, number in (
            ("min_numel", min_numel),
            ("warmup_steps", warmup_steps),
            ("log_every_n_steps", log_every_n_steps),
        ):
            if number < 0:
                raise ValueError(f"GradientThresholding: {name} must not be negative, not {number}")
        self.density = density
        self.min_numel = min_numel
        self.value_dtype: ValueType = value_dtype
        self.warmup_steps = warmup_steps
        self.thresholds = thresholds or ThresholdSettings()
        self.log_every_n_steps = log_every_n_steps
        self.exchange: GradientExchange | None = None
        self._saved: Mapping[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Distinct for instances on different parameters, so that a second one can be refused by name."""
        return f"{type(self).__name__}[{','.join(self.patterns)}]"

    def __getstate__(self) -> dict[str, Any]:
        # Process groups and hooks cannot be copied. Lightning hangs methods of the module on the callback for logging.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "exchange": None}

    @property
    def total(self) -> Traffic:
        """Figures of all exchanges of this run on this process."""
        if self.exchange is None:
            return Traffic()
        self.exchange.count()
        return self.exchange.total

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse trainers in which there is nothing to exchange, or something else exchanges it."""
        if stage == "fit":
            self.exchange = None
            self._check_trainer(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register the communication hook."""
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            raise SetupError(
                f"{self.state_key}: the module has no parameters whose gradients processes exchange. Leave the callback"
                " out"
            )
        # By its logger DDP also knows of hooks that were built in.
        other = model._get_ddp_logging_data().get("comm_hook")
        if model._comm_hooks or other:
            self._refuse_second(other or getattr(model._comm_hooks[0][0], "__name__", "another hook"))
        reduced = {
            name: parameter
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad and name not in model.parameters_to_ignore
        }
        chosen = self._choose(reduced)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.exchange = GradientExchange(
            reduced,
            chosen,
            density=self.density,
            feedback=self.feedback,
            thresholds=self.thresholds,
            value_type=self.value_dtype,
            warmup_steps=self.warmup_steps,
            group=model.process_group,
            loss_scale=None if scaler is None else lambda: float(scaler.get_scale()),
        )
        self._warn_if_larger([reduced[name].numel() for name in chosen], trainer.world_size)
        model.register_comm_hook(self.exchange, gradient_thresholding_hook)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over a saved state; some strategies restore callbacks after ``on_fit_start``."""
        assert self.exchange is not None
        state, written = scatter_states(self._saved)
        self._saved = None
        if state is None:
            return
        try:
            self.exchange.load_state_dict(state)
        except ValueError as error:
            raise SetupError(f"{self.state_key}: the checkpoint does not fit this run: {error}") from error
        if written != trainer.world_size:
            rank_zero_info(
                f"{self.state_key}: {written} processes wrote the checkpoint and {trainer.world_size} resume it: each"
                " starts from the mean of the saved residuals and estimates, with new thresholds"
            )

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,  # noqa: ANN401 - whatever the loader yields
        batch_idx: int,
    ) -> None:
        """Measure norms in the steps that are logged."""
        if self.exchange is not None:
            self.exchange.measure = self._is_due(trainer.global_step + 1)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever training_step returns
        batch: Any,  # noqa: ANN401 - whatever the loader yields
        batch_idx: int,
    ) -> None:
        """Log the figures of the last exchange, now and then."""
        if self.exchange is None or not self.exchange.count() or not self.exchange.measure:
            return
        pl_module.log_dict({f"dct/{name}": value for name, value in self.exchange.last.logged().items()})

    def state_dict(self) -> dict[str, Any]:
        """State of all processes on the first one, of the own process on others; all processes call it."""
        if self.exchange is None:
            return dict(self._saved or {})
        return gather_states(self.exchange.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until the hook is registered."""
        self._saved = state_dict or None

    def _is_due(self, step: int) -> bool:
        return self.log_every_n_steps > 0 and step % self.log_every_n_steps == 0

    def _check_trainer(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, GradientThresholding) and other is not self:
                self._refuse_second(other.state_key)
        if trainer.world_size == 1:
            raise SetupError(
                f"{self.state_key}: one process exchanges no gradients. Leave the callback out, or train with more"
                " (devices=2, strategy='ddp')"
            )
        if not isinstance(strategy, DDPStrategy):
            raise SetupError(
                f"{self.state_key}: {type(strategy).__name__} does not reduce gradients by DistributedDataParallel, so"
                " that there is no communication hook to take. Use strategy='ddp' or TorchRecStrategy"
            )
        hook: Callable[..., Any] | None = strategy._ddp_comm_hook
        if hook is not None:
            self._refuse_second(getattr(hook, "__name__", repr(hook)))

    def _refuse_second(self, other: str) -> None:
        raise SetupError(
            f"both {self.state_key} and {other} want to exchange the gradients: DistributedDataParallel takes one"
            " communication hook. Leave one of them out"
        )

    def _choose(self, parameters: Mapping[str, Tensor]) -> list[str]:
        included = [pattern for pattern in self.patterns if not pattern.startswith("!")] or ["*"]
        excluded = [pattern[1:] for pattern in self.patterns if pattern.startswith("!")]
        for pattern in included + excluded:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise SetupError(
                    f"{self.state_key}: no parameter that processes exchange matches {pattern!r}. They are:"
                    f" {', '.join(parameters)}"
                )
        chosen = [
            name
            for name, parameter in parameters.items()
            if parameter.numel() >= self.min_numel
            and any(fnmatchcase(name, pattern) for pattern in included)
            and not any(fnmatchcase(name, pattern) for pattern in excluded)
        ]
        if not chosen:
            raise SetupError(
                f"{self.state_key}: no parameter is chosen by the globs and has at least min_numel={self.min_numel}"
                " entries, so that nothing would be thresholded"
            )
        return chosen

    def _warn_if_larger(self, numels: Sequence[int], world_size: int) -> None:
        numel = sum(numels)
        sparse = all_gather_bytes(encoded_bytes(round(numel * self.density), numel, self.value_dtype), world_size)
        dense = all_reduce_bytes(4 * numel, world_size)
        if sparse >= dense:
            rank_zero_warn(
                f"{self.state_key}: at density {self.density:g}, each of {world_size} processes exchanges about"
                f" {sparse:,} bytes per step, where the all-reduce in its place takes {dense:,}. Lower the density"
            )
