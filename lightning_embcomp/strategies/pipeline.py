"""Send the ids of the next batch to their tables while this one trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.strategies.errors import ShardingError

Place = tuple[Hashable, ...]
"""Keys, indices and attributes that lead to features inside a batch."""


def features_in(batch: Any, place: Place = ()) -> Iterator[tuple[Place, KeyedJaggedTensor]]:  # noqa: ANN401
    """Find the features in a batch.

    Args:
        batch: Tuples, lists, dictionaries and dataclasses in each other.
        place: Where ``batch`` is itself.

    Example:
        >>> import torch
        >>> ids = KeyedJaggedTensor(["user"], torch.tensor([1, 2]), lengths=torch.tensor([2]))
        >>> [place for place, _ in features_in({"ids": (None, ids)})]
        [('ids', 1)]
    """
    if isinstance(batch, KeyedJaggedTensor):
        yield place, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from features_in(value, (*place, key))
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            yield from features_in(value, (*place, index))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from features_in(getattr(batch, field.name), (*place, field.name))


class Lookahead:
    """A loader that knows the batch after the one it has handed out.

    Args:
        loader: The loader.

    Attributes:
        following: The next batch; None at the end.

    Example:
        >>> loader = Lookahead([1, 2])
        >>> [(batch, loader.following) for batch in loader]
        [(1, 2), (2, None)]
    """

    def __init__(self, loader: Any) -> None:  # noqa: ANN401 - any iterable
        self.loader = loader
        self.following: Any = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of the loader
        return getattr(self.__dict__["loader"], name)

    def __len__(self) -> int:
        return len(self.loader)

    def _before_fetch(self) -> None:
        """Called while the loader's state still stands before the batch that is fetched ahead."""

    def __iter__(self) -> Iterator[Any]:
        iterator, end = iter(self.loader), object()
        current = next(iterator, end)
        while current is not end:
            self._before_fetch()
            following = next(iterator, end)
            self.following = None if following is end else following
            yield current
            current = following


class StatefulLookahead(Lookahead):
    """The same for a loader with state, which must not count the batch that was fetched ahead."""

    _state: dict[str, Any] | None = None

    def _before_fetch(self) -> None:
        self._state = self.loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """State of the loader after the batches that were handed out."""
        return self.loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: As from :meth:`state_dict`.
        """
        self._state = None
        self.loader.load_state_dict(state)


class InputPipeline:
    """Starts the exchange of the next batch's ids, so that it overlaps with this batch's forward and backward pass.

    The first step shows which features of a batch go to which collection; only features that a module hands on as
    they are in the batch can be sent ahead.

    Args:
        modules: Sharded collections, by path.

    Raises:
        ShardingError: If a collection is not one of TorchRec's.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules: dict[int, tuple[str, ShardedModule[Any, Any, Any, Any]]] = {}
        for path, module in modules.items():
            if not isinstance(module, ShardedModule):
                raise ShardingError(
                    f"pipeline='sparse_dist' cannot send ids ahead to {path!r}, a {type(module).__name__}: use 'none'"
                )
            self._modules.setdefault(id(module), (path, module))
        self._lookahead: Lookahead | None = None
        self._moved: tuple[Any, Any] | None = None
        self._places: dict[int, Place | None] = {}
        self._here: dict[int, Place] = {}
        self._seen: set[int] = set()
        self._started: dict[tuple[int, int], tuple[Any, Any]] = {}
        for key, (_, module) in self._modules.items():
            module.forward = self._forward_of(key, module)

    def wrap(self, loader: Any) -> Lookahead:  # noqa: ANN401
        """Look one batch ahead in the training loader.

        Args:
            loader: The loader.
        """
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._lookahead = StatefulLookahead(loader) if stateful else Lookahead(loader)
        return self._lookahead

    def moved(self, batch: Any) -> Any | None:  # noqa: ANN401
        """The batch on the device, if it has been moved ahead.

        Args:
            batch: As the loader gave it.
        """
        ahead, self._moved = self._moved, None
        return ahead[1] if ahead is not None and ahead[0] is batch else None

    def start_step(self, batch: Any, move: Callable[[Any], Any]) -> None:  # noqa: ANN401
        """Before the forward pass of a batch: move the next one, and send its ids ahead.

        Args:
            batch: The batch that is about to be trained on, on the device.
            move: Moves a batch.
        """
        self._here = {id(features): place for place, features in features_in(batch)}
        self._seen = set()
        for stale in [key for key in self._started if key[1] not in self._here]:
            self._started.pop(stale)[1].wait()  # of a batch that was skipped
        following = self._lookahead.following if self._lookahead is not None else None
        if following is None:
            return
        on_device = move(following)
        self._moved = (following, on_device)
        features = dict(features_in(on_device))
        for key, place in self._places.items():
            if place is not None and place in features:
                module = self._modules[key][1]
                context = module.create_context()
                # The first wait is for the sizes; the ids themselves travel while this batch trains.
                ids = module.input_dist(context, features[place]).wait()
                self._started[key, id(features[place])] = (context, ids)

    def end_step(self) -> None:
        """After a step: see whether anything can be sent ahead.

        Raises:
            ShardingError: If not.
        """
        self._here = {}
        if self._places and all(place is None for place in self._places.values()):
            named = ", ".join(repr(self._modules[key][0]) for key in self._places)
            raise ShardingError(
                f"pipeline='sparse_dist' has nothing to send ahead: {named} looks up features that are not in the batch"
                " as they are, or looks up several times per step. Use pipeline='none'"
            )

    def stop(self) -> None:
        """Give the collections their own forward pass back, and wait for ids that nobody will look up."""
        for _, ids in self._started.values():
            ids.wait()
        self._started.clear()
        for _, module in self._modules.values():
            module.__dict__.pop("forward", None)

    def _forward_of(self, key: int, module: ShardedModule[Any, Any, Any, Any]) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - TorchRec's
            features = args[0] if args else None
            if self._here:  # in a training step
                place = self._here.get(id(features)) if not kwargs and len(args) == 1 else None
                self._places.setdefault(key, place)
                if key in self._seen:
                    self._places[key] = None  # looked up twice in a step: what is sent ahead serves one lookup
                self._seen.add(key)
            ahead = self._started.pop((key, id(features)), None)
            if ahead is None:
                return own(*args, **kwargs)
            context, ids = ahead
            return module.compute_and_output_dist(context, ids.wait())

        return forward
