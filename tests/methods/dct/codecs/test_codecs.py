"""Codecs on their own: contents and sizes of what is encoded, against NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from torchrec.distributed.types import CommOp

from lightning_embcomp.methods.dct.codecs import PooledThresholding, Traffic, UnsupportedShardingError, comm_codecs

POOLED = CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name
SUMMED = CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name


def pair(op: str = POOLED, **settings: Any) -> Any:
    return comm_codecs(PooledThresholding(**settings))[op]


def keep_largest(rows: np.ndarray, kept: int) -> np.ndarray:
    out = np.zeros_like(rows)
    chosen = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :kept]
    np.put_along_axis(out, chosen, np.take_along_axis(rows, chosen, 1), 1)
    return out


@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("row_dim", "density", "position"), [(8, 0.25, 1), (64, 0.05, 1), (256, 0.03, 1), (512, 1, 2)])
def test_round_trip(values: str, row_dim: int, density: float, position: int) -> None:
    codec = pair(row_dim=row_dim, forward_density=density, forward_values=values).forward
    sent = torch.from_numpy(np.random.default_rng(0).standard_normal(6 * row_dim).astype(np.float32))
    kept = round(density * row_dim)
    encoded = codec.encode(sent.view(2, -1))
    row_bytes = kept * (position + {"fp32": 4, "fp16": 2, "bf16": 2}[values])
    assert encoded.dtype == codec.quantized_dtype == torch.uint8
    assert encoded.shape == (codec.calc_quantized_size(sent.numel()),) == (6 * row_bytes,)
    assert codec.bytes_per_column == row_bytes / row_dim
    wanted = keep_largest(sent.view(-1, row_dim).numpy(), kept)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[values]
    assert torch.equal(codec.decode(encoded), torch.from_numpy(wanted).to(dtype).float().view(-1))


def test_an_exchange_is_cut_between_rows() -> None:
    """Every process gets a slice of what was encoded, and joins slices of several."""
    codec = pair(row_dim=4, forward_density=0.5).forward
    sent = torch.arange(24.0)
    size = codec.calc_quantized_size(8)
    slices = codec.encode(sent).split(size)
    joined = codec.decode(torch.cat([slices[2], slices[0]]))
    assert torch.equal(joined, codec.decode(codec.encode(torch.cat([sent[16:], sent[:8]]))))


def test_one_row_with_positions_of_odd_length() -> None:
    """The values then start at an offset that suits no wider type."""
    codec = pair(row_dim=5, forward_density=0.6, forward_values="fp32").forward
    assert codec.decode(codec.encode(torch.arange(5.0))).tolist() == [0, 0, 2, 3, 4]


def test_nothing_to_send() -> None:
    codec = pair(row_dim=4, forward_density=0.5).forward
    assert codec.encode(torch.empty(3, 0)).numel() == codec.calc_quantized_size(0) == 0
    assert codec.decode(torch.empty(0, dtype=torch.uint8)).shape == (0,)


@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
def test_what_is_not_finite_arrives(values: str) -> None:
    codec = pair(row_dim=4, forward_density=0.5, forward_values=values).forward
    nan, inf = float("nan"), float("inf")
    sent = torch.tensor([1.0, nan, 3.0, 2.0, -inf, 5.0, inf, 6.0])
    np.testing.assert_array_equal(codec.decode(codec.encode(sent)), [0, nan, 3, 0, -inf, 0, inf, 0])


def test_large_values_stay_finite() -> None:
    codec = pair(row_dim=2, forward_density=1, forward_values="fp16").forward
    assert codec.decode(codec.encode(torch.tensor([1e6, -1e6]))).tolist() == [65504, -65504]


def test_input_is_left_alone() -> None:
    codec = pair(row_dim=4, forward_density=0.5).forward
    sent = torch.randn(8)
    before = sent.clone()
    codec.decode(codec.encode(sent)).zero_()
    assert torch.equal(sent, before)


def test_refused_tensors() -> None:
    codec = pair(row_dim=4, forward_density=0.5).forward
    with pytest.raises(TypeError, match="float32 embeddings and gradients, not torch.float16"):
        codec.encode(torch.zeros(8, dtype=torch.float16))
    with pytest.raises(ValueError, match="6 columns .* not a multiple of row_dim=4"):
        codec.encode(torch.zeros(6))
    with pytest.raises(ValueError, match="not a multiple of row_dim=4"):
        codec.calc_quantized_size(10)
    with pytest.raises(RuntimeError, match="asynchronous collectives only"):
        codec.encode(torch.zeros(8, requires_grad=True))


def test_kept_needs_a_running_backward() -> None:
    with pytest.raises(RuntimeError, match="backward of a TorchRec all-to-all.*use backward='topk'"):
        pair(row_dim=4, forward_density=0.5).backward.create_context()


@pytest.mark.parametrize(("precision", "row_bytes", "error"), [("fp32", 64, 0), ("fp16", 32, 1e-3), ("int8", 24, 2e-2)])
def test_quantised(precision: str, row_bytes: int, error: float) -> None:
    rows = {"row_dim": 16} if precision == "int8" else {}
    codec = pair(forward=precision, backward="fp32", **rows).forward
    context = codec.create_context()
    sent = torch.rand(48)
    encoded = codec.encode(sent, context)
    assert encoded.numel() == codec.calc_quantized_size(48, context)
    assert encoded.numel() * encoded.element_size() == 3 * row_bytes == codec.bytes_per_column * 48
    torch.testing.assert_close(codec.decode(encoded, context), sent, rtol=0, atol=error)
    assert encoded.dtype == codec.quantized_dtype


def test_int8_rows_are_whole() -> None:
    codec = pair(forward="int8", backward="fp32", row_dim=16).forward
    with pytest.raises(ValueError, match="40 columns .* not a multiple of row_dim=16"):
        codec.calc_quantized_size(40, codec.create_context())


def test_sums_are_refused() -> None:
    for settings in (
        {"row_dim": 8, "forward_density": 0.5},
        {"row_dim": 8, "forward": "int8", "backward": "fp32"},
        {"row_dim": 8, "forward": "fp16", "backward": "topk", "backward_density": 0.5},
    ):
        for direction in ("forward", "backward"):
            with pytest.raises(UnsupportedShardingError, match="reduce-scatter, which adds what it sends"):
                getattr(pair(SUMMED, **settings), direction).encode(torch.zeros(8))
    assert pair(SUMMED, forward="fp16", backward="fp32").forward.encode(torch.zeros(8)).dtype == torch.float16


def test_bytes_are_counted() -> None:
    codecs = comm_codecs(PooledThresholding(row_dim=4, forward_density=0.5))
    assert codecs.traffic() == {}
    for _ in range(2):
        codecs[POOLED].forward.encode(torch.zeros(8))
    assert codecs.traffic() == {"pooled/forward": Traffic(encoded=24, dense=64, exchanges=2)}
    codecs.reset_traffic()
    assert codecs.traffic() == {}


def test_every_dtype_is_a_property() -> None:
    """TorchRec's planner reads it of every codec."""
    for settings in ({"row_dim": 8, "forward_density": 0.5}, {"forward": "bf16", "backward": "fp32"}):
        for codecs in comm_codecs(PooledThresholding(**settings)).values():  # type: ignore[arg-type]
            for codec in (codecs.forward, codecs.backward):
                assert isinstance(codec.quantized_dtype, torch.dtype)
