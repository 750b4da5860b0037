"""Several processes of one test, which talk to each other by gloo.

They are forked from one that has imported everything, which takes seconds that each of them would need otherwise.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.02


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _Zygote:
    """The process that the others are forked from."""

    def __init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": str(_ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.zygote"],
            cwd=_ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read()
        atexit.register(self._close)

    def _close(self) -> None:
        """Its input ends, so that it ends."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue  # a library said something on import
        raise AssertionError("the process that test processes are forked from has ended")

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()


@lru_cache(maxsize=1)
def _zygote(process: int) -> _Zygote:
    return _Zygote()


class Process:
    """A running test process, with the interface of ``subprocess.Popen`` as far as tests need it."""

    def __init__(self, module: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        handle, self._output = tempfile.mkstemp(prefix="test-process-")
        os.close(handle)
        self._zygote = _zygote(os.getpid())
        run = [module, *arguments]
        self.pid: int = self._zygote.ask(run=run, environment=environment, output=self._output)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How the process ended; None while it runs."""
        if self.returncode is None:
            self.returncode = self._zygote.ask(poll=self.pid)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for its end, and return what it said."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._output, timeout, self._said())
            time.sleep(_POLL_SECONDS)
        return self._said(), None

    def _said(self) -> str:
        return Path(self._output).read_text(errors="replace")

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def start_processes(count: int, module: str, *arguments: str) -> list[Process]:
    """Start a module in several processes as torchrun would; for tests in which some of them die."""
    port = free_port()
    return [
        Process(
            module,
            arguments,
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(count)
    ]


def run_processes(count: int, module: str, *arguments: str, timeout: float = 240) -> list[str]:
    """Run a module in several processes, and return what each of them said.

    Raises:
        AssertionError: If one of them fails or takes too long.
    """
    workers = start_processes(count, module, *arguments)
    try:
        said = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    failed = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.returncode]
    if failed:
        rank, code = failed[0]
        raise AssertionError(f"rank {rank} of {count} ended with {code}:\n{said[rank][-4000:]}")
    return said
