"""The exchange of gradients behind the communication hook: dense first, then by thresholds.

Collectives are issued by the thread of the backward pass alone, in the order of the buckets, so that all workers agree
on their order: the header of a bucket when it is ready, its payload when the next one is. On CPU the payload's arrival
is handled by the process group's own threads while backward goes on. On CUDA it is queued to a stream beside that of
the backward pass, and the host waits for headers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_embcomp.methods.dct.buckets import Bucket, Part
from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings, ValueType
from lightning_embcomp.methods.dct.errors import ExchangeError, NonFiniteGradientError
from lightning_embcomp.methods.dct.module import ThresholdedParameter
from lightning_embcomp.methods.dct.selection import (
    HEADER,
    announce_dense,
    keep,
    select,
    select_later,
    waits_at_once,
)
from lightning_embcomp.methods.dct.traffic import Traffic, all_gather_bytes, all_reduce_bytes
from lightning_embcomp.methods.dct.wire import decode, encoded_bytes

# torch 2.13 has another name for it, and warns of the old one.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class GradientExchange:
    """State of the communication hook on one process.

    Args:
        parameters: Trained parameters that DistributedDataParallel reduces, by name; the same on all processes.
        chosen: Names of those that are thresholded.
        density: Share of their entries that is sent.
        feedback: What becomes of the rest.
        thresholds: When thresholds are computed.
        value_type: Type of the values on the wire.
        warmup_steps: First exchanges that are dense.
        group: Process group; None for all processes.
        loss_scale: Returns the factor on the loss of the current step; None if losses are not scaled. With one, a step
            with non-finite gradients leaves the state as it was, since the optimizer skips it.

    Attributes:
        steps: Exchanges so far.
        last: Figures of the last exchange.
        total: Figures of all.
        measure: Whether to compute the norms of the coming exchanges.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        chosen: Sequence[str],
        *,
        density: float,
        feedback: ErrorFeedback,
        thresholds: ThresholdSettings,
        value_type: ValueType,
        warmup_steps: int,
        group: dist.ProcessGroup | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.state = {
            name: ThresholdedParameter(
                name,
                parameters[name].numel(),
                parameters[name].device,
                density=density,
                feedback=feedback,
                thresholds=thresholds,
            )
            for name in chosen
        }
        self._value_type: ValueType = value_type
        self._warmup_steps = warmup_steps
        self._group = group
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._stream: torch.cuda.Stream | None = None
        self._loss_scale = loss_scale
        self._scale = 1.0
        self._unusable = False
        self._waiting: Bucket | None = None
        self._current: list[Bucket] = []
        self.steps = 0
        self.last, self.total = Traffic(), Traffic()
        self.measure = False

    def exchange(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start the exchange of a bucket, and finish that of the one before.

        Raises:
            NonFiniteGradientError: On all processes, if a gradient of any is NaN or infinite and losses are not scaled.
            ExchangeError: If another process is gone.
        """
        if bucket.index() == 0:
            self.settle()
            self._waiting = None
        buffer = bucket.buffer()
        if buffer.is_sparse:
            raise NotImplementedError(
                f"parameter {self._name(bucket.parameters()[0])!r} has sparse gradients, which are not thresholded: use"
                " sparse=False, or shard the table"
            )
        promise: torch.futures.Future[Any] = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else []
        )
        started = time.perf_counter()
        mine = Bucket(buffer, self._parts(bucket), promise, dense=self.steps < self._warmup_steps)
        self._current.append(mine)
        mine.traffic.dense = all_reduce_bytes(buffer.numel() * buffer.element_size(), self._world)
        mine.dense = mine.dense or not mine.thresholded
        header = self._prepare_dense(mine) if mine.dense else self._prepare(mine)
        mine.traffic.selection_seconds += time.perf_counter() - started
        if self._waiting is not None:
            self._proceed(self._waiting)
        self._announce(mine, header)
        self._waiting = mine
        if bucket.is_last():
            self._proceed(mine)
            self._waiting = None
            self.steps += 1
        return promise.then(_unwrap)

    def count(self) -> bool:
        """Add up the figures of an exchange that has ended since the last call; whether there was one."""
        if not self._current:
            return False
        self.last = Traffic()
        for bucket in self._current:
            self.last.add(bucket.traffic)
        self.total.add(self.last)
        self._current = []
        return True

    def settle(self) -> None:
        """Take back the last exchange if the optimizer skipped its step; to be called before the state is read."""
        self.count()
        if self._loss_scale is None:
            return
        # A scaler that has lowered its scale has skipped the step, for whatever reason.
        skipped = self._unusable or self._loss_scale() < self._scale
        for parameter in self.state.values():
            parameter.settle(skipped)
        self._unusable, self._scale = False, self._loss_scale()

    def state_dict(self) -> dict[str, Any]:
        """State of this process."""
        self.settle()
        return {"steps": self.steps, "parameters": {name: p.state_dict() for name, p in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            ValueError: If it holds other parameters, or those of another kind of feedback.
        """
        saved = state["parameters"]
        different = sorted(saved.keys() ^ self.state.keys())
        if different:
            raise ValueError(
                f"the saved state thresholds other parameters; different are {', '.join(map(repr, different))}. Use the"
                " saved settings of parameters and min_numel"
            )
        for name, parameter in self.state.items():
            parameter.load_state_dict(saved[name])
        self.steps = state["steps"]

    def _name(self, parameter: Tensor) -> str:
        return self._names[id(parameter)]

    def _parts(self, bucket: dist.GradBucket) -> list[Part]:
        start = bucket.buffer().storage_offset()
        parts = []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            first = gradient.storage_offset() - start
            name = self._name(parameter)
            parts.append(Part(name, slice(first, first + gradient.numel()), self.state.get(name)))
        return sorted(parts, key=lambda part: part.place.start)

    def _prepare(self, bucket: Bucket) -> Tensor:
        """Select; returns the header."""
        if self._loss_scale is not None:
            for parameter, _ in bucket.thresholded:
                parameter.remember()
        choose = select if waits_at_once(bucket.buffer.device) else select_later
        header = choose(bucket, 1.0 / self._scale, self._value_type)
        if bucket.others:
            bucket.whole = torch.cat([bucket.buffer[place] for place in bucket.others]).div_(self._world)
        return header

    def _prepare_dense(self, bucket: Bucket) -> Tensor:
        # On CPU a sum, which is rarely wrong, and looked into then.
        at_once = waits_at_once(bucket.buffer.device)
        good = at_once and bool(torch.isfinite(bucket.buffer.sum()))
        header = torch.zeros(HEADER, dtype=torch.int32) if good else announce_dense(bucket)
        good = good or not at_once or not bool(header.any())
        for parameter, place in bucket.thresholded:
            if self._loss_scale is not None:
                parameter.remember()
            if good:
                self._send_all(bucket, parameter, place, added=False, weight=1.0 / (self.steps + 1))
        bucket.whole = bucket.buffer.div_(self._world)
        return header

    def _send_all(
        self, bucket: Bucket, parameter: ThresholdedParameter, place: slice, *, added: bool, weight: float
    ) -> None:
        message = parameter.send_all(bucket.gradient(place), 1.0 / self._scale, added=added, weight=weight)
        bucket.buffer[place] = message if self._scale == 1.0 else message * self._scale
        bucket.traffic.entries += parameter.numel
        bucket.traffic.numel += parameter.numel

    def _announce(self, bucket: Bucket, header: Tensor) -> None:
        """Issue the header, and the exchange of what is sent whole."""
        header = header.to(bucket.buffer.device)
        bucket.header = header.new_empty(self._world * HEADER)
        bucket.held.append(header)
        bucket.header_work = self._issue(_all_gather, bucket.header, header)
        bucket.traffic.moved(all_gather_bytes(4 * HEADER, self._world))
        if bucket.whole is not None:
            self._reduce(bucket, bucket.whole)

    def _reduce(self, bucket: Bucket, whole: Tensor) -> None:
        bucket.whole_work = self._issue(dist.all_reduce, whole)
        bucket.traffic.moved(all_reduce_bytes(whole.numel() * whole.element_size(), self._world))

    def _proceed(self, bucket: Bucket) -> None:
        """Read the headers of a bucket, and issue the rest of its exchange."""
        headers, figures = self._read(bucket)
        bad = next(((rank, position) for rank, (_, position, _, _) in enumerate(headers) if position), None)
        if bad is not None and self._loss_scale is None:
            raise NonFiniteGradientError(
                f"the gradient of parameter {bucket.parts[bad[1] - 1].name!r} holds NaN or infinity on rank {bad[0]},"
                f" in exchange {self.steps + 1}. Look for bad values in that process's batch, or lower the learning"
                " rate"
            )
        self._unusable = self._unusable or bad is not None
        if bucket.candidates is not None and bad is None:
            started = time.perf_counter()
            keep(bucket, figures, headers[self._rank][3], self._value_type)
            bucket.traffic.selection_seconds += time.perf_counter() - started
        if bucket.whole_work is not None and not bucket.dense:
            with self._beside(bucket.buffer.device):
                self._wait(bucket.whole_work)
        if bucket.dense:
            # Estimates become means over the warm-up: the noise of its last batch would stay for 1 / density steps.
            weight = 1.0 / (self.steps + 1)
            self._on_arrival(bucket, bucket.whole_work, partial(self._take_whole, bucket, weight))
        elif bad is not None:
            bucket.buffer.fill_(torch.inf)  # on all processes, so that all of them skip the step
            bucket.finish(bucket.buffer)
        elif any(wants_dense for _, _, wants_dense, _ in headers):
            for parameter, place in bucket.thresholded:
                self._send_all(bucket, parameter, place, added=True, weight=1.0)
            self._reduce(bucket, bucket.buffer.div_(self._world))
            self._on_arrival(bucket, bucket.whole_work, partial(self._take_whole, bucket, 1.0))
        else:
            self._send(bucket, [(entries, exponent) for entries, _, _, exponent in headers])

    def _read(self, bucket: Bucket) -> tuple[list[list[int]], list[float]]:
        """Headers of all processes, and the figures of this one: the only time that the host waits for the device.

        Beside the backward pass it waits for the headers alone, not for what that has queued since.
        """
        assert bucket.header is not None and bucket.header_work is not None
        with self._beside(bucket.header.device):
            self._wait(bucket.header_work)
            numbers = bucket.header
            if bucket.figures is not None:
                numbers = torch.cat([numbers.double(), bucket.figures])
            values = numbers.tolist()
        size = self._world * HEADER
        return [list(map(int, values[i : i + HEADER])) for i in range(0, size, HEADER)], values[size:]

    def _send(self, bucket: Bucket, contents: list[tuple[int, int]]) -> None:
        """Issue the exchange of the selected entries."""
        assert bucket.indices is not None and bucket.message is not None
        message, traffic = bucket.message, bucket.traffic
        started = time.perf_counter()
        for (parameter, place), indices, values in zip(
            bucket.thresholded,
            bucket.indices.split(bucket.counts),
            message.values.split(bucket.counts),
            strict=True,
        ):
            parameter.sent(indices - place.start, values)
            traffic.entries += values.numel()
            traffic.numel += parameter.numel
            if self.measure:
                gradient, factor = bucket.gradient(place), 1.0 / self._scale
                traffic.gradient_norm += float((gradient.double() * factor).square().sum())
                traffic.unsent_norm += parameter.unsent(gradient, factor, values)
        numel = bucket.buffer.numel()
        longest = max(encoded_bytes(entries, numel, self._value_type) for entries, _ in contents)
        data = torch.nn.functional.pad(message.data, (0, longest - message.data.numel()))
        arrived = data.new_empty(self._world * longest)
        if data.device.type != "cpu":
            bucket.held += [data, arrived]
        traffic.selection_seconds += time.perf_counter() - started
        work = self._issue(_all_gather, arrived, data)
        traffic.moved(all_gather_bytes(longest, self._world))
        self._on_arrival(bucket, work, partial(self._take, bucket, arrived.view(self._world, longest), contents))

    def _take(self, bucket: Bucket, arrived: Tensor, contents: list[tuple[int, int]]) -> None:
        """Average what was selected by all processes, in the order of their ranks, so that all get the same bits."""
        buffer = bucket.buffer
        total = buffer.zero_() if buffer.dtype == torch.float32 else torch.zeros_like(buffer, dtype=torch.float32)
        for data, (entries, exponent) in zip(arrived, contents, strict=True):
            indices, values = decode(data, entries, buffer.numel(), self._value_type, exponent)
            total.index_add_(0, indices, values.div_(self._world))
        for parameter, place in bucket.thresholded:
            parameter.received(total[place])
        if self._scale != 1.0:
            total.mul_(self._scale)
        if total is not buffer:
            buffer.copy_(total)
        if bucket.whole is not None:
            sizes = [place.stop - place.start for place in bucket.others]
            for place, whole in zip(bucket.others, bucket.whole.split(sizes), strict=True):
                buffer[place] = whole

    def _take_whole(self, bucket: Bucket, weight: float) -> None:
        for parameter, place in bucket.thresholded:
            parameter.received_all(bucket.gradient(place) / self._scale, weight)

    def _on_arrival(self, bucket: Bucket, work: dist.Work | None, then: Callable[[], None]) -> None:
        """Finish the bucket when a collective is done."""
        assert work is not None

        def finish(future: torch.futures.Future[Any] | None = None) -> None:
            try:
                if future is not None:
                    self._checked(future.value)
                then()
            except BaseException as error:  # raised by whoever waits for the bucket: nobody waits for this thread
                bucket.finish(error)
            else:
                bucket.finish(bucket.buffer)

        if bucket.buffer.device.type == "cpu":
            work.get_future().add_done_callback(finish)
        else:
            with self._beside(bucket.buffer.device):
                self._wait(work)  # makes the stream wait, not this thread
                finish()

    def _beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """Queue what follows to a stream that waits for collectives, while the backward pass goes on."""
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return torch.cuda.stream(self._stream)

    def _issue(self, collective: Callable[..., Any], *tensors: Tensor) -> dist.Work:
        work: dist.Work = self._checked(partial(collective, *tensors, group=self._group, async_op=True))
        return work

    def _wait(self, work: dist.Work) -> None:
        self._checked(work.wait)

    def _checked(self, communicate: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the call returns
        """Say what the errors of process groups usually mean."""
        try:
            return communicate()
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {dist.get_rank(self._group)} of {self._world} could not exchange gradients (exchange"
                f" {self.steps + 1}): another process has ended or does not answer; its own output says why. The"
                f" process group says: {error}"
            ) from error


def _unwrap(future: torch.futures.Future[Any]) -> Tensor:
    outcome = future.value()
    if isinstance(outcome, BaseException):
        raise outcome
    result: Tensor = outcome
    return result
