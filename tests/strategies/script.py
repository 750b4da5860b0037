"""A user's program: the command line with this strategy, in processes that Lightning starts."""

import os
import sys
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from lightning_embcomp.strategies import TorchRecStrategy  # noqa: E402
from lightning_embcomp.trainer_cli import SETTINGS, EmbCompCLI  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    cli = EmbCompCLI(**SETTINGS, args=sys.argv[1:], save_config_callback=None)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, TorchRecStrategy)
    assert strategy.world_size == 2 and os.environ["LOCAL_WORLD_SIZE"] == "2"
    assert strategy.sharded_paths == ["model.sparse_arch.embedding_bag_collection"]
    assert cli.trainer.global_step == 5
    kinds = {name: choice.sharding_type for plan in strategy.plan.plan.values() for name, choice in plan.items()}  # type: ignore
    # One write: the processes share a terminal.
    sys.stdout.write(f"rank {strategy.global_rank} ends: {kinds['t_feature_0']}\n")
    sys.stdout.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
