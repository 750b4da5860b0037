"""What the READMEs say is true: code runs, commands exist, YAML parses, defaults and links are those of the project."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_embcomp
from lightning_embcomp import (
    BudgetControl,
    CompressionBudget,
    CounterSettings,
    DimensionPruning,
    ErrorFeedback,
    FrequencyAwareLR,
    GradientThresholding,
    Granularity,
    MixedPrecisionSearch,
    PrecisionSearch,
    PruningSchedule,
    RowQuantization,
    ThresholdSettings,
    cli,
)
from lightning_embcomp.engine.hosts import RoutedEmbeddingBag
from tests.pages import PROGRAMS, ROOT, bash_lines, blocks, check_files_of, run_blocks, script, split, text

_METHODS = "lightning_embcomp/methods"
_CARDS = tuple(sorted(str(card.relative_to(ROOT)) for card in (ROOT / _METHODS).glob("*/README.md")))
_PAGES = ("README.md", "benchmarks/README.md", "lightning_embcomp/export/README.md", *_CARDS)
_SETTINGS = {
    "budget": (CompressionBudget, BudgetControl),
    "dct": (GradientThresholding, ErrorFeedback, ThresholdSettings),
    "mpe": (MixedPrecisionSearch, PrecisionSearch, RowQuantization),
    "frequency_lr": (FrequencyAwareLR, CounterSettings),
}
Run = Callable[..., int]


def commands(first: str) -> list[list[str]]:
    return [words for words in map(split, bash_lines(*_PAGES)) if words[0] == first]


def table(page: str, heading: str) -> dict[str, str]:
    """First two columns of the option table below a heading."""
    section = re.split(r"^#{2,3} ", text(page).split(f"\n{heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, flags=re.MULTILINE))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `embcomp` in a folder that looks like the repository, and return its status."""
    for folder in ("examples", "callbacks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["embcomp", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


# Lightning's advice on the short runs and default folders of an example.
@pytest.mark.filterwarnings("ignore:.*tensorboardX. has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = run_blocks("README.md")

    assert isinstance(said["model"].items, RoutedEmbeddingBag)
    stored = sum(weight.numel() for weight in said["model"].items.parameters())
    assert 0.19 * 20_000 * 32 < stored <= 0.2 * 20_000 * 32
    user = said["pruning"].owned[0]
    assert [owned.name for owned in said["pruning"].owned] == ["bags.t_user"]
    assert user.host.engine.tables[1].chunks == 1  # the other table is whole
    assert said["memory"].plain_total == (20_000 + 200) * (32 + 1) * 4 > 3 * said["memory"].total
    assert said["callback"].budget == 2 * 10**9
    assert said["second"].global_step == 2 * said["trainer"].global_step == 32
    assert type(said["resumed"].items) is nn.EmbeddingBag
    # Rows that no batch looks up keep what was written back, as far as the warm start stores it.
    unseen = torch.ones(20_000, dtype=torch.bool)
    unseen[said["seen"]] = False
    before, kept = said["resumed"].items.weight[unseen], said["warm"].items.engine.read_rows(0, 0, 20_000)[unseen]
    torch.testing.assert_close(kept, torch.where(kept == 0, 0, before), rtol=0, atol=0)
    assert said["third"].global_step == 8 and bool((kept != 0).any())


def test_make_targets_exist() -> None:
    makefile = text("Makefile")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    lines = commands("make")
    assert {words[1] for words in lines} >= {"demo", "test", "lint"}
    for words in lines:
        assert words[1] in targets, f"no target {words[1]!r}"
        for variable in words[2:]:
            assert f"$({variable.partition('=')[0]}" in makefile, f"the Makefile has no {variable}"
            if variable.startswith("STACK="):
                assert (ROOT / "requirements" / f"{variable.partition('=')[2]}.txt").is_file()


def test_trainer_commands_parse(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [words[1:] for words in commands("embcomp") if words[1] in cli.TRAINER_COMMANDS]
    assert len(lines) >= 2
    for words in lines:
        assert run(*words, *([] if "help=" in words[-1] else ["--print_config"])) == 0, capsys.readouterr().err


def test_other_commands_exist(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [words[1:] for words in commands("embcomp") if words[1] not in cli.TRAINER_COMMANDS]
    assert {words[0] for words in lines} == {"consolidate", "export", "plan", "report"}
    for words in lines:
        if words[0] == "plan":
            # Both have a compressed plan; one of them has no plain one.
            assert run(*words) == 0
            continue
        # The options are right: what is missing is the checkpoint that an earlier line writes.
        assert run(*words) == 2
        checkpoint = next(word for word in words if word.endswith(".ckpt"))
        said = capsys.readouterr().err.replace("\n", " ")
        assert f"{checkpoint}: there is no such" in said


def test_scripts_and_files_exist() -> None:
    for line in bash_lines(*_PAGES):
        check_files_of(line)


def test_commands_need_no_activation() -> None:
    active = False
    for line in bash_lines("README.md"):
        active = active or line == "source .venv/bin/activate"
        first = shlex.split(line)[0]
        assert first not in {"python", "embcomp"}, f"{line!r} works in an activated environment only"
        assert first != "pip" or active, f"{line!r} comes before the environment is active"
    assert f"VENV ?= {PROGRAMS.partition('/')[0]}\n" in text("Makefile")


def test_options_of_scripts_exist() -> None:
    for words in commands("python"):
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in text(script(words)), f"{script(words)} has no option {option}"


@pytest.mark.parametrize("block", blocks("README.md", "yaml"))
def test_yaml_blocks_parse(run: Run, block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(block)
    assert run("fit", "-c", "examples/dlrm.yaml", "-c", "mine.yaml", "--print_config") == 0, capsys.readouterr().err
    [class_path] = re.findall(r"class_path: (\S+)", block)
    assert class_path.rpartition(".")[2] in capsys.readouterr().out


def defaults(of: Any) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in inspect.signature(of).parameters.values()}


def test_option_tables_show_every_default() -> None:
    callback = defaults(DimensionPruning)
    del callback["schedule"], callback["granularity"]
    expected = callback | defaults(PruningSchedule) | defaults(Granularity)
    assert shown(f"{_METHODS}/fiited/README.md", "## Hyperparameters") == expected


@pytest.mark.parametrize(
    ("method", "settings"),
    [(method, settings) for method, group in _SETTINGS.items() for settings in group],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_option_tables_of_groups_show_every_default(method: str, settings: Any) -> None:
    assert shown(f"{_METHODS}/{method}/README.md", f"### `{settings.__name__}`") == defaults(settings)


def shown(page: str, heading: str) -> dict[str, Any]:
    return {name: ast.literal_eval(default) for name, default in table(page, heading).items()}


@pytest.mark.parametrize("page", _PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        file = target.partition("#")[0]
        assert target.startswith("https://") or ((ROOT / page).parent / file).exists(), f"{page} links to {target}"


@pytest.mark.parametrize(
    ("page", "kind"), [("README.md", "results"), *((card, kind) for card in _CARDS for kind in ("results", "ablation"))]
)
def test_measured_numbers_have_a_place(page: str, kind: str) -> None:
    assert len(re.findall(rf"<!-- {kind}:begin -->\n.*?\n<!-- {kind}:end -->", text(page), flags=re.DOTALL)) == 1


def test_named_files_exist() -> None:
    named = re.findall(r"`([\w./-]+(?:\.(?:py|yaml|txt)|/))`", text("README.md"))
    assert len(named) > 10
    for name in named:
        folders = (ROOT, ROOT / "lightning_embcomp")
        assert any((folder / name).exists() for folder in folders), f"README.md names {name}, which does not exist"


@pytest.mark.parametrize("card", _CARDS)
def test_card_names_real_errors(card: str) -> None:
    found_modules = pkgutil.walk_packages(lightning_embcomp.__path__, "lightning_embcomp.")
    modules = [name for _, name, _ in found_modules if not name.endswith(".triton")]  # not installed everywhere
    errors = set(re.findall(r"`(\w+Error)`", text(card)))
    assert len(errors) > 3
    found = {name for module in modules for name in vars(importlib.import_module(module))} | set(vars(builtins))
    assert errors <= found
