"""``embcomp report``: account for every byte of the tables in a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console

from lightning_embcomp.report.checkpoint import CheckpointError
from lightning_embcomp.report.reading import read_report
from lightning_embcomp.report.view import render

_PIPE_WIDTH = 120  # a file or pipe has no width of its own, and rich would fold at 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command.

    Args:
        parser: Parser of the command.
    """
    parser.add_argument("checkpoint", help="checkpoint that a Trainer wrote, of a compressed or a plain model")
    parser.add_argument("--json", action="store_true", help="print JSON, bytes as numbers, instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Args:
        args: Parsed options.

    Returns:
        Exit status: 0, or 2 if the checkpoint cannot be read.
    """
    try:
        report = read_report(args.checkpoint)
    except CheckpointError as error:
        print(f"embcomp report: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    console.print(render(report))
    return 0
