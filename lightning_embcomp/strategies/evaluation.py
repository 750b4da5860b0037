"""Keep processes together that have different numbers of batches to evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def empty_like(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same features and batch size, without a single id.

    Args:
        features: Features of a batch.

    Example:
        >>> ids = KeyedJaggedTensor(["user"], torch.tensor([1, 2]), lengths=torch.tensor([2]))
        >>> empty_like(ids).values().numel(), empty_like(ids).stride()
        (0, 1)
    """
    weights = features.weights_or_none()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values()[:0],
        weights=None if weights is None else weights[:0],
        lengths=torch.zeros_like(features.lengths()),
        stride=features.stride(),
    )


class EmptyLookups:
    """Looks up empty bags for a process that has run out of batches, while others go on.

    A lookup in sharded tables needs all processes. Lightning's sampler for prediction gives some of them one batch
    more; the others would leave them waiting for ever.

    Args:
        modules: The sharded collections.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._calls: list[tuple[nn.Module, KeyedJaggedTensor]] = []
        self._handles: list[Any] = []
        self._mine: list[int] = []
        self._most: list[int] = []
        self._steps = 0

    def start(self, batches: Sequence[int | float], device: torch.device) -> None:
        """Compare the numbers of batches of all processes, at the start of an evaluation.

        Args:
            batches: Number of batches of this process for each loader; infinite if unknown, and then taken as equal.
            device: Device for the comparison.
        """
        self.stop()
        known = [-1 if count == float("inf") else int(count) for count in batches]
        most = torch.tensor(known, dtype=torch.int64, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self._mine, self._most, self._steps = known, most.tolist(), 0
        if any(m != n for m, n in zip(self._mine, self._most, strict=True) if m >= 0):
            self._handles = [
                module.register_forward_pre_hook(self._record, with_kwargs=True) for module in self._modules
            ]

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._calls.append((module, args[0] if args else kwargs["features"]))

    def step_done(self) -> None:
        """Join in the lookups that others still have to do, after this process's last batch of a loader."""
        if not self._handles:
            return
        self._steps += 1
        calls, self._calls = self._calls, []
        done = 0
        for mine, most in zip(self._mine, self._most, strict=True):
            done += max(mine, 0)
            if self._steps == done and mine > 0:
                for _ in range(most - mine):
                    for module, features in calls:
                        _wait(module(empty_like(features)))
                self._calls = []

    def stop(self) -> None:
        """End an evaluation."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], []


class EvaluatesTogether(DDPStrategy):
    """The part of the strategy that keeps processes together while they evaluate."""

    _lookups: EmptyLookups | None = None

    def on_validation_start(self) -> None:
        """Prepare for processes with fewer batches."""
        self._start_evaluation("evaluate")

    def on_test_start(self) -> None:
        """Prepare for processes with fewer batches."""
        self._start_evaluation("evaluate")

    def on_predict_start(self) -> None:
        """Prepare for processes with fewer batches."""
        self._start_evaluation("predict")

    def _start_evaluation(self, what: Literal["evaluate", "predict"]) -> None:
        assert self.lightning_module is not None and self._lookups is not None
        trainer = self.lightning_module.trainer
        if what == "predict":
            batches: Sequence[int | float] = trainer.predict_loop.max_batches
        else:
            loop = trainer._evaluation_loop if trainer.evaluating else trainer.fit_loop.epoch_loop.val_loop
            batches = loop.max_batches
        self._lookups.start(batches, self.root_device)

    def on_validation_end(self) -> None:
        """Stop recording."""
        self._stop_evaluation()

    def on_test_end(self) -> None:
        """Stop recording."""
        self._stop_evaluation()

    def on_predict_end(self) -> None:
        """Stop recording."""
        self._stop_evaluation()

    def _stop_evaluation(self) -> None:
        if self._lookups is not None:
            self._lookups.stop()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the module's step."""
        return self._with_empty_lookups(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the module's step."""
        return self._with_empty_lookups(super().test_step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the module's step."""
        return self._with_empty_lookups(super().predict_step(*args, **kwargs))

    def _with_empty_lookups(self, output: Any) -> Any:  # noqa: ANN401
        if self._lookups is not None:
            self._lookups.step_done()
        return output


def _wait(output: Any) -> None:  # noqa: ANN401 - TorchRec's lazy output, or a tensor of it
    """Take part in the exchange of rows, which TorchRec starts with the first look at its result."""
    wait = getattr(output, "wait", None)
    result = wait() if callable(wait) else output
    if isinstance(result, Tensor):
        return
    getattr(result, "values", lambda: None)()
