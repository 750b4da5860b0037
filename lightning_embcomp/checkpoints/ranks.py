"""Steps that the ranks of a run take together, where the failure of one is an error on all."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist

from lightning_embcomp.checkpoints.errors import CheckpointSaveError

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the slowest one."""

_group: tuple[dist.ProcessGroup, timedelta, dist.ProcessGroup] | None = None
"""The default process group, and the timeout and the group for saving that belong to it."""


def saving_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Connect all ranks for saving checkpoints, over gloo whatever the training uses.

    All ranks call it together, best early: a rank that dies afterwards breaks its connections, which the others see
    within seconds. One that hangs, or whose host loses power, breaks none, and is noticed after the timeout.

    Args:
        timeout: How long a save waits for the slowest rank; by default that of the group there is, or 30 minutes.

    Returns:
        The group, the same in later calls; None without a default process group.
    """
    global _group
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    if _group is None or _group[0] is not world or timeout not in (None, _group[1]):
        if dist.get_backend() == "gloo":
            dist.barrier()  # raises at once if a rank is dead already; connecting to it would wait for the timeout
        timeout = timeout or DEFAULT_TIMEOUT
        _group = world, timeout, dist.new_group(backend="gloo", timeout=timeout)
    return _group[2]


class Ranks:
    """All ranks of a run while they save a checkpoint, or the only process.

    Args:
        subject: What errors are about, for example the checkpoint's path.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.group = saving_group()
        self.rank = dist.get_rank(self.group) if self.group else 0
        self.size = dist.get_world_size(self.group) if self.group else 1

    def all(self, work: Callable[[], T]) -> list[T]:
        """Run something on every rank.

        Args:
            work: What to run here; its result has to be picklable.

        Returns:
            Results in order of rank.

        Raises:
            CheckpointSaveError: On every rank, if it failed on one.
        """
        own: BaseException | None = None
        outcome: Any
        try:
            outcome = work()
        except BaseException as error:  # reported to the others first, then raised
            own, outcome = error, _Failure(describe(error, self.rank))
        outcomes = self._exchange(outcome)
        failures = [found.text for found in outcomes if isinstance(found, _Failure)]
        if own is not None and not isinstance(own, Exception):
            raise own  # an interrupt of this process stays one
        if failures:
            self.fail(failures, own)
        return cast(list[T], outcomes)

    def first(self, work: Callable[[], T]) -> T:
        """Run something on rank 0 alone.

        Args:
            work: What to run there; its result has to be picklable.

        Returns:
            The result, on every rank.

        Raises:
            CheckpointSaveError: On every rank, if it failed.
        """
        return cast(T, self.all(work if self.rank == 0 else lambda: None)[0])

    def fail(self, failures: list[str], cause: BaseException | None = None) -> NoReturn:
        """Raise the error that all ranks raise.

        Args:
            failures: What happened, per rank.
            cause: This rank's own error.

        Raises:
            CheckpointSaveError: Always.
        """
        shown = [*failures[:3], f"and on {len(failures) - 3} more ranks"] if len(failures) > 4 else failures
        raise CheckpointSaveError(
            f"{self.subject}: the checkpoint was not written: {'; '.join(shown)}. An earlier checkpoint of that name is"
            " as it was"
        ) from cause

    def lost(self, error: BaseException) -> NoReturn:
        """Give up after a connection broke, so that no rank goes on waiting for another.

        Args:
            error: What the process group raised.

        Raises:
            CheckpointSaveError: Always.
        """
        global _group
        if self.group is not None:
            # Closes the connections: ranks that wait for this one see that, and give up as well.
            dist.destroy_process_group(self.group)
            self.group = _group = None
        # Gloo names its source file first, and speculates afterwards.
        reason = re.sub(r"^\[[^\]]*\]\s*", "", _first_line(error)).partition(". ")[0]
        raise CheckpointSaveError(
            f"{self.subject}: saving the checkpoint was given up: rank {self.rank} lost contact, another rank died or"
            f" hangs ({reason}). Under that name is the earlier checkpoint, or the new one if it was complete already"
        ) from error

    def _exchange(self, value: Any) -> list[Any]:  # noqa: ANN401 - whatever the work gives
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError as error:
            self.lost(error)
        return found


class _Failure:
    """Travels in the place of a result."""

    def __init__(self, text: str) -> None:
        self.text = text


def describe(error: BaseException, rank: int) -> str:
    """Say in one line what happened to this rank.

    Args:
        error: What was raised.
        rank: This rank.

    Example:
        >>> describe(OSError(28, "No space left on device"), rank=0).partition(": ")[2]
        'OSError: [Errno 28] No space left on device'
    """
    if isinstance(error, CheckpointSaveError):
        return str(error)  # says itself which ranks it is about
    found = _system_error(error) or error
    return f"rank {rank} on {socket.gethostname()}: {type(found).__name__}: {_first_line(found)}"


def _system_error(error: BaseException) -> OSError | None:
    """The error of the file system behind an error: on a full disk, PyTorch's own says "unexpected pos" only."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
