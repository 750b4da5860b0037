"""Checkpoints of a sharded run: written by all processes, read by any number of them."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_embcomp.checkpoints import (
    COMPRESSED,
    STATE_DICT,
    CheckpointReader,
    is_checkpoint,
    read_common,
    read_rank,
    remove_checkpoint,
    save_checkpoint,
    world_size_of,
)
from lightning_embcomp.strategies.base import ShardsTables
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.fused_state import fused_state, load_fused_state, load_rates, rates
from lightning_embcomp.strategies.optimizer_state import (
    TablePlace,
    load_state,
    plain_parts,
    relink,
    save_state,
    table_places,
)
from lightning_embcomp.strategies.plain_file import load_plain_optimizer, load_plain_weights, open_plain_file
from lightning_embcomp.strategies.swapping import without

OPTIMIZER = "optimizer/"
"""Before the names of dense optimizers' state in a checkpoint; the rest is ``number/parameter/state``."""

_READER, _DENSE, _RATES, _RNG, _PLAIN = "_reader", "dense_optimizers", "fused_rates", "rng", "_plain"
_log = logging.getLogger(__name__)


class DistributedCheckpoints(ShardsTables):
    """The part of the strategy that saves and loads.

    Attributes:
        weights_only: Whether objects of unknown classes in a checkpoint are refused.
    """

    weights_only: bool
    _checkpoint: dict[str, Any] | None = None
    """The checkpoint that is being loaded, while Lightning hands parts of it back to us."""
    _rng: dict[str, Any] | None = None
    """Random numbers' state that waits for the first batch."""

    @property
    def _self_saving(self) -> dict[str, Any]:
        return {path: module for path, module in self.sharded_modules.items() if hasattr(module, "distributed_state")}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights are read into shards."""
        return True

    # Saving --------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """State of the module; sharded tables are ``ShardedTensor``. Modules that save themselves are left out."""
        assert self.lightning_module is not None
        with without(self.lightning_module, self._self_saving):
            return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State of an optimizer by parameter name: tensors, with sharded ones as parts, and the rest.

        Args:
            optimizer: One of ``configure_optimizers``.
        """
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        places = table_places(self.sharded_modules)
        state: dict[str, Any] = {}
        for name, part in plain_parts([plain]):
            tensors, rest = save_state(part, self._names(), places)
            state[name.partition(".")[2]] = {"tensors": tensors, "rest": rest}
        return state

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | os.PathLike[str],
        storage_options: Any | None = None,  # noqa: ANN401 - see Lightning
    ) -> None:
        """Write a checkpoint directory with all processes.

        Args:
            checkpoint: What Lightning has collected on this process.
            filepath: The directory; an earlier checkpoint there is replaced when the new one is complete.
            storage_options: Has no effect, and is refused.

        Raises:
            TypeError: If there are storage options.
        """
        if storage_options is not None:
            raise TypeError("storage_options have no effect on a checkpoint that all processes write to a directory")
        values = dict(checkpoint)
        state = values.pop("state_dict", {})
        tensors = {f"{STATE_DICT}{key}": value for key, value in state.items() if _is_tensor(value)}
        values["state_dict"] = {key: value for key, value in state.items() if not _is_tensor(value)}
        for path, module in self._self_saving.items():
            found = module.distributed_state()
            tensors.update({f"{COMPRESSED}{path}/{key}": value for key, value in found.items()})
        if "optimizer_states" in values:
            self._add_optimizers(values, tensors)
        common, own = _common_and_own(values)
        own[_RNG] = _collect_rng_states(include_cuda=self.root_device.type == "cuda")
        save_checkpoint(filepath, tensors=tensors, common=common, per_rank=own)

    def _add_optimizers(self, values: dict[str, Any], tensors: dict[str, Any]) -> None:
        rest: dict[str, Any] = {}
        for i, state in enumerate(values.pop("optimizer_states")):
            for part, found in state.items():
                number = f"{i}.{part}" if part else str(i)
                tensors.update({f"{OPTIMIZER}{number}/{key}": value for key, value in found["tensors"].items()})
                rest[number] = found["rest"]
        tensors.update(fused_state(self.sharded_modules))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (rest, rates(self.sharded_modules)))
        for others, _ in gathered[1:]:
            for number, other in others.items():
                for name, state in other["values"].items():
                    gathered[0][0][number]["values"].setdefault(name, state)
        values[_DENSE] = gathered[0][0]
        values[_RATES] = {table: entry for _, found in gathered for table, entry in found.items()}
        # For who expects it there; the state itself is stored by parameter.
        values["optimizer_states"] = []

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Delete a checkpoint.

        Args:
            filepath: Directory or file.
        """
        if self.is_global_zero:
            remove_checkpoint(filepath)

    # Loading -------------------------------------------------------------------------------------------------------

    def load_checkpoint(
        self,
        checkpoint_path: str | os.PathLike[str],
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Open a checkpoint directory of any number of processes, or a file of an unsharded run.

        Args:
            checkpoint_path: Directory or file.
            weights_only: Whether to refuse objects of unknown classes; the strategy's setting by default.

        Returns:
            Everything but the tensors, which are read in place later.

        Raises:
            CheckpointError: If it is missing or damaged, or holds refused objects.
        """
        safe = self.weights_only if weights_only is None else weights_only
        if not is_checkpoint(checkpoint_path) and os.path.isfile(checkpoint_path):
            checkpoint = open_plain_file(checkpoint_path, weights_only=safe)
            self._checkpoint = {_PLAIN: checkpoint}
            return checkpoint
        checkpoint = read_common(checkpoint_path, weights_only=safe)
        if world_size_of(checkpoint_path) == dist.get_world_size():
            own = read_rank(checkpoint_path, dist.get_rank(), weights_only=safe) or {}
            self._rng = own.pop(_RNG, None)
            checkpoint.update(own)
        else:
            self._rng = None
            _log.info(
                "%s was written by %d processes and is read by %d: random numbers, and callbacks and loaders with state"
                " of their own on each process, go on from those of process 0",
                checkpoint_path,
                world_size_of(checkpoint_path),
                dist.get_world_size(),
            )
        self._checkpoint = {_READER: CheckpointReader(checkpoint_path), **checkpoint}
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read weights into dense parameters and shards.

        Args:
            checkpoint: From :meth:`load_checkpoint`.
            strict: Whether missing and unexpected names are errors.

        Raises:
            ShardingError: If names differ and ``strict``.
        """
        assert self.lightning_module is not None and self._checkpoint is not None
        state = {key: value for key, value in self.lightning_module_state_dict().items() if _is_tensor(value)}
        if _PLAIN in self._checkpoint:
            load_plain_weights(self.lightning_module, state, self._self_saving, checkpoint["state_dict"], strict)
        else:
            reader: CheckpointReader = self._checkpoint[_READER]
            saved = {name.removeprefix(STATE_DICT) for name in reader.keys() if name.startswith(STATE_DICT)}
            # Tables that were not compressed yet, for modules that read them by themselves.
            plain = {key for key in saved for path in self._self_saving if key.startswith(f"{path}.")}
            if strict:
                check_names(state.keys(), saved - plain)
            reader.read_into({f"{STATE_DICT}{key}": tensor for key, tensor in state.items() if key in saved})
            for path, module in self._self_saving.items():
                was_plain = any(key.startswith(f"{path}.") for key in plain)
                module.load_distributed_state(f"{STATE_DICT}{path}." if was_plain else f"{COMPRESSED}{path}/", reader)
            extra = checkpoint.get("state_dict") or {}
            if extra:
                with without(self.lightning_module, self.sharded_modules):
                    self.lightning_module.load_state_dict(extra, strict=False)
        self._forget_caches()

    def _forget_caches(self) -> None:
        """Tables with a cache on the device read the new weights, not the cached ones."""
        for module in self.sharded_modules.values():
            for lookup in getattr(module, "_lookups", ()):
                inner = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
                if hasattr(inner, "purge"):
                    inner.purge()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the state of dense and fused optimizers back.

        Args:
            checkpoint: From :meth:`load_checkpoint`.

        Raises:
            ShardingError: If the checkpoint has no such state.
        """
        assert self._checkpoint is not None
        modules = self.sharded_modules
        places, names = table_places(modules), self._names()
        if _PLAIN in self._checkpoint:
            load_plain_optimizer(self.optimizers, checkpoint, self._parameter_order, names, places, modules)
            relink(self.optimizers)
            return
        reader: CheckpointReader = self._checkpoint[_READER]
        saved = self._checkpoint.get(_DENSE)
        if saved is None:
            raise ShardingError("the checkpoint holds weights alone, so no run can be resumed from it")
        for number, optimizer in plain_parts(self.optimizers):
            if number not in saved:
                raise ShardingError(
                    f"the checkpoint has no optimizer number {number}, which configure_optimizers makes: build the"
                    " optimizers as in the run that was saved"
                )
            state = _read_state(reader, f"{OPTIMIZER}{number}/", set(names.values()), places)
            for name, values in saved[number]["values"].items():
                if name not in places or name in state:
                    state.setdefault(name, {}).update(values)
            load_state(optimizer, names, state, saved[number]["groups"])
        relink(self.optimizers)
        load_fused_state(modules, reader)
        load_rates(modules, self._checkpoint.get(_RATES, {}))

    # Random numbers ------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Go on with the random numbers of the checkpoint."""
        super().on_train_start()
        self._checkpoint = None
        if self._rng is not None:
            _set_rng_states(self._rng)
            assert self.lightning_module is not None
            if not self.lightning_module.trainer.fit_loop.restarted_mid_epoch:
                self._rng = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Before the first batch in the middle of an epoch, undo what starting its loader has drawn.

        Args:
            batch: The batch.
            batch_idx: Its number.
        """
        super().on_train_batch_start(batch, batch_idx)
        if self._rng is not None:
            _set_rng_states(self._rng)
            self._rng = None


def check_names(wanted: Any, saved: Any) -> None:  # noqa: ANN401 - collections of names
    """Compare names of a module with those of a checkpoint.

    Args:
        wanted: Names in the module.
        saved: Names in the checkpoint.

    Raises:
        ShardingError: If they differ.

    Example:
        >>> check_names({"a"}, {"a"})
    """
    missing, unexpected = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    if missing or unexpected:
        raise ShardingError(
            f"the checkpoint does not fit the module: it lacks {missing[:5] or 'nothing'} and has"
            f" {unexpected[:5] or 'nothing'} beside. Build the module as it was saved, or set strict_loading = False"
        )


def _is_tensor(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor)


def _read_state(
    reader: CheckpointReader, prefix: str, names: set[str], places: Mapping[str, TablePlace]
) -> dict[str, dict[str, Any]]:
    """Read the local part of an optimizer's state, by parameter name."""
    state: dict[str, dict[str, Any]] = {}
    targets: dict[str, Any] = {}
    for entry in sorted(reader.keys()):
        if not entry.startswith(prefix):
            continue
        name, _, key = entry.removeprefix(prefix).rpartition("/")
        if name not in names:
            continue
        shape, dtype = reader.shape(entry), reader.dtype(entry)
        place = places.get(name)
        if place is None or not shape:
            value = torch.empty(shape, dtype=dtype)
            targets[entry] = value
        else:
            value = torch.empty(place.local_shape(shape), dtype=dtype)
            targets[entry] = place.slices(value, entry)
        state.setdefault(name, {})[key] = value
    reader.read_into(targets)
    return state


def _common_and_own(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide entries into those of process 0, and those of this process that differ from them."""
    digests = {key: _digest(value) for key, value in values.items()}
    first: list[Any] = [digests]
    dist.broadcast_object_list(first, src=0)
    own = {key: value for key, value in values.items() if digests[key] is None or first[0].get(key) != digests[key]}
    return dict(values), own


def _digest(value: Any) -> str | None:  # noqa: ANN401
    """A fingerprint; None for what cannot be written, which is for the writer to report."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None
    return hashlib.sha256(buffer.getvalue()).hexdigest()
