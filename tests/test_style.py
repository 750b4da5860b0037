"""Formatting, types, examples in docstrings, and who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = "lightning_embcomp"
_LAYERS = ("kernels", "functional", "module", "callback")
"""Lowest first: a file imports its own layer and those before it."""


def check(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"python -m {' '.join(command)}\n{result.stdout}{result.stderr}"


def test_ruff_check() -> None:
    check("ruff", "check", ".")


def test_ruff_format() -> None:
    check("ruff", "format", "--check", ".")


def test_mypy() -> None:
    check("mypy")


def test_docstring_examples() -> None:
    check("pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "--ignore-glob=*/triton.py", _PACKAGE)


def imported_names(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names that a module imports anywhere, relative ones resolved; ``if TYPE_CHECKING`` counts as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, base]).rstrip(".")
            # `from a import b` may import the module a.b.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(module: str) -> str | None:
    """The layer of a module of the package: its own file name's, or kernels for everything below ``kernels``."""
    parts = module.split(".")
    if parts[:1] != [_PACKAGE]:
        return None
    if parts[1:2] == ["kernels"]:
        return "kernels"
    return next((name for name in parts if name in _LAYERS), None)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(module: str, imports: Iterator[str]) -> Iterator[str]:
    """Rules of the package's design that the imports of one module break."""
    parts = module.split(".")
    area = parts[1] if len(parts) > 1 else ""
    own_layer = layer(module)
    for name in sorted(set(imports)):
        other = layer(name)
        if own_layer and other and _LAYERS.index(other) > _LAYERS.index(own_layer):
            yield f"{module} ({own_layer}) imports {name} ({other}): imports go {' → '.join(reversed(_LAYERS))}"
        if own_layer in ("functional", "kernels") and within(name, "lightning", "pytorch_lightning", "torchrec"):
            yield f"{module} imports {name}: {own_layer} knows tensors only"
        if within(name, "fbgemm_gpu") and area not in ("engine", "export"):
            yield f"{module} imports {name}: only engine and export use FBGEMM directly"
        if within(name, f"{_PACKAGE}.methods"):
            method = name.split(".")[2:3]
            if area == "methods" and method != parts[2:3]:
                yield f"{module} imports {name}: a method knows no other method"
            if area in ("planners", "export", "engine", "kernels", "data", "models", "metrics"):
                yield f"{module} imports {name}: {area} knows no method"


def package_modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted((_ROOT / _PACKAGE).rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_imports_go_one_way() -> None:
    modules = package_modules()
    assert f"{_PACKAGE}.models.click_model" in dict(modules)
    broken = [
        rule
        for module, path in modules
        for rule in violations(module, imported_names(path.read_text(), module, path.name == "__init__.py"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("methods.a.functional", "from lightning_embcomp.methods.a.module import X", "imports go"),
        ("methods.a.functional", "from . import callback", "imports go"),
        ("methods.a.module", "import lightning_embcomp.methods.a.callback", "imports go"),
        ("kernels.route.cpu", "from lightning_embcomp.methods.a import functional", "imports go"),
        ("methods.a.functional", "import torchrec.modules", "knows tensors only"),
        ("metrics.functional", "def f():\n    from lightning.pytorch import Trainer", "knows tensors only"),
        ("kernels.route.cpu", "import lightning", "knows tensors only"),
        ("methods.a.callback", "from lightning_embcomp.methods.b import functional", "no other method"),
        ("methods.a.callback", "from ..b.functional import f", "no other method"),
        ("planners.storage", "import lightning_embcomp.methods.a", "planners knows no method"),
        ("export.writer", "from lightning_embcomp.methods.a.config import C", "export knows no method"),
        ("methods.a.module", "from fbgemm_gpu.split_embedding_configs import EmbOptimType", "only engine and export"),
        ("strategies.torchrec", "import fbgemm_gpu", "only engine and export"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str, rule: str) -> None:
    name = f"{_PACKAGE}.{module}"
    assert any(rule in text for text in violations(name, imported_names(source, name)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("methods.a.callback", "from . import functional, module"),
        ("methods.a.callback", "import lightning.pytorch\nfrom lightning_embcomp.methods.a.module import X"),
        ("methods.a.functional", "from lightning_embcomp.kernels.dispatch import route"),
        ("engine.tbe", "import fbgemm_gpu\nimport torchrec"),
        ("callbacks", "from lightning_embcomp.methods.a.callback import A"),
        ("metrics.functional", "import lightning_utilities"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    name = f"{_PACKAGE}.{module}"
    assert list(violations(name, imported_names(source, name))) == []
