"""Every public callback against every check: it works, or it is refused with a message that is known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import run_processes

from .bench import REPOSITORY, TINY, Bench
from .checks import CHECKS
from .matrix import MATRIX, PAIRS, SHARDED, Refusal, public_callbacks
from .pairs import check_pair
from .table import pair_table, table

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*not met"),  # a budget, in so short a run
    # Evaluations and resumed runs leave the callback out that saved.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
ALONE = [name for name, case in MATRIX.items() if case.processes == 1]
TOGETHER = [name for name, case in MATRIX.items() if case.processes > 1]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Bench]]:
    yield {name: Bench(MATRIX[name], tmp_path_factory.mktemp(name)) for name in ALONE}


def test_every_public_callback_has_a_case() -> None:
    assert public_callbacks().keys() == MATRIX.keys()


@pytest.mark.parametrize("name", MATRIX)
def test_it_has_a_fragment_and_a_card(name: str) -> None:
    case = MATRIX[name]
    entries = yaml.safe_load((REPOSITORY / case.fragment).read_text())["trainer"]["callbacks+"]
    assert [entry["class_path"] for entry in entries] == [f"lightning_embcomp.{name}"]
    assert name in (REPOSITORY / case.card).read_text()
    assert case.refuses.keys() <= {*CHECKS, SHARDED}


def test_the_table_has_a_row_for_each() -> None:
    rows = table().splitlines()
    assert len(rows) == 2 + len(CHECKS) + 1 and all(row.count("|") == len(MATRIX) + 2 for row in rows)
    assert pair_table().count("\n") == 1 + len(MATRIX)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("what", CHECKS)
def test_matrix(name: str, what: str, benches: Mapping[str, Bench]) -> None:
    refusal = MATRIX[name].refuses.get(what)
    if refusal is None:
        CHECKS[what](benches[name])
        return
    with pytest.raises(refusal.error, match=refusal.says):
        CHECKS[what](benches[name])


@pytest.mark.parametrize(("one", "other"), list(combinations_with_replacement(ALONE, 2)))
def test_pairs(one: str, other: str, tmp_path: Path) -> None:
    check_pair(one, other, tmp_path)


@pytest.mark.parametrize("name", TOGETHER)
def test_matrix_of_several_processes(name: str, tmp_path: Path) -> None:
    """All checks of a callback that needs processes, and its pairs with those before it, in one start of them."""
    earlier = list(MATRIX)[: list(MATRIX).index(name) + 1]
    names = [*CHECKS, *(f"with {other}" for other in earlier)]
    wrong = []
    for said in run_processes(2, "tests.conformance.matrix_worker", str(tmp_path), name, *names):
        found: dict[str, Any] = json.loads(said.split("RESULT ", 1)[1].splitlines()[0])
        assert list(found) == names
        wrong += [
            f"{what}: {text}" for what in names if (text := complaint(found[what], MATRIX[name].refuses.get(what)))
        ]
    assert not wrong, "\n\n".join(wrong)


def complaint(raised: Mapping[str, Any] | None, refusal: Refusal | None) -> str | None:
    """What is wrong with the outcome of a check; None if it is the expected one."""
    if refusal is None or raised is None:
        return "is not refused" if refusal else str(raised["trace"]) if raised else None
    wanted = f"{refusal.error.__module__}.{refusal.error.__qualname__}"
    fits = wanted in raised["kinds"] and re.search(refusal.says, raised["says"])
    return None if fits else f"is refused by {raised['trace']} instead of {wanted}: {refusal.says}"


@pytest.mark.parametrize(
    "names",
    [
        ("DimensionPruning", "MixedPrecisionSearch", "FrequencyAwareLR", "ModelExport"),
        ("ModelExport", "FrequencyAwareLR", "MixedPrecisionSearch", "DimensionPruning"),
        ("CompressionBudget", "FrequencyAwareLR", "ModelExport"),
    ],
)
def test_fragments_together(names: tuple[str, ...], tmp_path: Path) -> None:
    """All that go together in one process, by their fragments, in any order."""
    assert not any(frozenset(pair) in PAIRS for pair in combinations_with_replacement(names, 2) if len(set(pair)) == 2)
    files = [str(REPOSITORY / file) for file in ("examples/dlrm.yaml", *(MATRIX[name].fragment for name in names))]
    bench = Bench(MATRIX[names[0]], tmp_path)
    bench.command("fit", *(text for file in files for text in ("-c", file)), *TINY)
    assert (tmp_path / "command" / "served" / "manifest.json").exists()
