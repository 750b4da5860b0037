"""Settings of the codecs: what is refused, and what is kept."""

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_embcomp.methods.dct.codecs import PooledThresholding


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give row_dim"),
        ({"row_dim": 16}, "needs forward_density"),
        ({"row_dim": 16, "forward_density": 0.0}, "over 0 and at most 1"),
        ({"row_dim": 16, "forward_density": 5}, "for 5 % write 0.05"),
        ({"row_dim": 16, "forward_density": float("nan")}, "over 0 and at most 1"),
        ({"row_dim": 16, "forward_density": 0.03}, "at least 0.03125, or longer rows"),
        ({"row_dim": 0, "forward_density": 0.5}, "row_dim must be from 1 to 32768"),
        ({"row_dim": 2**16, "forward_density": 0.5}, "row_dim must be from 1 to 32768"),
        ({"row_dim": 16, "forward_density": 0.5, "forward_values": "int8"}, "forward_values must be one of"),
        ({"row_dim": 16, "forward_density": 0.5, "backward": "sparse"}, "backward must be one of"),
        ({"row_dim": 16, "forward_density": 0.5, "backward_density": 0.5}, "'kept' sends what forward kept"),
        ({"row_dim": 16, "forward_density": 0.5, "backward": "topk"}, "needs backward_density"),
        ({"forward": "fp16"}, "backward='kept' sends the gradients of entries that forward='topk' kept"),
        ({"forward": "fp16", "backward": "bf16", "row_dim": 8}, "row_dim has no effect"),
        ({"forward": "fp16", "backward": "bf16", "forward_density": 0.1}, "forward_density has no effect"),
        ({"forward": "int8", "backward": "bf16"}, "give row_dim"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PooledThresholding(**settings)


@pytest.mark.parametrize(
    ("row_dim", "density", "kept"), [(64, 0.05, 3), (64, 1.0, 64), (64, 1 / 128, 1), (200, 0.01, 2), (16, 0.1, 2)]
)
def test_kept_entries_are_the_nearest_number(row_dim: int, density: float, kept: int) -> None:
    config = PooledThresholding(row_dim=row_dim, forward_density=density)
    assert config.forward_kept == config.backward_kept == kept


def test_directions_apart() -> None:
    config = PooledThresholding(row_dim=64, forward_density=0.25, backward="topk", backward_density=0.5)
    assert (config.forward_kept, config.backward_kept) == (16, 32)
    config = PooledThresholding(row_dim=64, forward="int8", backward="topk", backward_density=0.5)
    assert (config.forward_kept, config.backward_kept) == (None, 32)


def test_parsed_from_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--codecs", type=PooledThresholding | None)
    parsed = parser.parse_args(["--codecs.row_dim=32", "--codecs.forward_density=0.1", "--codecs.backward=bf16"])
    built = parser.instantiate_classes(parsed).codecs
    assert built == PooledThresholding(row_dim=32, forward_density=0.1, backward="bf16")
