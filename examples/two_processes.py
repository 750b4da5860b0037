"""Pruned tables, sharded over two processes on this machine: `python examples/two_processes.py`.

Lightning starts the second process by itself; torchrun and SLURM work as well.
"""

import lightning.pytorch as pl

from lightning_embcomp import DimensionPruning, PruningSchedule, TorchRecStrategy
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.memory import table_memory
from lightning_embcomp.models import ClickModel


def main() -> None:
    """Train, and say what each process holds."""
    data = SyntheticClickLogDataModule(SyntheticClickLog(num_rows=20_000), batch_size=512)
    pruning = DimensionPruning(target=0.8, schedule=PruningSchedule(every_n_steps=10, early_steps=(2, 5)))
    trainer = pl.Trainer(
        strategy=TorchRecStrategy(sharding={"*": "row_wise"}),
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ClickModel(embedding_lr=0.05), datamodule=data)
    mine = [table_memory(shard.engine, shard.index) for table in pruning.owned for shard in table.shards]
    plain, held = sum(m.plain_total for m in mine), sum(m.total for m in mine)
    rows = sum(m.rows for m in mine)
    print(f"process {trainer.global_rank}: {rows:,} rows, {plain:,} bytes plain, {held:,} bytes held", flush=True)


if __name__ == "__main__":
    main()
