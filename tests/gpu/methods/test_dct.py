"""Thresholded gradients on a GPU: what is selected there, that nothing waits, and the hook under DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_embcomp.methods.dct import selection
from lightning_embcomp.methods.dct.buckets import Bucket, Part
from lightning_embcomp.methods.dct.codecs import PooledThresholding, comm_codecs
from lightning_embcomp.methods.dct.codecs.exchange import Exchange
from lightning_embcomp.methods.dct.config import ValueType
from lightning_embcomp.methods.dct.wire import decode
from tests.methods.dct.later import KINDS, SETTINGS, compare, parameter
from tests.processes import run_processes

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_that_of_the_cpu(kind: str, name: str) -> None:
    compare(kind, name, device=GPU, momentum=0.0 if kind in ("ef21", "econtrol") else None)


@pytest.mark.parametrize("value_type", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_selecting_and_packing_do_not_wait(kind: str, value_type: ValueType) -> None:
    buffer = torch.randn(90_000, device=GPU)
    parts = [
        Part("first", slice(0, 3000), parameter(kind, SETTINGS["sampled"], device=GPU)),
        Part("whole", slice(3000, 3100), None),
        Part("last", slice(3100, 90_000), parameter(kind, SETTINGS["sampled"], numel=86_900, device=GPU)),
    ]
    promise: torch.futures.Future[Any] = torch.futures.Future()
    for step in range(20):
        bucket = Bucket(buffer.normal_(), parts, promise, dense=False)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 7 else "default")  # the first steps compile
        try:
            header = selection.select_later(bucket, 0.5, value_type)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bucket.figures is not None
        (entries, bad, too_many, exponent), figures = header.tolist(), bucket.figures.tolist()
        assert not bad and not too_many and 0 < entries <= 4495
        torch.cuda.set_sync_debug_mode("error" if step > 7 else "default")
        try:
            selection.keep(bucket, figures, exponent, value_type)
            assert bucket.message is not None and bucket.indices is not None
            for (state, place), indices, values in zip(
                bucket.thresholded,
                bucket.indices.split(bucket.counts),
                bucket.message.values.split(bucket.counts),
                strict=True,
            ):
                state.sent(indices - place.start, values)
            where, what = decode(bucket.message.data, entries, 90_000, value_type, exponent)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(where, bucket.indices.long()) and torch.equal(what, bucket.message.values)


def test_codecs_of_pooled_rows_do_not_wait_and_equal_the_cpu() -> None:
    codecs = comm_codecs(PooledThresholding(row_dim=64, forward_density=0.05))["POOLED_EMBEDDINGS_ALL_TO_ALL"]
    rows = torch.randn(500 * 64)
    results = []
    for device in (torch.device("cpu"), GPU):
        mine, exchange = rows.to(device), Exchange()
        if device.type == "cuda":
            codecs.forward.decode(codecs.forward.encode(mine))  # compile
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            sent = codecs.forward.encode(mine, exchange)
            arrived = codecs.forward.decode(sent, exchange)
            back = codecs.backward.decode(codecs.backward.encode(mine, exchange), exchange)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([tensor.cpu() for tensor in (sent, arrived, back)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_two_processes_on_one_gpu() -> None:
    """Over gloo, with tensors on the GPU: NCCL takes one process per GPU."""
    for said in run_processes(2, "tests.gpu.methods.dct_worker", "gloo"):
        assert "all checks passed" in said, said[-4000:]


def test_one_process_over_nccl() -> None:
    [said] = run_processes(1, "tests.gpu.methods.dct_worker", "nccl")
    assert "all checks passed" in said, said[-4000:]
