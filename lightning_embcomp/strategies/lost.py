"""Put errors of other libraries into words: another process is gone, or has a batch of another size."""

from __future__ import annotations

import re

_SIGNS = re.compile(r"connection (reset|closed|refused)|broken pipe|timed out waiting|remote process exited", re.I)


def explain(error: BaseException, rank: int) -> str | None:
    """Put an error that ended training into words.

    Args:
        error: The error.
        rank: Number of this process.

    Returns:
        What happened and what to do; None if the error speaks for itself.

    Example:
        >>> explain(ValueError("a bad value"), rank=0) is None
        True
    """
    if isinstance(error, RuntimeError) and "invalid tensor size" in str(error):
        return (
            "the batches of a step differ in size between processes, which gloo cannot exchange for tables that are"
            " sharded by rows: drop the last batch of an epoch (drop_last=True), or shard the tables as a whole"
        )
    return explain_lost_process(error, rank)


def explain_lost_process(error: BaseException, rank: int) -> str | None:
    """Put a broken connection into words.

    Args:
        error: What ended the training of this process.
        rank: Number of this process.

    Returns:
        What happened and what to do; None if the error has another reason.

    Example:
        >>> explain_lost_process(RuntimeError("Read error: Connection reset by peer"), rank=0)
        'process 0 lost contact with another process of the run, which died or was killed: its own output says why. \
Start the run again with ckpt_path="last" or the path of the last checkpoint; a checkpoint that was being written is \
not used'
    """
    if not isinstance(error, RuntimeError) or not _SIGNS.search(str(error)):
        return None
    return (
        f"process {rank} lost contact with another process of the run, which died or was killed: its own output says"
        ' why. Start the run again with ckpt_path="last" or the path of the last checkpoint; a checkpoint that was'
        " being written is not used"
    )
