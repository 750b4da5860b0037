"""Maths and bytes of gradient thresholding against NumPy and hand-worked numbers."""

import numpy as np
import pytest
import torch

from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings, ValueType
from lightning_embcomp.methods.dct.functional import (
    averaged,
    largest,
    sampled_threshold,
    wanted_entries,
    whole_message,
)
from lightning_embcomp.methods.dct.module import ThresholdedParameter
from lightning_embcomp.methods.dct.wire import ALIGNMENT, decode, encode, encoded_bytes


def test_sampled_threshold_selects_about_as_many_as_wanted() -> None:
    grad = torch.randn(500_000, generator=torch.Generator().manual_seed(0)) ** 3
    for density in (0.1, 0.01, 0.001):
        found = sampled_threshold(
            grad, None, None, factor=1.0, gain=1.0, wanted=int(500_000 * density), samples=100_000, seed=1
        )
        share = float((grad.abs() >= found).double().mean()) / density
        # Four standard deviations of a binomial count among 100 000 samples, or as many as have 400 in the tail.
        assert abs(share - 1) < 4 / np.sqrt(min(100_000 * density, 400))


def test_small_parameters_have_exact_thresholds() -> None:
    source = torch.Generator().manual_seed(0)
    g, e, h = (torch.randn(900, generator=source) for _ in range(3))
    message = 0.5 * g.double().numpy() - h.double().numpy() + 0.25 * e.double().numpy()
    found = sampled_threshold(g, e, h, factor=0.5, gain=0.25, wanted=90, samples=1000, seed=0)
    assert found == pytest.approx(np.sort(np.abs(message))[-90], rel=1e-5)


def test_threshold_of_nothing_but_zeros_or_nan() -> None:
    for value in (0.0, torch.nan, torch.inf):
        grad = torch.full((50,), value)
        assert 0 < sampled_threshold(grad, None, None, factor=1, gain=1, wanted=5, samples=1000, seed=0) < 1e-37


@pytest.mark.parametrize("count", [1, 7, 50])
def test_largest_with_equal_values(count: int) -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(-5, 6, 50)).float()
    kept, smallest = largest(values, count)
    wanted = np.sort(np.argsort(-np.abs(values.numpy()), kind="stable")[:count])
    np.testing.assert_array_equal(kept, wanted)
    assert smallest == np.abs(values.numpy())[wanted].min()


def test_whole_message_by_hand() -> None:
    # e = 2, g = 3, h = 1, eta = 0.25: before the message e has become 2 + 3 - 1 = 4.
    residual, estimate = torch.tensor([4.0]), torch.tensor([1.0])
    message = whole_message(torch.tensor([3.0]), residual, estimate, factor=1.0, gain=0.25)
    assert message.item() == estimate.item() == 3 + 0.25 * 2
    assert residual.item() == 0.75 * 2


def test_whole_messages_of_some_weight_average() -> None:
    estimate = torch.zeros(1)
    for t, gradient in enumerate([2.0, 6.0, 1.0]):
        assert (
            whole_message(torch.tensor([gradient]), None, estimate, factor=1.0, gain=1.0, weight=1 / (t + 1))
            == gradient
        )
    assert estimate.item() == pytest.approx(3.0)


def test_wanted_entries() -> None:
    assert [wanted_entries(n, 0.01) for n in (1, 149, 151, 10_000)] == [1, 1, 2, 100]


def test_averaged_keeps_what_is_owed_to_the_mean_gradient() -> None:
    states = [torch.tensor([1.0, 3.0]), torch.tensor([5.0, -3.0])]
    assert averaged(states).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("value_type", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e30])
@pytest.mark.parametrize("numel", [1, 65_536, 200_001])
def test_messages_arrive(value_type: ValueType, size: float, numel: int) -> None:
    rng = np.random.default_rng(0)
    indices = np.sort(rng.choice(numel, min(numel, 3000), replace=False)).astype(np.int32)
    values = (rng.standard_normal(indices.size) * size).astype(np.float32)
    message = encode(torch.from_numpy(indices), torch.from_numpy(values), numel, value_type)
    assert message.data.numel() == encoded_bytes(indices.size, numel, value_type)
    assert message.data.numel() % ALIGNMENT == 0
    bits = {"fp32": 24, "fp16": 11, "bf16": 8}[value_type]
    # A longer buffer, as when another worker sends more.
    data = torch.cat([message.data, torch.full((16,), 255, dtype=torch.uint8)])
    where, what = decode(data, indices.size, numel, value_type, message.exponent)
    np.testing.assert_array_equal(where, indices)
    np.testing.assert_array_equal(what, message.values)
    np.testing.assert_allclose(what, values, rtol=2.0**-bits, atol=np.abs(values).max() * 2.0**-38)


