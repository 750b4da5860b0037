"""Lightning data modules: click logs in files, and a synthetic one."""

import os
from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
import torch

from lightning_embcomp.data import cache
from lightning_embcomp.data.batches import Batch, RowSource
from lightning_embcomp.data.build import BuildSettings, build, cache_key
from lightning_embcomp.data.encoded import EncodedLog
from lightning_embcomp.data.formats import FormatName, Reader, open_reader
from lightning_embcomp.data.loader import BatchLoader
from lightning_embcomp.data.schema import CategoricalFeature, ClickLogSchema, Split
from lightning_embcomp.data.splits import Part
from lightning_embcomp.data.synthetic import SyntheticClickLog


class _BatchDataModule(pl.LightningDataModule):
    """Loaders over the parts of a click log, whatever it comes from.

    Args:
        batch_size: Rows per batch and process.
        shuffle: Whether training rows come in another order every epoch.
        seed: Seed of that order.
        num_workers: Worker processes per loader.
    """

    def __init__(self, *, batch_size: int, shuffle: bool, seed: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._num_workers = num_workers

    @property
    def features(self) -> tuple[CategoricalFeature, ...]:
        """The categorical features, in the order of the batch's keys."""
        raise NotImplementedError

    def _part(self, part: Part) -> RowSource:
        raise NotImplementedError

    def _loader(self, source: RowSource, *, shuffle: bool = False, training: bool = False) -> BatchLoader:
        trainer = self.trainer
        rows, world_size = source.num_rows, trainer.world_size if trainer else 1
        # A last batch that is one row larger on some processes would be averaged wrongly, and gloo cannot exchange it
        # for tables that are sharded by rows.
        uneven = rows % world_size > 0 and rows >= self.batch_size * world_size
        loader = BatchLoader(
            source,
            self.features,
            self.batch_size,
            shuffle=shuffle,
            seed=self._seed,
            num_workers=self._num_workers,
            rank=trainer.global_rank if trainer else 0,
            world_size=world_size,
            drop_last=training and uneven,
        )
        if trainer:
            loader.sampler.set_epoch(trainer.current_epoch)
        return loader

    def _evaluation_loader(self, part: Part) -> BatchLoader | list[BatchLoader]:
        source = self._part(part)
        # An empty list is Lightning's way to say that there is nothing to validate or test on.
        return self._loader(source) if source.num_rows else []

    def train_dataloader(self) -> BatchLoader:
        """Training batches; ``Trainer(overfit_batches=…)`` turns shuffling off.

        With several processes, a last batch that they cannot share equally is left out.
        """
        overfit = bool(getattr(self.trainer, "overfit_batches", 0))
        return self._loader(self._part("train"), shuffle=self._shuffle and not overfit, training=True)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Validation batches, in the order of the rows; an empty list if there are no validation rows."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Test batches, in the order of the rows; an empty list if there are no test rows."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """The test batches."""
        return self._evaluation_loader("test")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move all three parts of a batch."""
        dense, sparse, label = batch
        return (
            dense.to(device, non_blocking=True),
            sparse.to(device, non_blocking=True),
            label.to(device, non_blocking=True),
        )


class ClickLogDataModule(_BatchDataModule):
    r"""A click log in files, encoded once and then read from memory-mapped arrays.

    Ids are numbered by falling frequency in the training rows: id 0 is every value that is unknown, too rare or
    missing, id 1 the most frequent value. Batches are ``(dense, sparse, label)``: float32 ``(B, num_dense)``, a
    ``KeyedJaggedTensor`` with the features as keys, and float32 ``(B,)``.

    The encoded form is kept in ``.embcomp_cache`` beside the first file (in the user's cache folder where that cannot
    be written to) and made anew when a file or a setting that matters has changed.

    Args:
        path: File, folder, glob or list of files, plain or compressed (gzip, xz, bzip2, Zstandard).
        format: Layout of the files: ``criteo`` (tab separated: label, 13 integers, 26 categorical values), ``avazu``
            (CSV), ``movielens`` (folder or zip of MovieLens 1M), ``libfm``, or ``table`` (CSV or Parquet, see
            ``schema``).
        schema: What the columns are, for ``table``.
        batch_size: Rows per batch and process.
        split: How rows are divided into training, validation and test rows.
        min_count: Values that occur less often in the training rows share id 0.
        on_bad_rows: ``error``: the first malformed row is an error that names file, line and column; ``skip``:
            malformed rows are left out, counted and logged.
        shuffle: Whether training rows come in another order every epoch; otherwise in the order of the data.
        seed: Seed of that order; it depends on the seed and the epoch alone.
        cache_dir: Folder for the encoded form.
        max_rows: Rows to read; ``None``: all.
        num_workers: Worker processes per loader.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with open(folder.name + "/log.csv", "w") as file:
        ...     _ = file.write("click,site\n1,a\n0,b\n1,a\n")
        >>> data = ClickLogDataModule(
        ...     folder.name + "/log.csv",
        ...     format="table",
        ...     schema=ClickLogSchema(label="click", categorical=("site",)),
        ...     split=Split(validation=0, test=0),
        ... )
        >>> data.prepare_data()
        >>> data.setup("fit")
        >>> data.features
        (CategoricalFeature(name='site', num_embeddings=3, multi_valued=False),)
        >>> data.id_counts("site")
        tensor([0, 2, 1])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        format: FormatName = "criteo",
        schema: ClickLogSchema | None = None,
        batch_size: int = 2048,
        split: Split = Split(),  # noqa: B008 - frozen
        min_count: int = 1,
        on_bad_rows: Literal["error", "skip"] = "error",
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        max_rows: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Take the settings; nothing is read yet."""
        super().__init__(batch_size=batch_size, shuffle=shuffle, seed=seed, num_workers=num_workers)
        self._path = path
        self._format: FormatName = format
        self._schema = schema
        self._settings = BuildSettings(split=split, min_count=min_count, on_bad_rows=on_bad_rows, max_rows=max_rows)
        self._cache_dir = cache_dir
        self._log: EncodedLog | None = None

    def _reader(self) -> Reader:
        return open_reader(self._path, self._format, self._schema)

    def prepare_data(self) -> None:
        """Encode the files, unless that has been done."""
        reader = self._reader()
        candidates = cache.cache_candidates(reader.files, self._cache_dir)
        if cache.find(candidates, cache_key(reader, self._settings)) is None:
            build(reader, self._settings, cache.first_writable(candidates))

    def setup(self, stage: str | None = None) -> None:
        """Open the encoded form.

        Raises:
            FileNotFoundError: If ``prepare_data`` has not been called on a machine that shares the cache folder.
        """
        if self._log is not None:
            return
        reader = self._reader()
        candidates = cache.cache_candidates(reader.files, self._cache_dir)
        found = cache.find(candidates, cache_key(reader, self._settings))
        if found is None:
            raise FileNotFoundError(
                f"no encoded form of {self._path} in {[str(folder) for folder in candidates]}; call prepare_data() "
                "first, and on several machines set cache_dir to a shared folder"
            )
        self._log = EncodedLog(found)

    @property
    def log(self) -> EncodedLog:
        """The encoded form, with the text behind every id; available after ``setup``."""
        if self._log is None:
            raise RuntimeError("the data is not set up; call prepare_data() and setup() first")
        return self._log

    @property
    def features(self) -> tuple[CategoricalFeature, ...]:
        """The categorical features, in the order of the batch's keys."""
        return self.log.meta.features

    @property
    def num_dense(self) -> int:
        """Number of dense inputs."""
        return self.log.meta.num_dense

    @property
    def base_rate(self) -> float:
        """Share of positive training rows."""
        return self.log.base_rate

    def id_counts(self, feature_name: str) -> torch.Tensor:
        """How often every id occurs in the training rows.

        Args:
            feature_name: Name of a categorical feature.

        Returns:
            int64 tensor of shape ``(num_embeddings,)``, falling from id 1 on.
        """
        return torch.from_numpy(self.log.counts(feature_name))

    def _part(self, part: Part) -> RowSource:
        return self.log.part(part)


class SyntheticClickLogDataModule(_BatchDataModule):
    """A click log that is made up while it is read, with a known best AUC. Nothing is stored.

    Args:
        log: What to make up.
        batch_size: Rows per batch and process.
        shuffle: Whether training rows come in another order every epoch. Rows are independent of each other, so that
            the order of the stream is as good as any, and the only one in which a drift can be seen.
        num_workers: Worker processes per loader.

    Example:
        >>> data = SyntheticClickLogDataModule(SyntheticClickLog(num_rows=1000, num_embeddings=(10, 20)), batch_size=4)
        >>> data.prepare_data()
        >>> data.setup("fit")
        >>> dense, sparse, label = next(iter(data.train_dataloader()))
        >>> sparse.keys(), label.shape
        (['feature_0', 'feature_1'], torch.Size([4]))
    """

    def __init__(
        self,
        log: SyntheticClickLog = SyntheticClickLog(),  # noqa: B008 - frozen
        batch_size: int = 2048,
        shuffle: bool = False,
        num_workers: int = 0,
    ) -> None:
        """Take the settings; nothing is read yet."""
        super().__init__(batch_size=batch_size, shuffle=shuffle, seed=log.seed, num_workers=num_workers)
        self.log = log

    @property
    def features(self) -> tuple[CategoricalFeature, ...]:
        """The categorical features, in the order of the batch's keys."""
        return self.log.features

    @property
    def num_dense(self) -> int:
        """Number of dense inputs."""
        return self.log.num_dense

    @property
    def base_rate(self) -> float:
        """Expected share of positive rows."""
        return self.log.base_rate

    @property
    def best_auc(self) -> float:
        """AUC on the test rows of a model that knows the planted probabilities."""
        return self.log.best_auc()

    def id_counts(self, feature_name: str) -> torch.Tensor:
        """How often every id is expected in the training rows.

        Args:
            feature_name: Name of a categorical feature.

        Returns:
            int64 tensor of shape ``(num_embeddings,)``, falling from id 1 on.
        """
        return torch.from_numpy(self.log.expected_counts(feature_name))

    def _part(self, part: Part) -> RowSource:
        return self.log.part(part)
