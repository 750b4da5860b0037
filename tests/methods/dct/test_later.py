"""Selection that does not wait for a GPU: as on CPU, to the bit, and rehearsed on tensors without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_embcomp.kernels.threshold import SMALLEST, select_packed
from lightning_embcomp.methods.dct import functional, selection
from lightning_embcomp.methods.dct.buckets import Bucket, Part
from lightning_embcomp.methods.dct.codecs import PooledThresholding, comm_codecs
from lightning_embcomp.methods.dct.codecs.exchange import Exchange
from lightning_embcomp.methods.dct.config import ValueType
from lightning_embcomp.methods.dct.functional import (
    largest,
    largest_on_device,
    sampled_threshold,
    threshold_on_device,
)
from lightning_embcomp.methods.dct.wire import decode, encode, shared_exponent
from tests.triton_process import run_interpreted

from .later import KINDS, SETTINGS, compare, parameter

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_are_one_selection(kind: str, name: str) -> None:
    crowded, dense = compare(kind, name)
    assert crowded, "the steps never meet a lack of room"
    assert bool(dense) == ("max_overshoot" in SETTINGS[name])


def test_kernels_of_a_gpu_select_what_the_cpu_does() -> None:
    """20 steps by Triton's interpreter."""
    assert all(run_interpreted("tests.methods.dct.interpreted").values())


@pytest.mark.parametrize("wanted", [1, 333, 2000, 20_000])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_thresholds_on_a_device_are_those_of_the_cpu(wanted: int, bad: float | None) -> None:
    source = torch.Generator().manual_seed(wanted)
    grad, residual, estimate = (torch.randn(20_000, generator=source) for _ in range(3))
    if bad is not None:
        grad[torch.randperm(20_000, generator=source)[:7000]] = bad
    settings: dict[str, Any] = {"factor": 0.5, "gain": 0.25, "wanted": wanted, "seed": 3}
    for samples in (1000, 5000, 100_000):
        for state in ((None, None), (residual, None), (None, estimate), (residual, estimate)):
            found = threshold_on_device(grad, *state, **settings, samples=samples)
            assert found.dtype == torch.float32 and found.shape == (1,)
            assert found.item() == sampled_threshold(grad, *state, **settings, samples=samples)


@pytest.mark.parametrize("value", [0.0, 1e-40, torch.nan, -torch.inf])
def test_thresholds_of_nothing(value: float) -> None:
    grad = torch.full((50,), value)
    settings: dict[str, Any] = {"factor": 1.0, "gain": 1.0, "wanted": 5, "samples": 1000, "seed": 0}
    assert threshold_on_device(grad, None, None, **settings).tolist() == [SMALLEST]


@pytest.mark.parametrize("count", [1, 7, 50])
def test_the_largest_of_equal_values_are_those_of_the_cpu(count: int) -> None:
    values = torch.randint(-5, 6, (50,), generator=torch.Generator().manual_seed(0)).float()
    (mine, smallest), (theirs, wanted) = largest_on_device(values, count), largest(values, count)
    assert torch.equal(mine, theirs) and smallest.tolist() == [wanted]


@pytest.mark.parametrize("value_type", ["fp32", "fp16", "bf16"])
def test_shared_exponents(value_type: ValueType) -> None:
    for size in (SMALLEST, 1e-30, 0.75, 1.0, 3e38):
        values = torch.tensor([size / 4 if size > SMALLEST else size, -size])
        exponent = encode(torch.arange(2, dtype=torch.int32), values, 10, value_type).exponent
        assert shared_exponent(values.abs().amax(), torch.tensor(2), value_type).item() == exponent
    assert shared_exponent(torch.tensor(0.0), torch.tensor(0), value_type).item() == 0


def test_what_was_added_is_not_added_again() -> None:
    source = torch.Generator().manual_seed(0)
    grad, residual, estimate = (torch.randn(500, generator=source) for _ in range(3))
    for held in (None, estimate):
        kept = residual.clone()
        gain = 1.0 if held is None else 0.25
        first = select_packed(grad, kept, held, factor=0.5, gain=gain, threshold=0.8, capacity=500)
        before = kept.clone()
        again = select_packed(grad, kept, held, factor=0.5, gain=gain, threshold=0.8, capacity=500, added=True)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        assert torch.equal(kept, before) and not torch.equal(kept, residual)


def bucket_of(buffer: Tensor, kind: str, settings: dict[str, Any]) -> Bucket:
    """Two thresholded parameters around one that is sent whole."""
    parts = [
        Part("first", slice(0, 3000), parameter(kind, settings, device=buffer.device)),
        Part("whole", slice(3000, 3100), None),
        Part("last", slice(3100, 90_000), parameter(kind, settings, numel=86_900, device=buffer.device)),
    ]
    promise: torch.futures.Future[Any] = torch.futures.Future()
    return Bucket(buffer, parts, promise, dense=False)


