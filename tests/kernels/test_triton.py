"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for a GPU that is not there."""

from tests.triton_process import run_compiled, run_interpreted


def test_kernels_equal_their_twins() -> None:
    results = run_interpreted("tests.kernels.interpreted")
    assert len(results) > 80
    failed = {name: error for name, error in results.items() if error}
    assert not failed, "\n".join(f"{name}\n{error[-1500:]}" for name, error in failed.items())


def test_kernels_compile_for_a_gpu() -> None:
    """Hopper; ``ptxas`` comes with Triton."""
    results = run_compiled("tests.kernels.compiled")
    assert not results["errors"], "\n".join(error[-1500:] for error in results["errors"].values())
    assert not results["missing"], "no check launches these kernels"
