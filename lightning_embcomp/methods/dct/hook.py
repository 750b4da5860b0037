"""The communication hook. DistributedDataParallel reads its annotations, which must not be postponed to strings."""

import torch
import torch.distributed as dist

from lightning_embcomp.methods.dct.exchange import GradientExchange


def gradient_thresholding_hook(state: GradientExchange, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Exchange a bucket of gradients, for ``DistributedDataParallel.register_comm_hook(state, hook)``.

    Args:
        state: The exchange of this process.
        bucket: Gradients that are ready.

    Returns:
        A future of the bucket with the gradients to step along.
    """
    return state.exchange(bucket)
