"""The Triton kernels of a pruning event against their plain twins: decisions, packed routers, moved rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.decide import count_cells, decide
from lightning_embcomp.kernels.relocate import move_rows, pack, unpack
from lightning_embcomp.kernels.types import RouterTensors

from .cases import CPU, Case
from .test_decide import BINS, bin_of
from .test_decide import rows as decided_rows
from .triton_runs import ALL, add, close, on, on_device, run, strided, twin


def other_codes(case: Case, seed: int) -> Case:
    """The case with new codes for about half of its rows."""
    rng = np.random.default_rng(seed)
    codes = []
    for table, old in zip(case.tables, case.codes, strict=True):
        new = rng.integers(0, table.codes, table.rows).astype(np.uint8)
        codes.append(np.where(rng.random(table.rows) < 0.5, old, new))
    return replace(case, codes=codes)


def stored(case: Case, dtype: torch.dtype, rowwise: bool) -> list[Tensor | None]:
    tables = case.class_tables([full[:, 0] if rowwise else full for full in case.full])
    return [rows.to(dtype) if rows.numel() else None for rows in tables]


def check_pack(device: torch.device, name: str) -> None:
    """Into a router that is in use: a whole table, and 64 rows at a time."""
    case = ALL[name]
    after, ours = other_codes(case, 4), on(CPU, case.router.tensors)
    theirs: RouterTensors = on(device, ours)
    slots = [torch.zeros(case.classes, dtype=torch.int64) for _ in range(2)]
    for t, codes in enumerate(after.codes):
        rows = len(codes)
        close(run(device, partial(unpack, theirs, t, 0, rows)), twin(partial(unpack, ours, t, 0, rows)))
        for start in range(0, rows, rows if t else 64):
            given = torch.from_numpy(codes)[start : start + (rows if t else 64)]
            moved = strided(on(device, given))
            found = run(device, partial(pack, theirs, t, start, moved, slots[0]), waits=True)
            close(found, twin(partial(pack, ours, t, start, given, slots[1])))
        close(slots[0], slots[1])
        if rows > 64:
            close(run(device, partial(unpack, theirs, t, 64, rows)), twin(partial(unpack, ours, t, 64, rows)))
    close(theirs.words, ours.words)


def check_move(device: torch.device, name: str, dtype: torch.dtype, rowwise: bool) -> None:
    before = ALL[name]
    after = other_codes(before, 5)
    source, target = stored(before, dtype, rowwise), stored(after, dtype, rowwise)
    target = [None if rows is None else rows.fill_(1.5) for rows in target]
    mine, into, columns = on_device(device, source, target, before.columns)
    for t, table in enumerate(before.tables):
        old, new = (twin(partial(unpack, case.router.tensors, t, 0, table.rows)) for case in (before, after))
        given = [tuple(strided(part) for part in on(device, pair)) for pair in (old, new)]
        class_of_code = before.router.tensors.class_of_code[t]
        move = partial(move_rows, *given, on(device, class_of_code), columns, mine, into, rowwise=rowwise)
        run(device, move)
        twin(partial(move_rows, old, new, class_of_code, before.columns, source, target, rowwise=rowwise))
    close(into, target, rtol=0, atol=0)


def check_decide(device: torch.device, n: int, prefix: bool) -> None:
    parts, states = (1, 5) if prefix else (3, 2)
    codes, utility = decided_rows(n, n, parts, 5 if prefix else 8)
    keep = torch.from_numpy(np.random.default_rng(2).integers(0, states, (parts, states, BINS)).astype(np.uint8))
    some = parts - 1, 1, bin_of(3.0)
    keep[some] = 0
    theirs = [strided(on(device, part)) for part in (codes, utility)]
    on_it = on(device, keep)
    wanted = torch.zeros(parts, states, BINS, dtype=torch.int64)
    twin(partial(count_cells, codes, utility, wanted, prefix=prefix))
    found = [torch.zeros_like(wanted, device=where) for where in ("cpu", device)]
    for counts in found:  # adds up, so once
        run(device, partial(count_cells, *theirs, counts, prefix=prefix), waits=True)
        close(counts, wanted)
    for partly in ((-1, 0, 0, 0), (*some, 5)):
        said = twin(partial(decide, codes, utility, keep, partly, 2, prefix=prefix))
        close(run(device, partial(decide, *theirs, on_it, partly, 2, prefix=prefix), waits=partly[0] >= 0), said)


add(check_pack, ("mixed",), ("one_row",), ("odd",), ("whole_blocks",), ("nothing_stored",))
add(
    check_move,
    ("mixed", torch.float32, False),
    ("mixed", torch.float32, True),
    ("odd", torch.float16, False),
    ("one_row", torch.float64, False),
    ("nothing_stored", torch.float32, False),
)
add(check_decide, *[(n, prefix) for n in (0, 1, 700) for prefix in (True, False)])
