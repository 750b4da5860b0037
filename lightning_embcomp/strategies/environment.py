"""What TorchRec reads from the environment of a process."""

import os

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import TorchElasticEnvironment

LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"


def set_local_world_size(environment: ClusterEnvironment | None, processes: int) -> None:
    """Tell TorchRec how many processes share this machine.

    Planner and hierarchical sharding types read ``LOCAL_WORLD_SIZE``, which only torchrun sets; without it TorchRec
    assumes 8.

    Args:
        environment: Who started the processes. What torchrun has set stays.
        processes: Processes of this run on this machine.

    Example:
        >>> from lightning.fabric.plugins.environments import LightningEnvironment
        >>> set_local_world_size(LightningEnvironment(), processes=1)
        >>> os.environ["LOCAL_WORLD_SIZE"]
        '1'
    """
    if isinstance(environment, TorchElasticEnvironment) and LOCAL_WORLD_SIZE in os.environ:
        return
    os.environ[LOCAL_WORLD_SIZE] = str(processes)
