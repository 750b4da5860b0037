"""An engine on a GPU, rehearsed without one: tensors without data, and kernels that are not launched.

Tensors of PyTorch's fake mode refuse to meet tensors of another device, and to tell the host a value: a training step
that passes here mixes no devices and waits for nothing.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_embcomp.engine import extent
from lightning_embcomp.engine.attached import TableState
from lightning_embcomp.engine.bag_layout import pooled_layout
from lightning_embcomp.engine.extent import check_extent
from lightning_embcomp.engine.lookups import Call, DirectLookup
from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.route import watch
from lightning_embcomp.kernels.types import IdRoutes
from lightning_embcomp.kernels.update import update_rows
from tests.triton_process import run_interpreted

from .engines import KINDS, TABLES, batch, make_engine, random_codes

GPU = torch.device("cuda", 0)


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """The mode in which there seems to be a GPU."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    import lightning_embcomp.kernels.triton as shared

    def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, None, None]:
        return torch.empty(len(values), dtype=dtype, device=device), None, None

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: None)
    monkeypatch.setattr(shared, "_constant", constant)
    monkeypatch.setattr(watch, "report_later", lambda found, raise_for: None)
    monkeypatch.setattr(extent, "report_later", lambda found, raise_for: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", (*KINDS, "adam", "partial_rowwise_lamb"))
def test_a_training_step_stays_on_its_device_and_does_not_wait(
    kind: FusedKind, dtype: torch.dtype, weighted: bool, far_away: FakeTensorMode
) -> None:
    from lightning_embcomp.kernels.triton import widths_and_runs

    engine = make_engine(kind, random_codes(1), dtype=dtype, stochastic_rounding=weighted)
    engine.track_utility(RowUtility(TABLES, device=torch.device("cpu")))
    given = batch(0, weighted=weighted)
    widths_and_runs(engine.columns)  # read once per engine, outside of training steps
    known = engine.columns.__dict__["_widths_and_runs"]
    with far_away:
        engine.to(GPU)
        engine.columns.__dict__["_widths_and_runs"] = known
        ids, offsets, weights = (None if t is None else t.to(GPU) for t in given)
        assert ids is not None and offsets is not None
        layout = pooled_layout(engine.features, 8)
        call = Call(engine, layout, ids, check_extent(ids, offsets, weights), weights, engine.utility, engine.moves)
        rules = engine._direct_rules(weights)
        assert rules is not None
        # By hand: autograd asks for the streams of a GPU.
        context = SimpleNamespace()
        pooled = DirectLookup.forward(context, call, rules, torch.zeros(()))
        assert pooled.device == GPU and pooled.shape == (8, engine.output_dim)
        DirectLookup.backward(context, torch.ones_like(pooled))
    held: list[Any] = [*engine.split_embedding_weights(), engine.router.tensors.words, engine.columns.width]
    assert engine.utility is not None
    held += [tensor for state in engine.get_optimizer_state() for tensor in state.values()]
    held += [engine.utility.values, engine.utility.gain]
    assert {tensor.device for tensor in held} == {GPU}


def test_training_through_the_kernels_of_a_gpu_equals_that_of_the_cpu() -> None:
    """By Triton's interpreter."""
    differences = run_interpreted("tests.engine.interpreted")
    assert len(differences) == 5
    for name, (rows, utilities) in differences.items():
        assert rows < 1e-5, name
        assert utilities < 0.05, name  # a few units in the last place of bfloat16


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_graph_must_not_repeat_the_number_of_a_step(
    far_away: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, given = make_engine("adam"), batch(0)
    with far_away:
        engine.to(GPU)
        grad = torch.empty(8, engine.output_dim, device=GPU)
        ids, offsets = given.ids.to(GPU), given.offsets.to(GPU)
        routes = IdRoutes(row_class=ids.to(torch.uint8), slot=ids.to(torch.int32))
        tables, rules = engine.split_embedding_weights(), engine._direct_rules(None)
        assert rules is not None
        rest = (grad, routes, offsets, None, pooled_layout(engine.features, 8), engine.columns)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="the step number of fused adam: capture the dense part only"):
            update_rows(tables, tables, rules, *rest)


def test_what_cannot_leave_its_device_says_so(far_away: FakeTensorMode) -> None:
    engine = make_engine("sgd")
    engine.attach("counter", TableState())
    with far_away, pytest.raises(RuntimeError, match="counter of table 'a' works on cpu only so far, not on cuda:0"):
        engine.to(GPU)
    assert all(weights.device.type == "cpu" for weights in engine.split_embedding_weights())


def test_rows_are_not_lost_on_the_meta_device() -> None:
    with pytest.raises(RuntimeError, match="their rows would be lost"):
        make_engine("sgd").to("meta")


def test_dtypes_of_the_module_are_not_those_of_the_rows() -> None:
    engine = make_engine("sgd")
    engine.half()
    assert {weights.dtype for weights in engine.split_embedding_weights()} == {torch.float32}
