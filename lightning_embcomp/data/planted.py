"""The parts of a synthetic click log: Zipf-distributed ids and a planted model."""

from collections.abc import Sequence

import numpy as np

from lightning_embcomp.data.batches import Bags

_LATENT = 4
_DENSE_SHARE, _LINEAR_SHARE, _INTERACTION_SHARE = 0.25, 0.6, 0.15
"""Shares in the variance of the logit. What rows of rare ids say about interactions is not enough to learn them."""


class ZipfIds:
    """Ids 1 to ``size`` of one feature, numbered by falling expected frequency.

    Args:
        size: Number of ids.
        exponent: Exponent of Zipf's law.
        rows: Training rows before and after the drift.
        drifts: Whether there is a drift.
        rng: Source of the permutation.

    Example:
        >>> ids = ZipfIds(2, exponent=1.0, rows=(6, 0), drifts=False, rng=np.random.default_rng(0))
        >>> ids.draw(np.array([0.0, 0.6, 0.7]), drifted=False)
        array([1, 1, 2], dtype=int32)
        >>> ids.expected_counts
        array([4., 2.])
    """

    def __init__(
        self, size: int, *, exponent: float, rows: tuple[int, int], drifts: bool, rng: np.random.Generator
    ) -> None:
        """Work out who is popular when."""
        popularity = np.arange(1, size + 1, dtype=np.float64) ** -exponent
        popularity /= popularity.sum()
        self._cumulative = np.cumsum(popularity)
        later = rng.permutation(size) if drifts else np.arange(size)  # value by popularity after the drift
        expected = rows[0] * popularity
        expected[later] += rows[1] * popularity
        by_frequency = np.argsort(-expected, kind="stable")
        ids = np.empty(size, dtype=np.int32)
        ids[by_frequency] = np.arange(1, size + 1)
        self._ids = (ids, ids[later])
        self.expected_counts = expected[by_frequency]

    def draw(self, uniform: np.ndarray, *, drifted: bool) -> np.ndarray:
        """Turn uniform numbers in [0, 1) into ids, int32."""
        rank = np.searchsorted(self._cumulative, uniform, side="right")
        return self._ids[drifted][np.minimum(rank, len(self._cumulative) - 1)]


class PlantedModel:
    """A factorisation machine with known weights.

    Args:
        num_embeddings: Ids of every feature, id 0 included.
        num_dense: Dense inputs.
        signal: Standard deviation of the logit, if ids were evenly used.
        pooling_factor: Mean ids per row and feature; sums over a bag are scaled so that they do not grow with it.
        rng: Source of the weights.
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        *,
        num_dense: int,
        signal: float,
        pooling_factor: int,
        rng: np.random.Generator,
    ) -> None:
        """Draw the weights."""
        features = len(num_embeddings)
        pairs = features * (features - 1) // 2
        pooling = np.sqrt(pooling_factor)
        linear = signal * np.sqrt(_LINEAR_SHARE / features) / pooling
        latent = (signal**2 * _INTERACTION_SHARE / (max(pairs, 1) * _LATENT)) ** 0.25 / pooling
        dense = signal * np.sqrt(_DENSE_SHARE / max(num_dense, 1))
        self._bias = 0.0
        self._dense = (rng.standard_normal(num_dense) * dense).astype(np.float32)
        # One table per feature: the weight of an id, then its latent vector.
        scales = np.array([linear, *[latent] * _LATENT], dtype=np.float32)
        self._tables = [rng.standard_normal((size, 1 + _LATENT), dtype=np.float32) * scales for size in num_embeddings]

    def logits(self, dense: np.ndarray, bags: Sequence[Bags]) -> np.ndarray:
        """Planted logits of rows.

        Args:
            dense: float32 of shape ``(B, num_dense)``.
            bags: The ids of every feature; no bag is empty.

        Returns:
            float64 of shape ``(B,)``.
        """
        logit = self._bias + (dense @ self._dense).astype(np.float64)
        total = np.zeros((len(logit), _LATENT))
        squares = np.zeros(len(logit))
        for table, bag in zip(self._tables, bags, strict=True):
            pooled = table[bag.values]
            if len(bag.values) != len(logit):
                pooled = np.add.reduceat(pooled, bag.offsets[:-1], axis=0)
            logit += pooled[:, 0]
            latent = pooled[:, 1:].astype(np.float64)
            total += latent
            squares += np.einsum("bk,bk->b", latent, latent)
        return logit + (np.einsum("bk,bk->b", total, total) - squares) / 2

    def calibrate(self, logits: np.ndarray, base_rate: float) -> None:
        """Choose the bias with which rows with ``logits`` (without it) have the mean probability ``base_rate``."""
        low, high = -50.0, 50.0
        for _ in range(60):
            self._bias = (low + high) / 2
            if np.mean(1 / (1 + np.exp(-(logits + self._bias)))) < base_rate:
                low = self._bias
            else:
                high = self._bias
