"""Name a torch, torchrec and fbgemm that do not belong together, before one of them crashes on import.

Each fbgemm build loads beside one torch only, and torchrec's metadata does not say which. A mismatch otherwise
shows as a missing operator or an undefined symbol deep inside an import.
"""

import logging
import warnings
from collections.abc import Mapping
from importlib import metadata

KNOWN_STACKS: Mapping[str, tuple[str, str]] = {"2.11": ("1.6", "1.6"), "2.13": ("1.8", "1.8")}
"""Releases that work together: torch to (torchrec, fbgemm), each as ``major.minor``."""

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")


class StackMismatchError(ImportError):
    """The installed torch, torchrec and fbgemm do not belong together."""


def installed_versions() -> dict[str, str | None]:
    """Read the installed versions without importing the packages.

    Returns:
        Version of ``torch``, ``torchrec``, ``fbgemm-gpu`` and ``fbgemm-gpu-cpu``; None where not installed.
    """
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def find_mismatch(versions: Mapping[str, str | None]) -> str | None:
    """Say what is wrong with a set of versions, and how to mend it.

    Args:
        versions: Version of each package as in :func:`installed_versions`; a local part (``+cpu``) is allowed.

    Returns:
        The problem and the commands that mend it, or None if the versions belong together.

    Example:
        >>> find_mismatch({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}) is None
        True
        >>> print(find_mismatch({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.9.0"}))
        fbgemm-gpu 1.9.0 does not load beside torch 2.13.0, which needs fbgemm-gpu 1.8. Mend it with:
          pip install "torch==2.13.*" "fbgemm-gpu==1.8.*"
          pip install --no-deps "torchrec==1.8.*"
    """
    torch, torchrec, cuda, cpu = (versions.get(package) for package in _PACKAGES)
    fbgemm_name = "fbgemm-gpu" if cuda else "fbgemm-gpu-cpu"
    if cuda and cpu:
        problem = f"fbgemm-gpu {cuda} and fbgemm-gpu-cpu {cpu} are both installed and overwrite each other's files"
        # Either uninstall removes files of the other, so both go.
        return _with_mend(problem, torch, None, first="pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu")
    if torch is None:
        return _with_mend("torch is not installed", None, fbgemm_name)
    if torchrec is None:
        return _with_mend("torchrec is not installed", torch, fbgemm_name)
    fbgemm = cuda or cpu
    if fbgemm is None:
        return _with_mend("neither fbgemm-gpu-cpu nor fbgemm-gpu (for CUDA) is installed", torch, None)
    if _release(torch) not in KNOWN_STACKS:
        known = ", ".join(KNOWN_STACKS)
        return _with_mend(
            f"torch {torch} is not a release that this package knows (it knows {known})", None, fbgemm_name
        )
    if cuda and torch.endswith("+cpu"):
        problem = f"fbgemm-gpu {cuda} is a CUDA build and does not load beside torch {torch}"
        return _with_mend(problem, torch, "fbgemm-gpu-cpu", first="pip uninstall -y fbgemm-gpu")
    for_torch, for_fbgemm = _cuda(torch), _cuda(cuda or "")
    if for_torch and for_fbgemm and for_torch != for_fbgemm:
        problem = (
            f"fbgemm-gpu {cuda} and torch {torch} are built for different releases of CUDA: both must come from"
            f" PyTorch's own package index of {for_torch} (--index-url)"
        )
        return _with_mend(problem, torch, "fbgemm-gpu", first="pip uninstall -y fbgemm-gpu")
    known_torchrec, known_fbgemm = KNOWN_STACKS[_release(torch)]
    if _release(fbgemm) != known_fbgemm:
        problem = f"{fbgemm_name} {fbgemm} does not load beside torch {torch}, which needs {fbgemm_name} {known_fbgemm}"
        return _with_mend(problem, torch, fbgemm_name)
    if _release(torchrec) != known_torchrec:
        problem = f"torchrec {torchrec} does not work beside torch {torch}, which needs torchrec {known_torchrec}"
        return _with_mend(problem, torch, fbgemm_name)
    return None


def check_stack(versions: Mapping[str, str | None] | None = None) -> None:
    """Raise if torch, torchrec and fbgemm do not belong together.

    Args:
        versions: Versions to check; by default the installed ones.

    Raises:
        StackMismatchError: With the problem and the commands that mend it.

    Example:
        >>> check_stack({"torch": "2.11.0", "torchrec": "1.6.0", "fbgemm-gpu": "1.6.0"})
    """
    problem = find_mismatch(installed_versions() if versions is None else versions)
    if problem is not None:
        raise StackMismatchError(problem)


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _cuda(version: str) -> str:
    """Release of CUDA in the local part of a version, like ``cu130``; empty if it does not say."""
    local = version.partition("+")[2]
    return local if local.startswith("cu") else ""


def _with_mend(problem: str, torch: str | None, fbgemm_name: str | None, first: str | None = None) -> str:
    release = _release(torch) if torch is not None else ""
    if release not in KNOWN_STACKS:
        release = list(KNOWN_STACKS)[-1]
    torchrec, fbgemm = KNOWN_STACKS[release]
    commands = [
        *([first] if first else []),
        f'pip install "torch=={release}.*" "{fbgemm_name or "fbgemm-gpu-cpu"}=={fbgemm}.*"',
        # Its metadata asks for a CUDA fbgemm of any version.
        f'pip install --no-deps "torchrec=={torchrec}.*"',
    ]
    return f"{problem}. Mend it with:\n" + "\n".join(f"  {command}" for command in commands)


def quiet_third_party() -> None:
    """Hide warnings of the stack about itself, which a user cannot act on.

    For programs only (the command line, scripts): a library must not change its host's warning filters.
    """
    # lightning 2.6 asks torch's pytree in a way that torch has deprecated.
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\). is deprecated", FutureWarning)
    # The data modules slice whole batches from mapped memory, and default to no workers.
    warnings.filterwarnings("ignore", ".*does not have many workers")
    # torchrec calls is_fx_tracing while it is imported, and torch logs that its meaning has changed.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
