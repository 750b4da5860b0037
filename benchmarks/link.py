"""Two network namespaces joined by a cable of a given speed, for measuring what really crosses it.

A pair of virtual interfaces joins the namespaces; ``tc``'s token bucket filter shapes both ends. Each of two processes
runs in a namespace of its own and reads the counters of its interface. Linux, root and iproute2 (Debian: ``apt install
iproute2``) are needed. Namespaces go when the block ends, by an error as well; those of killed runs go at the next one.

::

    with Link(mbit=100) as link:
        link.run(["python", "worker.py"], timeout=60)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

INTERFACE = "link0"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29_500
"""Free: the namespaces are new."""
_PREFIX = "embcomp"


class Link:
    """Namespaces and cable, as a context manager.

    Args:
        mbit: Speed of either direction in Mbit/s; None leaves it unshaped.
    """

    def __init__(self, mbit: float | None) -> None:
        self.mbit = mbit
        self.namespaces = [f"{_PREFIX}-{os.getpid()}-{rank}" for rank in range(2)]

    def __enter__(self) -> Link:
        problem = missing()
        if problem:
            raise RuntimeError(problem)
        remove_stale()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def run(self, command: Sequence[str], *, timeout: float) -> None:
        """Run one process per namespace, with the variables that ``torch.distributed`` reads.

        Args:
            command: The same for both.
            timeout: Seconds until both are killed.

        Raises:
            RuntimeError: If a process fails, with the end of what it said, or if the time is over.
        """
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / f"rank{rank}" for rank in range(2)]
            processes = [self._start(command, rank, output) for rank, output in enumerate(outputs)]
            deadline = time.monotonic() + timeout
            try:
                while None in (codes := [process.poll() for process in processes]):
                    if any(codes):  # the other one would wait for it
                        break
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"not done after {timeout:g} s:\n{_ends(outputs)}")
                    time.sleep(0.1)
                if any(codes):
                    raise RuntimeError(f"exit codes {codes}:\n{_ends(outputs)}")
            finally:
                for process in processes:
                    process.kill()
                    process.wait()

    def _start(self, command: Sequence[str], rank: int, output: Path) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }
        with output.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespaces[rank], *command],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def _build(self) -> None:
        first, second = self.namespaces
        for namespace in self.namespaces:
            _call("ip", "netns", "add", namespace)
        peer = ("type", "veth", "peer", "name", INTERFACE, "netns", second)
        _call("ip", "link", "add", INTERFACE, "netns", first, *peer)
        for namespace, address in zip(self.namespaces, ADDRESSES, strict=True):
            inside = ("ip", "-n", namespace)
            _call(*inside, "link", "set", "lo", "up")
            _call(*inside, "address", "add", f"{address}/30", "dev", INTERFACE)
            _call(*inside, "link", "set", INTERFACE, "up")
            if self.mbit is not None:
                shape = ("tbf", "rate", f"{self.mbit}mbit", "burst", "64kb", "latency", "50ms")
                _call("tc", "-n", namespace, "qdisc", "add", "dev", INTERFACE, "root", *shape)

    def _remove(self) -> None:
        """With a namespace goes its end of the cable, and with that the other end."""
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def interface_bytes(interface: str = INTERFACE) -> tuple[int, int]:
    """Bytes that an interface of this namespace has received and sent since it exists, headers included."""
    statistics = Path("/sys/class/net") / interface / "statistics"
    return int((statistics / "rx_bytes").read_text()), int((statistics / "tx_bytes").read_text())


def missing() -> str | None:
    """What a :class:`Link` lacks on this machine; None if nothing."""
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if tools:
        return f"{' and '.join(tools)} not found: install iproute2 (Debian: apt install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None


def remove_stale() -> None:
    """Delete the namespaces of runs that no longer live."""
    for line in _call("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.strip() else ""
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == _PREFIX and pid.isdigit() and not Path("/proc", pid).exists():
            _call("ip", "netns", "delete", name)


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _ends(outputs: Sequence[Path]) -> str:
    return "\n".join(f"rank {rank}:\n{path.read_text(errors='replace')[-3000:]}" for rank, path in enumerate(outputs))
