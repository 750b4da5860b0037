"""Codecs in TorchRec's collectives, with two processes."""

from tests.processes import run_processes


def test_two_processes() -> None:
    """The workers compare with plain PyTorch, and name the check that fails."""
    said = run_processes(2, "tests.methods.dct.codecs.exchange_worker")
    for rank, text in enumerate(said):
        assert "all checks passed" in text, f"rank {rank}:\n{text[-4000:]}"