@pytest.mark.parametrize("value_type", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_headers_of_both_ways_are_the_same(name: str, value_type: ValueType) -> None:
    """Bad parts, none at all, and whatever else a header tells."""
    buffers = [torch.randn(90_000, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    buckets = [bucket_of(buffer, "ec", SETTINGS[name]) for buffer in buffers]
    for step, (size, bad) in enumerate(((1.0, ()), (1e-3, ()), (1e3, ()), (0.0, ()), (1.0, (3050, 89_999)))):
        for buffer in buffers:
            buffer.copy_(size * torch.randn(90_000, generator=torch.Generator().manual_seed(step)))
            buffer[list(bad)] = torch.nan
        wanted = selection.select(buckets[0], 0.5, value_type)
        found = selection.select_later(buckets[1], 0.5, value_type)
        if bad:
            assert wanted[1].item() == found[1].item() == 2
            return
        assert torch.equal(wanted, found) or wanted[2].item() == found[2].item() == 1
        figures = buckets[1].figures
        assert figures is not None
        selection.keep(buckets[1], figures.tolist(), int(found[3]), value_type)
        for bucket in buckets:
            if wanted[2]:
                bucket.message = bucket.indices = None
                bucket.counts = []
        assert buckets[0].counts == buckets[1].counts
        one, two = (bucket.message for bucket in buckets)
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert torch.equal(one.data, two.data) and torch.equal(one.values, two.values)
            assert one.exponent == two.exponent


def test_headers_of_dense_steps() -> None:
    bucket = bucket_of(torch.zeros(90_000), "ec", {})
    assert selection.announce_dense(bucket).tolist() == [0, 0, 0, 0]
    bucket.buffer[[3099, 3100]] = torch.inf
    assert selection.announce_dense(bucket).tolist() == [0, 2, 0, 0]


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """The mode in which there seems to be a GPU: telling the host a value, or mixing devices, is an error."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    def place(tensor: Tensor, key: Any) -> Tensor:
        """Square brackets ask for a device guard, which PyTorch without CUDA does not have; so does ``copy_``."""
        for dim, part in enumerate(key if isinstance(key, tuple) else (key,)):
            if isinstance(part, slice):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop)
            else:
                tensor = torch.ops.aten.index.Tensor(tensor, [None] * dim + [part])
        return tensor

    def copy(tensor: Tensor, source: Tensor) -> Tensor:
        return torch.ops.aten.copy_.default(tensor, source)

    monkeypatch.setattr(FakeTensor, "__getitem__", place)
    monkeypatch.setattr(FakeTensor, "__setitem__", lambda tensor, key, value: copy(place(tensor, key), value))
    monkeypatch.setattr(FakeTensor, "copy_", copy)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: None)
    monkeypatch.setattr(functional, "on_device", lambda tensor, device: torch.empty_like(tensor, device=device))
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize(("dtype", "value_type"), [(torch.float32, "fp16"), (torch.bfloat16, "fp32")])
@pytest.mark.parametrize("name", ["default", "sampled", "generous"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_headers_alone(
    kind: str, name: str, dtype: torch.dtype, value_type: ValueType, far_away: FakeTensorMode
) -> None:
    """Few entries, more than wanted, more than there is room for; then what arrives, and a dense step."""
    with far_away:
        bucket = bucket_of(torch.zeros(90_000, dtype=dtype, device=GPU), kind, SETTINGS[name])
        for found in ((3.0, 5.0), (160.0, 4400.0), (2999.0, 80_000.0)):
            header = selection.select_later(bucket, 0.5, value_type)
            assert header.device == GPU and header.shape == (4,) and header.dtype == torch.int32
            assert bucket.figures is not None and bucket.figures.device == GPU and bucket.figures.shape == (6,)
            bucket.message = None
            selection.keep(bucket, [*found, 1.0, 1.0, 0.5, 0.5], 3, value_type)
            if bucket.message is None:  # too many
                continue
            assert bucket.indices is not None and bucket.indices.device == GPU
            assert sum(bucket.counts) == bucket.message.values.numel()
            for (state, place), indices, values in zip(
                bucket.thresholded,
                bucket.indices.split(bucket.counts),
                bucket.message.values.split(bucket.counts),
                strict=True,
            ):
                state.sent(indices - place.start, values)
            indices, values = decode(bucket.message.data, sum(bucket.counts), 90_000, value_type, 3)
            total = torch.zeros(90_000, device=GPU).index_add_(0, indices, values)
            for state, place in bucket.thresholded:
                state.remember()
                state.received(total[place])
                state.settle(skipped=True)
        assert selection.announce_dense(bucket).device == GPU
        for state, place in bucket.thresholded:
            for added in (True, False):
                message = state.send_all(bucket.gradient(place), 0.5, added=added, weight=0.5)
                state.received_all(message, 0.5)


def test_codecs_of_pooled_rows_do_not_wait(far_away: FakeTensorMode) -> None:
    codecs = comm_codecs(PooledThresholding(row_dim=64, forward_density=0.05))["POOLED_EMBEDDINGS_ALL_TO_ALL"]
    with far_away:
        exchange = Exchange()
        rows = torch.zeros(32 * 64, device=GPU)
        sent = codecs.forward.encode(rows, exchange)
        assert sent.device == GPU and sent.numel() == codecs.forward.calc_quantized_size(rows.numel(), exchange)
        assert codecs.forward.decode(sent, exchange).shape == rows.shape
        gradients = codecs.backward.encode(rows, exchange)
        back = codecs.backward.decode(gradients, exchange)
        assert back.device == GPU and back.shape == rows.shape
