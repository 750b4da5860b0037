"""Codecs for the collectives of sharded embeddings: top-K per row, and TorchRec's quantised ones beside it."""

from lightning_embcomp.methods.dct.codecs.callback import EmbeddingTrafficMonitor
from lightning_embcomp.methods.dct.codecs.config import BackwardCodec, CommCodec, PooledThresholding
from lightning_embcomp.methods.dct.codecs.plan import UnsupportedShardingError
from lightning_embcomp.methods.dct.codecs.registry import CodecRegistry, comm_codecs
from lightning_embcomp.methods.dct.codecs.traffic import Traffic

__all__ = [
    "BackwardCodec",
    "CodecRegistry",
    "CommCodec",
    "EmbeddingTrafficMonitor",
    "PooledThresholding",
    "Traffic",
    "UnsupportedShardingError",
    "comm_codecs",
]
