"""Sharding plans of the MLPerf DLRM-DCNv2 tables, plain and with 65 % of the weights pruned.

::

    python -m benchmarks.plans                # writes benchmarks/results/plans.json

No GPU is needed and nothing is allocated. Every plain plan is made a second time by TorchRec's own planner under the
same constraints, and must come out the same, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError

from benchmarks.machine import describe
from lightning_embcomp import DimensionPruning
from lightning_embcomp.planners import callback_footprints
from lightning_embcomp.planners.comparison import PlanOutcome, PlanRequest, plan_tables
from lightning_embcomp.planners.options import Machine, TableRules
from lightning_embcomp.planners.summary import PlanSummary
from lightning_embcomp.planners.tables_file import read_tables
from lightning_embcomp.strategies.sharders import default_sharders
from lightning_embcomp.tables import find_hosts

RESULTS = Path(__file__).parent / "results"
TABLES = Path(__file__).parents[1] / "examples" / "plans" / "dlrm_v2.yaml"
BATCH = 8192
GB = 10**9
MACHINES = {
    "8 x 80 GB": Machine(ranks=8, hbm=80 * GB),
    "2 x 40 GB": Machine(ranks=2, hbm=40 * GB),
    "2 x 40 GB, 256 GB of host memory": Machine(ranks=2, hbm=40 * GB, ddr=256 * GB),
}
PRUNINGS = {
    "target 0.65, scope table": DimensionPruning(target=0.65, scope="table"),
    "target 0.65, scope global": DimensionPruning(target=0.65),
}


def by_torchrec(request: PlanRequest) -> PlanSummary | None:
    """The plan of TorchRec's own planner; None if it finds none."""
    sharders = default_sharders()
    found = {host.path: sharders[type(host.module)] for host in find_hosts(request.root)}
    topology = request.machine.topology()
    planner = EmbeddingShardingPlanner(
        topology,
        batch_size=request.batch_size,
        constraints=request.rules.constraints(request.root, found, request.machine),
        storage_reservation=FixedPercentageStorageReservation(percentage=request.reserved),
        stats=[],
        debug=False,
    )
    try:
        planner.plan(request.root, list(sharders.values()))
    except PlannerError:
        return None
    return PlanSummary.of(planner._best_plan or [], topology)


def in_short(outcome: PlanOutcome) -> dict[str, Any]:
    """The plan with its ranks, and of the tables only how they are sharded."""
    content = outcome.as_dict()
    if content["plan"] is not None:
        content["plan"]["tables"] = {
            table["name"]: f"{table['sharding']} {table['kernel']} on {table['ranks']}"
            for table in content["plan"]["tables"]
        }
    return content


def main() -> None:
    """Plan everything, print a line for each plan, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "plans.json", help="default: %(default)s")
    args = parser.parse_args()
    listed = read_tables(TABLES)
    weights = sum(weight.numel() * weight.element_size() for weight in listed.module.parameters())
    plans: dict[str, dict[str, Any]] = {}
    for name, machine in MACHINES.items():
        request = PlanRequest(
            root=listed.module, machine=machine, rules=TableRules(pooling=listed.pooling), batch_size=BATCH
        )
        plain, reference = plan_tables(request), by_torchrec(request)
        if plain.summary != reference:
            raise AssertionError(f"{name}: the plan of plain tables is not TorchRec's")
        outcomes = {"plain (equal to TorchRec's own)": plain}
        for pruning, callback in PRUNINGS.items():
            footprints = callback_footprints(find_hosts(listed.module), [callback])
            outcomes[pruning] = plan_tables(request, footprints)
        plans[name] = {kind: in_short(outcome) for kind, outcome in outcomes.items()}
        for kind, outcome in outcomes.items():
            found = outcome.summary
            line = (
                "no plan"
                if found is None
                else (
                    f"{found.most_bytes / GB:.1f} GB on the fullest rank, {found.bytes / GB:.1f} GB in all,"
                    f" {found.milliseconds:.2f} ms"
                )
            )
            print(f"{name:34} {kind:32} {line}")
    result = {
        "machine": describe(),
        "tables": TABLES.name,
        "weights": weights,
        "samples_per_rank": BATCH,
        "plans": plans,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
