"""A click log that is made up while it is read: Zipf ids, a planted logistic model, and so a known best AUC."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from lightning_embcomp.data.batches import Bags, Columns, concat_columns
from lightning_embcomp.data.encoded import feature_index
from lightning_embcomp.data.planted import PlantedModel, ZipfIds
from lightning_embcomp.data.schema import CategoricalFeature, Split
from lightning_embcomp.data.splits import Part, part_sizes

BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class SyntheticClickLog:
    """A stream of independent rows, each made from its number and the seed alone, so that no row is stored.

    The label of a row is drawn with the probability ``sigmoid(bias + dense part + linear part + interactions)``,
    where every id has a weight and a latent vector, and interactions are the inner products of the latent vectors of
    all pairs of features. ``signal`` scales all three parts; the bias is set so that ``base_rate`` holds. Rare ids have
    weights too, so that a model that is trained on few rows stays below the best AUC.

    Memory is about 40 bytes per id, whatever the number of rows.

    Args:
        num_rows: Rows in all. The first rows are the same for every ``num_rows``, except for a drift.
        num_embeddings: Rows of the embedding table of every feature; ids are drawn from 1 to one below it.
        num_dense: Dense inputs, standard normal.
        exponent: Exponent of Zipf's law: the k-th most popular id is drawn with a probability proportional to
            ``k ** -exponent``.
        pooling_factor: Mean number of ids per row and feature. 1: single-valued features; above: multi-valued ones,
            with 1 to ``2 * pooling_factor - 1`` ids.
        signal: Standard deviation of the planted logit, roughly.
        base_rate: Expected share of positive rows.
        drift: From this fraction of the stream on, the popularity of ids is permuted (weights stay with their ids);
            ``None``: never. Ids are numbered by their expected frequency in all training rows.
        validation: Fraction of the rows, before the test rows, for validation.
        test: Fraction of the rows, the last ones, for the test.
        seed: Seed of everything.

    Example:
        >>> log = SyntheticClickLog(num_rows=20_000, num_embeddings=(100, 1000))
        >>> log.features[1]
        CategoricalFeature(name='feature_1', num_embeddings=1000, multi_valued=False)
        >>> 0.5 < log.best_auc() < 1
        True
    """

    num_rows: int = 200_000
    num_embeddings: tuple[int, ...] = (50, 200, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
    num_dense: int = 4
    exponent: float = 1.2
    pooling_factor: int = 1
    signal: float = 2.0
    base_rate: float = 0.2
    drift: float | None = None
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "num_embeddings", tuple(self.num_embeddings))
        if not self.num_embeddings or min(self.num_embeddings) < 2:
            raise ValueError(f"num_embeddings needs features of 2 rows or more, got {self.num_embeddings}")
        if self.num_dense < 0 or self.seed < 0:
            raise ValueError(f"num_dense and seed must be 0 or more, got {self.num_dense} and {self.seed}")
        if self.pooling_factor < 1:
            raise ValueError(f"pooling_factor must be at least 1, got {self.pooling_factor}")
        if not (self.exponent >= 0 and self.signal >= 0):
            raise ValueError(f"exponent and signal must be 0 or more, got {self.exponent} and {self.signal}")
        if not 0 < self.base_rate < 1:
            raise ValueError(f"base_rate must be in (0, 1), got {self.base_rate}")
        if self.drift is not None and not 0 < self.drift < 1:
            raise ValueError(f"drift must be in (0, 1) or None, got {self.drift}")
        part_sizes(self.num_rows, self._split)

    @property
    def _split(self) -> Split:
        return Split(validation=self.validation, test=self.test)

    @property
    def features(self) -> tuple[CategoricalFeature, ...]:
        """The categorical features: ``feature_0``, ``feature_1`` …."""
        return tuple(
            CategoricalFeature(f"feature_{index}", num_embeddings=size, multi_valued=self.pooling_factor > 1)
            for index, size in enumerate(self.num_embeddings)
        )

    @property
    def drift_row(self) -> int:
        """First row with permuted popularity; ``num_rows`` if there is no drift."""
        return self.num_rows if self.drift is None else int(self.num_rows * self.drift)

    @cached_property
    def _ids(self) -> tuple[ZipfIds, ...]:
        train = part_sizes(self.num_rows, self._split)[0]
        before = min(self.drift_row, train)
        return tuple(
            ZipfIds(
                size - 1,
                exponent=self.exponent,
                rows=(before, train - before),
                drifts=self.drift is not None,
                rng=np.random.default_rng((self.seed, 1, index)),
            )
            for index, size in enumerate(self.num_embeddings)
        )

    @cached_property
    def _model(self) -> PlantedModel:
        model = PlantedModel(
            self.num_embeddings,
            num_dense=self.num_dense,
            signal=self.signal,
            pooling_factor=self.pooling_factor,
            rng=np.random.default_rng((self.seed, 2)),
        )
        # Rows before the stream: the bias must not depend on how many rows are asked for.
        sample = [self._inputs(-1 - block, drifted=False) for block in range(4)]
        model.calibrate(np.concatenate([model.logits(dense, bags) for dense, bags, _ in sample]), self.base_rate)
        return model

    def _inputs(self, block: int, *, drifted: bool) -> tuple[np.ndarray, list[Bags], np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, block % (1 << 64)], dtype=np.uint64)))
        dense = rng.standard_normal((BLOCK_ROWS, self.num_dense), dtype=np.float32)
        uniform_label = rng.random(BLOCK_ROWS)
        bags = []
        for ids in self._ids:
            offsets = np.arange(BLOCK_ROWS + 1, dtype=np.int64)
            if self.pooling_factor > 1:
                offsets[1:] = np.cumsum(rng.integers(1, 2 * self.pooling_factor, BLOCK_ROWS))
            bags.append(Bags(values=ids.draw(rng.random(int(offsets[-1])), drifted=drifted), offsets=offsets))
        return dense, bags, uniform_label

    def block(self, index: int) -> tuple[Columns, np.ndarray]:
        """Make up one block of rows.

        Args:
            index: Block of ``BLOCK_ROWS`` rows, from 0. A drift begins with the first whole block after its row.

        Returns:
            The rows, and the planted probability of a positive label of each (float64).
        """
        model = self._model
        dense, bags, uniform_label = self._inputs(index, drifted=index * BLOCK_ROWS >= self.drift_row)
        probability = 1 / (1 + np.exp(-model.logits(dense, bags)))
        label = (uniform_label < probability).astype(np.uint8)
        if self.pooling_factor > 1:
            single, multi = np.empty((BLOCK_ROWS, 0), dtype=np.int32), tuple(bags)
        else:
            single, multi = np.stack([bag.values for bag in bags], axis=1), ()
        return Columns(dense=dense, ids=single, bags=multi, label=label), probability

    def part(self, part: Part) -> "SyntheticPart":
        """The rows of one part."""
        train, validation, test = part_sizes(self.num_rows, self._split)
        begin = {"train": 0, "validation": train, "test": train + validation}[part]
        return SyntheticPart(self, begin, {"train": train, "validation": validation, "test": test}[part])

    def expected_counts(self, feature: str) -> np.ndarray:
        """How often every id is expected in the training rows, int64, falling from id 1 on."""
        ids = self._ids[feature_index(self.features, feature)]
        return np.concatenate([[0], np.rint(ids.expected_counts * self.pooling_factor)]).astype(np.int64)

    def best_auc(self) -> float:
        """AUC on the test rows of a model that knows the planted probabilities: no other can be expected to do better.

        Raises:
            ValueError: If there are no test rows.
        """
        part = self.part("test")
        if not part.num_rows:
            raise ValueError("there are no test rows, so that there is no best AUC; set test above 0")
        label, probability = part.truth()
        return float(binary_auroc(torch.from_numpy(probability), torch.from_numpy(label.astype(np.int64))))


class SyntheticPart:
    """Consecutive rows of a synthetic log.

    Args:
        log: The log.
        begin: Its first row.
        num_rows: Number of rows.
    """

    block_rows = BLOCK_ROWS
    window_rows = BLOCK_ROWS
    _KEPT = 3

    def __init__(self, log: SyntheticClickLog, begin: int, num_rows: int) -> None:
        """Start at a row of the log."""
        self._log = log
        self._begin = begin
        self.num_rows = num_rows
        self._blocks: OrderedDict[int, Columns] = OrderedDict()

    def _block(self, index: int) -> Columns:
        if index not in self._blocks:
            self._blocks[index] = self._log.block(index)[0]
            if len(self._blocks) > self._KEPT:
                self._blocks.popitem(last=False)
        return self._blocks[index]

    def read(self, rows: np.ndarray) -> Columns:
        """Make up ``rows`` (int64, counted from the first row of the part), in that order."""
        block, within = np.divmod(rows + self._begin, BLOCK_ROWS)
        present = np.unique(block)
        parts = [self._block(int(index)).take(within[block == index]) for index in present]
        together = concat_columns(parts)
        if len(present) == 1:
            return together
        places = np.concatenate([np.flatnonzero(block == index) for index in present])
        return together.take(np.argsort(places, kind="stable"))

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels (uint8) and planted probabilities (float64) of all rows, in order."""
        end = self._begin + self.num_rows
        labels, probabilities = [], []
        for index in range(self._begin // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
            columns, probability = self._log.block(index)
            inside = slice(max(self._begin - index * BLOCK_ROWS, 0), end - index * BLOCK_ROWS)
            labels.append(columns.label[inside])
            probabilities.append(probability[inside])
        return np.concatenate(labels), np.concatenate(probabilities)
