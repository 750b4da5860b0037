"""Run a function of a test module in several processes that train together."""

from tests.processes import run_processes


def launch(module: str, function: str, *arguments: object, processes: int = 2, timeout: float = 240) -> list[str]:
    """Call ``function(*arguments)`` in every process, as a launcher such as torchrun would; text arguments only."""
    said = run_processes(processes, "tests.strategies.call", module, function, *map(str, arguments), timeout=timeout)
    assert all("all checks passed" in text for text in said)
    return said
