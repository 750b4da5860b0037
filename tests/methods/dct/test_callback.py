"""GradientThresholding in Lightning: settings, refusals, and several gloo processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from torch import nn

from lightning_embcomp.callback import SetupError
from lightning_embcomp.methods.dct.callback import GradientThresholding
from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings

from .launch import check

_FRAGMENT = Path(__file__).resolve().parents[3] / "callbacks" / "dct.yaml"


def test_two_processes(tmp_path: Path) -> None:
    """Density 1 is plain DDP; resumed runs end alike; skipped steps leave residuals alone; other hooks are refused."""
    check("callback_worker.py", 2, str(tmp_path), "equals_plain", "resume", "skipped_steps", "refusals")


def test_sharded_tables(tmp_path: Path) -> None:
    """Under TorchRecStrategy."""
    check("callback_worker.py", 2, str(tmp_path), "sharded")


def test_another_number_of_processes(tmp_path: Path) -> None:
    check("callback_worker.py", 2, str(tmp_path), "write")
    check("callback_worker.py", 3, str(tmp_path), "read")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "density must be over 0 and at most 1, not 0.0"),
        ({"density": 5}, "for 5 % write 0.05"),
        ({"density": float("nan")}, "density must be over 0"),
        ({"value_dtype": "int8"}, "value_dtype must be one of 'fp32', 'fp16', 'bf16', not 'int8'"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, not -1"),
        ({"min_numel": -1}, "min_numel must not be negative"),
        ({"parameters": []}, "give at least one glob"),
        (
            {"density": 0.01, "feedback": ErrorFeedback(kind="econtrol", eta=0.02)},
            "eta=0.02 is above the density 0.01: residuals can grow without end. Use about 0.0025",
        ),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GradientThresholding(**settings)


def test_large_eta_can_be_asked_for() -> None:
    feedback = ErrorFeedback(kind="econtrol", eta=0.02, allow_large_eta=True)
    assert GradientThresholding(0.01, feedback=feedback).feedback.gain(0.01) == 0.02


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        (ErrorFeedback, {"kind": "ef22"}, "kind must be one of 'ec', 'ef21', 'econtrol', 'none', not 'ef22'"),
        (ErrorFeedback, {"kind": "ec", "eta": 0.1}, "eta has no effect with kind='ec'"),
        (ErrorFeedback, {"kind": "econtrol", "eta": 0.0}, "eta must be over 0"),
        (ErrorFeedback, {"kind": "ec", "momentum": 0.9}, "momentum has no effect with kind='ec'"),
        (ErrorFeedback, {"kind": "ef21", "momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
        (ErrorFeedback, {"kind": "econtrol", "allow_large_eta": True}, "allow_large_eta has no effect"),
        (ThresholdSettings, {"life_span": 0}, "life_span must be at least 1"),
        (ThresholdSettings, {"samples": 10}, "samples must be at least 1000"),
        (ThresholdSettings, {"drift": 1.0}, "drift must be over 1"),
        (ThresholdSettings, {"max_overshoot": 1.0}, "max_overshoot must be over 1"),
    ],
)
def test_wrong_groups(group: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        group(**settings)


def test_one_process_is_refused() -> None:
    callback = GradientThresholding()
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False)
    with pytest.raises(SetupError, match=r"GradientThresholding\[\*\]: one process exchanges no gradients"):
        callback.setup(trainer, pl.LightningModule(), "fit")
    callback.setup(trainer, pl.LightningModule(), "validate")  # nothing is exchanged there


def test_other_strategies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = GradientThresholding()
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(SetupError, match="SingleDeviceStrategy does not reduce gradients by DistributedDataParallel"):
        callback.setup(trainer, pl.LightningModule(), "fit")


def test_parameters_are_chosen_by_glob_and_size() -> None:
    parameters = dict(nn.ModuleDict({"bottom": nn.Linear(20, 20), "top": nn.Linear(20, 300)}).named_parameters())
    assert GradientThresholding()._choose(parameters) == ["bottom.weight", "top.weight", "top.bias"]
    assert GradientThresholding(parameters=["*", "!top.*"])._choose(parameters) == ["bottom.weight"]
    assert GradientThresholding(parameters="!*.weight")._choose(parameters) == ["top.bias"]
    with pytest.raises(SetupError, match="matches 'middle"):
        GradientThresholding(parameters=["*", "!middle.*"])._choose(parameters)


@pytest.mark.parametrize(("density", "world_size", "warns"), [(0.5, 2, False), (1.0, 2, True), (0.05, 64, True)])
def test_densities_that_save_nothing_are_pointed_out(
    density: float, world_size: int, warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    GradientThresholding(density)._warn_if_larger([1_000_000], world_size)
    assert ["Lower the density" in str(w.message) for w in recwarn] == ([True] if warns else [])


def test_commented_lines_of_the_fragment_are_the_defaults() -> None:
    text = re.sub(r"^( +)# (\w+: )", r"\1\2", _FRAGMENT.read_text(), flags=re.MULTILINE)
    [callback] = yaml.safe_load(text)["trainer"]["callbacks+"]
    assert callback["class_path"] == "lightning_embcomp.GradientThresholding"
    shown = callback["init_args"]
    shown["parameters"] = (shown["parameters"],)
    default = GradientThresholding()
    assert ErrorFeedback(**shown.pop("feedback")) == default.feedback
    assert ThresholdSettings(**shown.pop("thresholds")) == default.thresholds
    assert shown.pop("parameters") == default.patterns
    assert shown == {name: getattr(default, name) for name in shown}
    assert set(shown) == {"density", "min_numel", "value_dtype", "warmup_steps", "log_every_n_steps"}
