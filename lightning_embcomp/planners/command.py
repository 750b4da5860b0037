"""``embcomp plan``: which rank would hold which table, with and without compression."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_embcomp.stack import quiet_third_party

if TYPE_CHECKING:
    from lightning_embcomp.planners.configured import ConfiguredRun

_PIPE_WIDTH = 140  # a file or pipe has no width of its own, and rich would fold at 80
NO_PLAN = 1
"""Exit status where the tables do not fit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command.

    Args:
        parser: Parser of the command.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Nothing is allocated and no GPU is needed. Times are TorchRec's estimates for its default bandwidths (A100):\n"
        "good for comparing plans, not for predicting a step. Examples:\n\n"
        "  embcomp plan --tables examples/plans/dlrm_v2.yaml --world-size 8 --hbm 80GB\n"
        "  embcomp plan --tables examples/plans/dlrm_v2.yaml -c callbacks/fiited.yaml --world-size 2 --hbm 40GB\n"
        "  embcomp plan -c examples/dlrm.yaml -c callbacks/fiited.yaml --world-size 2 --ddr 1GB"
    )
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks, one device each")
    parser.add_argument("--local-world-size", type=int, metavar="N", help="ranks on a machine (default: all)")
    parser.add_argument("--hbm", metavar="SIZE", help="device memory of a rank, such as 80GB; without it, CPUs")
    parser.add_argument(
        "--ddr",
        metavar="SIZE",
        help="host memory of a rank that tables may use (default: none beside devices); needed for CPUs",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="configuration as for `embcomp fit`; beside --tables, only its callbacks are read",
    )
    parser.add_argument("--tables", metavar="FILE", help="YAML list of tables: name, rows, dim, pooling")
    parser.add_argument("--ckpt", metavar="PATH", help="checkpoint of a compressed run: plan with what its tables take")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="samples per rank (default: the strategy's, or 512)"
    )
    parser.add_argument(
        "--pooling", nargs="+", default=[], metavar="GLOB=IDS", help="ids per sample of tables, such as 't_*=20'"
    )
    parser.add_argument(
        "--sharding",
        nargs="+",
        default=[],
        metavar="GLOB=TYPES",
        help="allowed sharding types of tables, such as 't_user=row_wise,table_wise'",
    )
    parser.add_argument(
        "--reserve", type=float, default=0.15, metavar="SHARE", help="device memory to keep free (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file, bytes as numbers")


def run(args: argparse.Namespace) -> int:
    """Plan, and print.

    Args:
        args: Parsed options.

    Returns:
        Exit status: 0; :data:`NO_PLAN` if the tables do not fit; 2 if the input cannot be read.
    """
    quiet_third_party()
    # Imported late: `--help` does not wait for LightningCLI.
    from lightning_embcomp.composition import OwnershipError
    from lightning_embcomp.planners.options import PlanInputError
    from lightning_embcomp.report.checkpoint import CheckpointError
    from lightning_embcomp.tables import UnknownTableError

    try:
        return _plan(args)
    except (PlanInputError, CheckpointError, UnknownTableError, OwnershipError, ValueError) as error:
        print(f"embcomp plan: error: {error}", file=sys.stderr)
        return 2


def _plan(args: argparse.Namespace) -> int:
    from lightning_embcomp.planners.comparison import DEFAULT_BATCH, PlanRequest, plan_tables, sharded_tables
    from lightning_embcomp.planners.options import PlanInputError, TableRules, by_glob
    from lightning_embcomp.planners.view import render
    from lightning_embcomp.strategies.options import check_fused_params, check_sharding

    if not 0 <= args.reserve < 1:
        raise PlanInputError(f"--reserve is a share of device memory from 0 to below 1, not {args.reserve}")
    configured, pooling = _read(args)
    assert configured.model is not None
    strategy = configured.strategy
    sharding = {glob: kinds.split(",") for glob, kinds in by_glob(args.sharding, "--sharding").items()}
    request = PlanRequest(
        root=configured.model,
        machine=_machine(args, strategy),
        rules=TableRules(
            sharding=check_sharding(_first(sharding, strategy.get("sharding") or {})),
            pooling=_first(_numbers(by_glob(args.pooling, "--pooling")), pooling),
            fused_params=check_fused_params(strategy.get("fused_params")),
        ),
        batch_size=args.batch_size or strategy.get("batch_size") or DEFAULT_BATCH,
        reserved=args.reserve,
    )
    tables = sharded_tables(request)
    if not tables:
        raise PlanInputError("the model holds no EmbeddingBagCollection or EmbeddingCollection, so nothing is sharded")
    footprints, notes = _footprints(args, configured)
    outcomes = {"plain": plan_tables(request)}
    if footprints:
        outcomes["compressed"] = plan_tables(request, footprints)
    title = _title(request, tables)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    console.print(render(title, tables, outcomes, footprints, notes))
    if args.json:
        content = {
            "request": vars(args),
            **{name: outcome.as_dict() for name, outcome in outcomes.items()},
            "weights_kept": {name: footprint.kept for name, footprint in footprints.items()},
        }
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")
    return 0 if list(outcomes.values())[-1].summary is not None else NO_PLAN


