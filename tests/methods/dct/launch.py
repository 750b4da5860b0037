"""Start worker processes and read what they say."""

from __future__ import annotations

from tests.processes import Process, start_processes


def start(script: str, world_size: int, *arguments: str) -> list[Process]:
    """Processes that run a script of this folder, as ``torchrun`` would start them."""
    return start_processes(world_size, f"tests.methods.dct.{script.removesuffix('.py')}", *arguments)


def outputs(workers: list[Process], timeout: float = 180) -> list[str]:
    """What they print until all have ended."""
    try:
        return [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def check(script: str, world_size: int, *arguments: str) -> None:
    """Run to the end; every process must say that all checks passed."""
    for rank, text in enumerate(outputs(start(script, world_size, *arguments))):
        assert "all checks passed" in text, f"rank {rank}:\n{text[-4000:]}"
