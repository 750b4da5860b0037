"""Log what codecs of embedding collectives send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torchrec.distributed.types import QuantizedCommCodecs

from lightning_embcomp.methods.dct.codecs.registry import counts_traffic, traffic_of
from lightning_embcomp.methods.dct.codecs.traffic import Traffic


class EmbeddingTrafficMonitor(pl.Callback):
    """Log the bytes per training step that this process hands to embedding collectives, and their float32 equivalent.

    Names are ``comm/pooled_forward_bytes`` and ``comm/pooled_forward_dense_bytes``, and likewise for ``backward`` and
    for ``sequence``; means over the steps since they were last logged. Figures are those of the process that logs.
    They include what it hands to itself (see :class:`Traffic`); forward of evaluation counts towards the next ones.

    Args:
        every_n_steps: Steps between logged figures.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.

    Example:
        >>> EmbeddingTrafficMonitor(every_n_steps=50).every_n_steps
        50
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._codecs: list[Mapping[str, QuantizedCommCodecs]] = []
        self._before: dict[str, Traffic] = {}
        self._since = 0

    def __getstate__(self) -> dict[str, Any]:
        # Codecs belong to the strategy of a run; Lightning hangs methods of the module on the callback for logging.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "_codecs": [], "_before": {}}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the codecs.

        Raises:
            RuntimeError: If no sharded module uses codecs of :func:`comm_codecs`.
        """
        found = (getattr(module, "qcomm_codecs_registry", None) for module in pl_module.modules())
        self._codecs = [codecs for codecs in found if codecs and counts_traffic(codecs)]
        if not self._codecs:
            raise RuntimeError(
                "no sharded embedding module uses codecs of comm_codecs(...): give them to the strategy or the "
                "sharder, or take EmbeddingTrafficMonitor out"
            )
        self._before, self._since = traffic_of(self._codecs), trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Log."""
        steps = trainer.global_step - self._since
        if steps < self.every_n_steps:
            return
        now = traffic_of(self._codecs)
        pl_module.log_dict(_per_step(self._before, now, steps))
        self._before, self._since = now, trainer.global_step


def _per_step(before: Mapping[str, Traffic], now: Mapping[str, Traffic], steps: int) -> dict[str, float]:
    logged = {}
    for name, traffic in now.items():
        past = before.get(name, Traffic())
        key = f"comm/{name.replace('/', '_')}"
        logged[f"{key}_bytes"] = (traffic.encoded - past.encoded) / steps
        logged[f"{key}_dense_bytes"] = (traffic.dense - past.dense) / steps
    return logged