def test_an_empty_message() -> None:
    message = encode(torch.empty(0, dtype=torch.int32), torch.empty(0), 100, "fp16")
    where, what = decode(message.data, 0, 100, "fp16", message.exponent)
    assert where.numel() == what.numel() == 0


def test_bytes_at_one_percent() -> None:
    """Against the 4 bytes of a dense entry, at least 40 times fewer."""
    for value_type, ratio in (("fp32", 60), ("fp16", 90)):
        assert encoded_bytes(100_000, 10_000_000, value_type) * ratio < 4 * 10_000_000  # type: ignore[arg-type]


def parameter(kind: str = "ec", numel: int = 2000, **thresholds: float) -> ThresholdedParameter:
    return ThresholdedParameter(
        "p",
        numel,
        torch.device("cpu"),
        density=0.05,
        feedback=ErrorFeedback(kind=kind),  # type: ignore[arg-type]
        thresholds=ThresholdSettings(**thresholds),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["ec", "ef21", "econtrol", "none"])
def test_cap_is_exact(kind: str) -> None:
    state, source = parameter(kind), torch.Generator().manual_seed(0)
    for step in range(20):
        grad = (step + 1) * torch.randn(2000, generator=source)
        selection = state.select(grad, 1.0)
        assert selection.values.numel() <= 100 and selection.finite and not selection.too_many
        state.sent(selection.indices, selection.values)


def test_momentum_by_hand() -> None:
    state = ThresholdedParameter(
        "p",
        1,
        torch.device("cpu"),
        density=0.05,
        feedback=ErrorFeedback(kind="ef21", momentum=0.25),
        thresholds=ThresholdSettings(),
    )
    # Dense steps send the gradient, and the estimate becomes the mean of those.
    assert state.send_all(torch.tensor([4.0]), 1.0, added=False, weight=1.0).item() == 4.0
    assert state.average is not None and state.average.item() == 4.0
    selection = state.select(torch.tensor([2.0]), 0.5)  # a factor of 0.5: 0.25 * 4 + 0.75 * 1
    assert state.average.item() == 1.75 and selection.values.item() == 1.75 - 4.0
    # All exchange this step whole after all: what is sent is the running mean.
    assert state.send_all(torch.tensor([2.0]), 0.5, added=True, weight=1.0).item() == 1.75
    assert state.estimate is not None and state.estimate.item() == 1.75


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["ec", "ef21", "econtrol", "none"])
def test_non_finite_gradients_are_always_found(kind: str, value: float) -> None:
    state, source = parameter(kind), torch.Generator().manual_seed(0)
    for place in (None, 0, 1999):
        grad = torch.randn(2000, generator=source) * (1 if place is None else 100)  # far more than wanted
        if place is not None:
            grad[place] = value
        state.remember()
        assert state.select(grad, 1.0).finite == (place is None)
        state.settle(skipped=place is not None)


def test_a_saved_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter 'p' has 2000 entries as residual, and the saved state has nothing"):
        parameter("ec").load_state_dict(parameter("none").state_dict())
    with pytest.raises(ValueError, match="has 2000 entries as residual, and the saved state has 100 entries"):
        parameter("ec").load_state_dict(parameter("ec", numel=100).state_dict())


@pytest.mark.parametrize("kind", ["ec", "ef21", "econtrol", "none"])
def test_states_from_before_running_means(kind: str) -> None:
    """Where there is no running mean its length has no effect; elsewhere it is named, and nothing is taken over."""
    old = parameter(kind)
    old.select(torch.randn(2000, generator=torch.Generator().manual_seed(0)), 1.0)
    state = {key: value for key, value in old.state_dict().items() if key != "seen"}
    new = parameter(kind)
    if kind in ("ec", "none"):
        new.load_state_dict(state)
        assert new.seen == 0 and new.threshold == old.threshold
        return
    with pytest.raises(ValueError, match="the saved state of parameter 'p' lacks 'seen': another version"):
        new.load_state_dict(state)
    assert new.average is not None and not new.average.any() and new.threshold is None


def test_what_a_saved_state_lacks_is_named() -> None:
    state = {key: value for key, value in parameter().state_dict().items() if key not in ("age", "refreshes")}
    with pytest.raises(ValueError, match="parameter 'p' lacks 'age', 'refreshes'.*start over with empty residuals"):
        parameter().load_state_dict(state)
