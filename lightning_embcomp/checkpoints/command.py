"""``embcomp consolidate``: from a sharded run's checkpoint directory to one checkpoint file."""

from __future__ import annotations

import argparse
import sys

from lightning_embcomp.checkpoints.consolidation import consolidate
from lightning_embcomp.engine.sharded.whole import whole_tables
from lightning_embcomp.report.checkpoint import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command.

    Args:
        parser: Parser of the command.
    """
    parser.add_argument("checkpoint", metavar="CKPT_DIR", help="checkpoint directory that a sharded run wrote")
    parser.add_argument("out", metavar="OUT", help="file to write, which a plain module loads")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="read Python objects of any class from the checkpoint, which can run code: for files that you trust",
    )


def run(args: argparse.Namespace) -> int:
    """Consolidate, and say what was written.

    Args:
        args: Parsed options.

    Returns:
        Exit status: 0, or 2 if the checkpoint cannot be read or the file not written.
    """
    try:
        out = consolidate(
            args.checkpoint, args.out, convert=whole_tables, weights_only=not args.trust, overwrite=args.overwrite
        )
    except (CheckpointError, OSError) as error:
        hint = " (--trust)" if "weights_only=False" in str(error) else ""
        print(f"embcomp consolidate: error: {error}{hint}", file=sys.stderr)
        return 2
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
    return 0
