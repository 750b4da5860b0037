"""Decisions by state and utility against loops in NumPy."""

import numpy as np
import pytest
import torch

from lightning_embcomp.kernels.decide import count_cells, decide

BINS = 1 << 15


def rows(seed: int, n: int, parts: int, states: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, states, n).astype(np.uint8))
    utility = torch.from_numpy(rng.choice([0.0, 0.5, 3.0, 7.25], (n, parts))).bfloat16()
    return codes, utility


def bin_of(value: float) -> int:
    return int(torch.tensor(value).bfloat16().view(torch.int16))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_every_row_is_counted_once_per_part(backend: str, n: int, prefix: bool) -> None:
    parts, states = (1, 5) if prefix else (3, 2)
    codes, utility = rows(0, n, parts, 5 if prefix else 8)
    counts = torch.zeros(parts, states, BINS, dtype=torch.int64)
    count_cells(codes, utility, counts, prefix=prefix)
    assert int(counts.sum()) == n * parts
    for part in range(parts):
        for state in range(states):
            mine = (codes == state) if prefix else ((codes >> part) & 1) == state
            for value in (0.0, 0.5, 3.0, 7.25):
                assert int(counts[part, state, bin_of(value)]) == int((mine & (utility[:, part] == value)).sum())


@pytest.mark.parametrize("prefix", [True, False])
def test_rows_get_what_their_cell_keeps(backend: str, prefix: bool) -> None:
    parts, states = (1, 5) if prefix else (3, 2)
    codes, utility = rows(1, 500, parts, 5 if prefix else 8)
    keep = torch.from_numpy(np.random.default_rng(2).integers(0, states, (parts, states, BINS)).astype(np.uint8))
    decided, seen = decide(codes, utility, keep, (-1, 0, 0, 0), 0, prefix=prefix)
    assert seen == 0
    for row in range(500):
        wanted = 0
        for part in range(parts):
            state = int(codes[row]) if prefix else int(codes[row]) >> part & 1
            kept = int(keep[part, state, bin_of(float(utility[row, part]))])
            wanted |= kept if prefix else kept << part
        assert int(decided[row]) == wanted


def test_the_first_rows_of_the_partial_cell_get_one_more(backend: str) -> None:
    codes, utility = rows(3, 300, 1, 3)
    keep = torch.zeros(1, 3, BINS, dtype=torch.uint8)
    mine = ((codes == 1) & (utility[:, 0] == 3.0)).nonzero().flatten().tolist()
    partial = (0, 1, bin_of(3.0), 10)
    first, seen = decide(codes[:150], utility[:150], keep, partial, 0, prefix=True)
    second, seen = decide(codes[150:], utility[150:], keep, partial, seen, prefix=True)
    assert seen == len(mine) > 10
    assert torch.cat([first, second]).nonzero().flatten().tolist() == mine[:10]
