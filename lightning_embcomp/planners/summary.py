"""What a plan puts on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchrec.distributed.planner.types import ShardingOption, Topology

from lightning_embcomp.planners.rules import name_of


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What one rank holds and does.

    Args:
        device_bytes: Tables, optimizer state, and ids and pooled rows on their way, in device memory.
        host_bytes: The same in host memory.
        milliseconds: Estimated time of one step for the tables, communication included.
        shards: Shards of tables.
    """

    device_bytes: int
    host_bytes: int
    milliseconds: float
    shards: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one table is.

    Args:
        name: Unique name.
        rows: Rows.
        dim: Columns.
        sharding: TorchRec's sharding type.
        kernel: TorchRec's compute kernel.
        ranks: Rank of every shard.
        bytes: Estimated bytes on all ranks together.
        milliseconds: Estimated time of one step on all ranks together.
    """

    name: str
    rows: int
    dim: int
    sharding: str
    kernel: str
    ranks: tuple[int, ...]
    bytes: int
    milliseconds: float


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """A plan in numbers.

    Args:
        ranks: What every rank holds.
        tables: Where every table is.
    """

    ranks: tuple[RankLoad, ...]
    tables: tuple[Placement, ...]

    @classmethod
    def of(cls, chosen: Sequence[ShardingOption], topology: Topology) -> PlanSummary:
        """Add up the shards of a plan.

        Args:
            chosen: The chosen way of sharding each table.
            topology: The ranks.
        """
        count = topology.world_size
        device, host, time, shards = [0] * count, [0] * count, [0.0] * count, [0] * count
        tables = []
        for option in chosen:
            for shard in option.shards:
                assert shard.rank is not None and shard.storage is not None and shard.perf is not None
                device[shard.rank] += shard.storage.hbm
                host[shard.rank] += shard.storage.ddr
                time[shard.rank] += shard.perf.total
                shards[shard.rank] += 1
            total = option.total_storage
            tables.append(
                Placement(
                    name=name_of(option),
                    rows=option.tensor.shape[0],
                    dim=option.tensor.shape[1],
                    sharding=option.sharding_type,
                    kernel=option.compute_kernel,
                    ranks=tuple(shard.rank for shard in option.shards if shard.rank is not None),
                    bytes=total.hbm + total.ddr,
                    milliseconds=option.total_perf,
                )
            )
        loads = zip(device, host, time, shards, strict=True)
        return cls(
            ranks=tuple(RankLoad(device_bytes=d, host_bytes=h, milliseconds=t, shards=s) for d, h, t, s in loads),
            tables=tuple(tables),
        )

    @property
    def bytes(self) -> int:
        """Bytes on all ranks."""
        return sum(rank.device_bytes + rank.host_bytes for rank in self.ranks)

    @property
    def most_bytes(self) -> int:
        """Bytes on the fullest rank."""
        return max(rank.device_bytes + rank.host_bytes for rank in self.ranks)

    @property
    def milliseconds(self) -> float:
        """Time of the slowest rank, which the others wait for."""
        return max(rank.milliseconds for rank in self.ranks)

    @property
    def byte_balance(self) -> float:
        """Bytes of the fullest rank over those of the average one; 1 is even."""
        return self.most_bytes * len(self.ranks) / max(1, self.bytes)

    @property
    def time_balance(self) -> float:
        """Time of the slowest rank over that of the average one; 1 is even."""
        total = sum(rank.milliseconds for rank in self.ranks)
        return self.milliseconds * len(self.ranks) / total if total else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "bytes": self.bytes,
            "bytes_of_fullest_rank": self.most_bytes,
            "milliseconds": self.milliseconds,
            "byte_balance": self.byte_balance,
            "time_balance": self.time_balance,
            "ranks": [asdict(rank) for rank in self.ranks],
            "tables": [asdict(table) for table in self.tables],
        }