def _read(args: argparse.Namespace) -> tuple[ConfiguredRun, Mapping[str, float]]:
    """The run, whose model is a bare collection if tables were listed, and ids per sample."""
    from lightning_embcomp.planners.configured import ConfiguredRun, read_run
    from lightning_embcomp.planners.options import PlanInputError
    from lightning_embcomp.planners.tables_file import read_tables

    if args.tables is not None:
        listed = read_tables(args.tables)
        found = read_run(args.config, with_model=False) if args.config else ConfiguredRun(model=None, callbacks=())
        return replace(found, model=listed.module, strategy={}), listed.pooling
    if not args.config:
        raise PlanInputError("give a configuration (-c FILE), or a list of tables (--tables FILE)")
    return read_run(args.config, with_model=True), {}


def _machine(args: argparse.Namespace, strategy: Mapping[str, Any]) -> Any:  # noqa: ANN401 - imported late
    from lightning_embcomp.planners.options import Machine
    from lightning_embcomp.sizes import parse_bytes

    given = {
        name: getattr(args, name) if getattr(args, name) is not None else strategy.get(name) for name in ("hbm", "ddr")
    }
    sizes = {name: None if value is None else parse_bytes(value) for name, value in given.items()}
    return Machine(ranks=args.world_size, local_ranks=args.local_world_size, **sizes)


def _footprints(args: argparse.Namespace, configured: ConfiguredRun) -> tuple[dict[str, Any], list[str]]:
    """What compressed tables take, and what to say about it."""
    from lightning_embcomp.planners.callbacks import callback_footprints
    from lightning_embcomp.planners.configured import refusals
    from lightning_embcomp.planners.measured import checkpoint_footprints
    from lightning_embcomp.planners.options import PlanInputError
    from lightning_embcomp.tables import find_hosts

    assert configured.model is not None
    hosts, callbacks = find_hosts(configured.model), configured.callbacks
    footprints = callback_footprints(hosts, callbacks)
    notes = []
    if args.world_size > 1:
        notes += refusals(hosts, callbacks, configured.budgets)
    if _share_bytes(configured) and not args.ckpt:
        notes.append(
            "Tables share one budget (scope: global). Bytes move between them as rows are measured: the plan is that of"
            " the first rows. Plan again from a checkpoint (--ckpt), or set scope: table."
        )
    if configured.budgets and not args.ckpt:
        notes.append(
            f"{configured.budgets[0]} removes weights while training: the plan is that of its start. Plan again from a"
            " checkpoint (--ckpt)."
        )
    if args.ckpt:
        names = {table.name for host in hosts for table in host.tables}
        measured = checkpoint_footprints(args.ckpt)
        unknown = sorted(set(measured) - names)
        if unknown:
            raise PlanInputError(
                f"{args.ckpt}: its table {unknown[0]!r} is none of the tables to plan: {', '.join(sorted(names))}"
            )
        if not measured:
            raise PlanInputError(f"{args.ckpt}: its tables are plain; there is nothing that a plan could credit")
        footprints |= measured
    return footprints, notes


def _share_bytes(configured: ConfiguredRun) -> bool:
    """Whether bytes move between tables; what a budget does with its callbacks is another matter."""
    return not configured.budgets and any(getattr(c, "scope", None) == "global" for c in configured.callbacks)


def _title(request: Any, tables: Sequence[Any]) -> str:  # noqa: ANN401 - imported late
    from lightning_embcomp.report.view import size

    machine = request.machine
    weights = sum(
        table.rows * table.dim * (table.weight.element_size() if table.weight is not None else 4) for table in tables
    )
    memory = f"{size(machine.hbm)} of hbm" if machine.hbm is not None else f"{size(machine.ddr)} of ddr"
    kept_free = f", {100 * request.reserved:g} % of it kept free" if machine.hbm is not None else ""
    return (
        f"{len(tables)} tables with {size(weights)} of weights on {machine.ranks} ranks with {memory}{kept_free},"
        f" {request.batch_size:,} samples per rank"
    )


def _first(given: Mapping[str, Any], configured: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by glob, those of the command line before those of files."""
    return {**given, **{glob: value for glob, value in configured.items() if glob not in given}}


def _numbers(entries: Mapping[str, str]) -> dict[str, float]:
    from lightning_embcomp.planners.options import PlanInputError

    found = {}
    for glob, text in entries.items():
        try:
            found[glob] = float(text)
        except ValueError:
            raise PlanInputError(f"--pooling takes GLOB=NUMBER, not {glob}={text}") from None
    return found
