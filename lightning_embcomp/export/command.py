"""``embcomp export``: from a checkpoint to tables that serve."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from rich.console import Console

from lightning_embcomp.export.checkpoint import describe_checkpoint, hosts_of_checkpoint
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.manifest import FileFormat
from lightning_embcomp.export.pipeline import ExportOptions, ExportReport, export_module, export_tables
from lightning_embcomp.export.rows import PRECISIONS
from lightning_embcomp.export.validation import validation_batches
from lightning_embcomp.export.view import CHECKPOINT_ALONE, render
from lightning_embcomp.report.checkpoint import CheckpointError, open_checkpoint
from lightning_embcomp.stack import quiet_third_party
from lightning_embcomp.tables import UnknownTableError

_PIPE_WIDTH = 120  # a file or pipe has no width of its own, and rich would fold at 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command.

    Args:
        parser: Parser of the command.
    """
    defaults = ExportOptions()
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a compressed or a plain model")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--format", choices=get_args(FileFormat), default=defaults.format, help="layout on disk (default: %(default)s)"
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=PRECISIONS,
        default=defaults.bits,
        help="bits of rows that were not rounded in training (default: %(default)s)",
    )
    parser.add_argument(
        "--tables", nargs="+", default=[], metavar="GLOB=BITS", help="bits of single tables, for example 't_user=4'"
    )
    parser.add_argument(
        "--row-alignment",
        type=int,
        default=defaults.row_alignment,
        metavar="BYTES",
        help="bytes that a served row is filled up to a multiple of (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--max-ne-loss",
        type=float,
        default=defaults.max_ne_loss,
        metavar="SHARE",
        help="relative increase of validation NE that is allowed (default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="fail where NE rises more, instead of using more bits")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="configuration of the run, as for `embcomp fit`: builds model and data, and runs the NE guard",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written.

    Args:
        args: Parsed options.

    Returns:
        Exit status: 0, or 2 if there is nothing to export or the guard refuses.
    """
    try:
        options = ExportOptions(
            format=args.format,
            bits=args.bits,
            tables=dict(_table_bits(text) for text in args.tables),
            row_alignment=args.row_alignment,
            overwrite=args.overwrite,
            max_ne_loss=args.max_ne_loss,
            strict=args.strict,
        )
        report = _with_model(args, options) if args.config else _from_checkpoint(args, options)
    except (CheckpointError, ExportError, UnknownTableError) as error:
        print(f"embcomp export: error: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    console.print(render(report, CHECKPOINT_ALONE))
    return 0


def _from_checkpoint(args: argparse.Namespace, options: ExportOptions) -> ExportReport:
    if options.strict:
        raise ExportError("--strict needs the NE guard, and the guard the configuration of the run: add -c FILE")
    checkpoint = open_checkpoint(args.ckpt)
    hosts, dense = hosts_of_checkpoint(checkpoint, args.ckpt)
    return export_tables(hosts, dense, args.out, options, source=describe_checkpoint(checkpoint, args.ckpt))


def _with_model(args: argparse.Namespace, options: ExportOptions) -> ExportReport:
    checkpoint = open_checkpoint(args.ckpt)
    quiet_third_party()
    # Imported late: without a configuration the command does not wait for LightningCLI.
    from lightning_embcomp.export.configured import restored_run

    trainer, model = restored_run(args.config, args.ckpt)
    source = describe_checkpoint(checkpoint, args.ckpt)
    return export_module(model, args.out, options, batches=validation_batches(trainer), source=source)


def _table_bits(text: str) -> tuple[str, int]:
    pattern, equals, bits = text.rpartition("=")
    if not equals or not pattern or not bits.isdigit():
        raise ExportError(f"--tables takes GLOB=BITS, for example 't_user=4', not {text!r}")
    return pattern, int(bits)
