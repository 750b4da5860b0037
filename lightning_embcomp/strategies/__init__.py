"""Train sharded embedding tables in Lightning: ``Trainer(strategy="torchrec")``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.resharding import ReshardOnImbalance
from lightning_embcomp.strategies.strategy import TorchRecStrategy

for _name, _start_method in (("torchrec", "popen"), ("torchrec_spawn", "spawn")):
    StrategyRegistry.register(
        _name,
        TorchRecStrategy,
        description=f"Embedding tables sharded by TorchRec, the rest in DDP; start_method={_start_method!r}",
        override=True,
        start_method=_start_method,
    )

__all__ = ["ReshardOnImbalance", "ShardingError", "TorchRecStrategy"]
