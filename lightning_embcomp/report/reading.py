"""From a checkpoint file to the report on its tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_embcomp.report.account import MemoryReport, TableReport
from lightning_embcomp.report.checkpoint import CheckpointError, open_checkpoint
from lightning_embcomp.report.optimizer_states import OptimizerStates
from lightning_embcomp.report.plain import FUSED_STATE_KEY, report_plain
from lightning_embcomp.report.routed import DamagedTableError, read_engines, report_engine


def read_report(path: str | os.PathLike[str]) -> MemoryReport:
    """Account for the embedding tables of a model, from its checkpoint alone.

    Compressed tables are counted as they are held in training, with the router that the checkpoint stores in another
    form. The plain table is that of the same shape, dtype and optimizer. Single numbers (optimizer steps) are left out.

    Args:
        path: A Lightning checkpoint.

    Returns:
        The report.

    Raises:
        CheckpointError: If the file cannot be read, is damaged, or holds no embedding table that can be recognised.
    """
    checkpoint = open_checkpoint(path)
    tables = report_tables(checkpoint, path)
    if not tables:
        raise CheckpointError(
            "it holds no embedding table that can be recognised: neither a compressed one nor an EmbeddingBagCollection"
            " or EmbeddingCollection (a plain nn.EmbeddingBag looks like any other weight)",
            path=path,
        )
    notes = []
    if any(table.memory.plain_optimizer_state == 0 for table in tables):
        fused = FUSED_STATE_KEY in checkpoint
        notes.append(
            "0 bytes of optimizer state: SGD, an optimizer that has not stepped yet"
            + ("" if fused else ", or a fused optimizer whose state was not saved")
        )
    return MemoryReport(
        checkpoint=os.fspath(path),
        epoch=_number(checkpoint.get("epoch")),
        global_step=_number(checkpoint.get("global_step")),
        tables=tuple(tables),
        notes=tuple(notes),
    )


def report_tables(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> list[TableReport]:
    """Account for the tables of an open checkpoint.

    Args:
        checkpoint: From :func:`~lightning_embcomp.report.checkpoint.open_checkpoint`.
        path: Its file, for errors.

    Returns:
        Compressed tables, then plain ones; empty if there are none.

    Raises:
        CheckpointError: If what is stored of a table does not fit together.
    """
    state = checkpoint["state_dict"]
    states = OptimizerStates(checkpoint.get("optimizer_states"))
    try:
        reports = [
            report for prefix, tables in read_engines(state).items() for report in report_engine(prefix, tables, states)
        ]
    except DamagedTableError as error:
        raise CheckpointError(f"damaged or not readable: {error}", path=path) from error
    return reports + report_plain(state, checkpoint, states)


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None
