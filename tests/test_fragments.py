"""The fragments of `callbacks/`, as `embcomp fit -c examples/dlrm.yaml -c callbacks/....yaml` uses them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_embcomp import DimensionPruning, Granularity, PruningSchedule, cli

_ROOT = Path(__file__).resolve().parents[1]
_EXAMPLE, _FRAGMENT = str(_ROOT / "examples" / "dlrm.yaml"), str(_ROOT / "callbacks" / "fiited.yaml")
TINY = (
    "--data.log.num_rows=3000",
    "--data.log.num_embeddings=[50,400]",
    "--data.batch_size=256",
    "--model.over_layers=[8]",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
)
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["embcomp", *arguments])
        cli.main()

    return call


def test_fit_resume_and_report(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("-c", _EXAMPLE, "-c", _FRAGMENT)
    run("fit", *both, *TINY)
    [checkpoint] = tmp_path.rglob("*.ckpt")
    logged = (checkpoint.parents[1] / "metrics.csv").read_text().splitlines()[0]
    assert "fiited/live_ratio" in logged and "fiited/bytes" in logged

    with pytest.warns(UserWarning, match="The dirpath has changed"):  # every run has a folder of its own
        run("fit", *both, *TINY, "--trainer.max_epochs=2", "--ckpt_path", str(checkpoint))
    capsys.readouterr()
    reports = []
    for path in sorted(tmp_path.rglob("*.ckpt")):
        run("report", str(path), "--json")
        reports.append(json.loads(capsys.readouterr().out))
    assert [report["global_step"] for report in reports] == [10, 20]
    for report in reports:
        assert report["total"]["plain_total"] == 450 * (16 + 1) * 4
        assert report["total"]["weights"] <= 0.2 * report["total"]["plain_weights"]
        assert [table["layout"] for table in report["tables"]] == ["prefix", "prefix"]
    run("report", str(checkpoint))
    assert "t_feature_1" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"PK\x03\x04 and then nothing"])
def test_unreadable_checkpoints_stop_a_run_before_it_starts(
    run: Run, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run("fit", "-c", _EXAMPLE, "--ckpt_path", "a.ckpt")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("embcomp fit: error: a.ckpt: ")
    assert not (tmp_path / "lightning_logs").exists()


def init_args(text: str) -> dict[str, Any]:
    [callback] = yaml.safe_load(text)["trainer"]["callbacks+"]
    assert callback["class_path"] == "lightning_embcomp.DimensionPruning"
    return callback["init_args"]


def test_commented_lines_are_the_defaults() -> None:
    text = Path(_FRAGMENT).read_text()
    shown = init_args(re.sub(r"^( +)# (?!budget)(\w+: )", r"\1\2", text, flags=re.MULTILINE))
    assert set(shown["schedule"]) == set(asdict(PruningSchedule()))
    assert set(shown["granularity"]) == set(asdict(Granularity()))
    schedule = {**shown["schedule"], "early_steps": tuple(shown["schedule"]["early_steps"])}
    assert PruningSchedule(**schedule) == PruningSchedule()
    assert Granularity(**shown["granularity"]) == Granularity()
    callback = DimensionPruning(target=0.5)
    assert shown["scope"] == callback.scope and shown["normalize"] == callback.normalize
    assert (shown["tables"],) == callback.patterns
    assert set(shown) | {"budget"} == {"target", "budget", "tables", "scope", "normalize", "schedule", "granularity"}


def test_every_setting_parses(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"^( +)# (?!target)(\w+: )", r"\1\2", Path(_FRAGMENT).read_text(), flags=re.MULTILINE)
    text = text.replace("target: 0.8", "target: null").replace("[3, 6, 9, 30, 60, 90]", "[2, 5]")
    fragment = str(tmp_path / "all.yaml")
    Path(fragment).write_text(text.replace('tables: "*"', "tables: [t_user, t_item_*]"))
    with pytest.raises(SystemExit) as stop:
        run("fit", "-c", _EXAMPLE, "-c", fragment, "--print_config")
    assert stop.value.code == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [callback["class_path"].rsplit(".", 1)[1] for callback in callbacks] == [
        "ModelCheckpoint",
        "DimensionPruning",
    ]
    parsed = callbacks[1]["init_args"]
    assert parsed["budget"] == "2GB" and parsed["tables"] == ["t_user", "t_item_*"]
    assert parsed["schedule"]["early_steps"] == [2, 5]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target", "65", "for 65.0 % write 0.65"),
        ("schedule.every_n_steps", "0", "every_n_steps must be at least 1, not 0"),
        ("granularity.layout", "suffix", "takes 'prefix' or 'chunks', not 'suffix'"),
        ("targt", "0.5", "did you mean 'target'?"),
    ],
)
def test_mistakes_are_named(run: Run, name: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "-c", _EXAMPLE, "-c", _FRAGMENT, *TINY, f"--trainer.callbacks.init_args.{name}={value}")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_help_explains_every_option(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--trainer.callbacks.help", "lightning_embcomp.DimensionPruning")
    said = squeezed(capsys.readouterr().out)
    for option in ("target", "budget", "tables", "scope", "schedule", "granularity", "normalize"):
        assert f"--trainer.callbacks.{option}" in said
    for text in ("Fraction of the embedding weight bytes to remove", "like ``2GB``", "Globs of the tables to prune"):
        assert text in said
    of_class = "--trainer.callbacks.help=lightning_embcomp.DimensionPruning"
    for group, options in (("schedule", asdict(PruningSchedule())), ("granularity", asdict(Granularity()))):
        with pytest.raises(SystemExit):
            run("fit", of_class, f"--trainer.callbacks.{group}.help")
        said = squeezed(capsys.readouterr().out)
        for option in options:
            assert re.search(rf"{group}\.{option} \S+ [A-Z`{{]", said), f"{option} is not explained in: {said}"
