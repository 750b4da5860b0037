"""What hand-written pages tell their readers to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lightning_embcomp import cli
from tests.pages import ROOT, bash_lines, blocks, check_files_of, run_blocks, split, text

_PAGES = tuple(sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")))
_WITH_PYTHON = tuple(page for page in _PAGES if blocks(page, "python"))


# Lightning's advice on the short runs and default folders of an example.
@pytest.mark.filterwarnings("ignore:.*tensorboardX. has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("page", _WITH_PYTHON)
def test_python_blocks_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = run_blocks(page)
    if page == "docs/check-it-yourself.md":
        # The dense part and what the loop keeps are small beside the tables.
        assert said["claimed"].plain_total <= said["plain_bytes"] <= 1.1 * said["claimed"].plain_total
        assert said["claimed"].total <= said["pruned_bytes"] <= 1.3 * said["claimed"].total
    if page == "docs/serving.md":
        assert said["report"].disk.total < said["report"].plain / 5
        assert said["logits"].shape == said["label"].shape


@pytest.mark.parametrize("page", _PAGES)
def test_every_block_is_run_or_marked(page: str) -> None:
    fences = re.findall(r"^```(\S.*)$", text(page), flags=re.MULTILINE)
    assert set(fences) <= {"python", "bash", "yaml", "text", "{.python .fragment}"}, f"{page}: {fences}"


@pytest.mark.parametrize("page", _PAGES)
def test_commands_exist(page: str) -> None:
    makefile = text("Makefile")
    for line in bash_lines(page):
        check_files_of(line)
        words = split(line)
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        if words[0] == "embcomp":
            assert words[1] in {*cli.TRAINER_COMMANDS, *cli.COMMANDS}


@pytest.mark.parametrize("page", _PAGES)
def test_yaml_blocks_name_what_exists(page: str) -> None:
    for block in blocks(page, "yaml"):
        found = yaml.safe_load(block)
        callbacks = found.get("trainer", {}).get("callbacks+", [])
        for entry in [*callbacks, *([found["data"]] if "data" in found else [])]:
            module, _, name = entry["class_path"].rpartition(".")
            cls = getattr(__import__(module, fromlist=[name]), name)
            assert set(entry["init_args"]) <= set(cls.__init__.__annotations__)
