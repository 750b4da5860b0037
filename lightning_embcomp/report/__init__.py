"""Account for embedding memory: read from a checkpoint, measured on a live model, drawn for people."""

from lightning_embcomp.report.account import MemoryReport, TableReport
from lightning_embcomp.report.checkpoint import CheckpointError, open_checkpoint
from lightning_embcomp.report.reading import read_report, report_tables

__all__ = ["CheckpointError", "MemoryReport", "TableReport", "open_checkpoint", "read_report", "report_tables"]
