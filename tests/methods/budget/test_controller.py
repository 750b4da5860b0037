"""The controller on response curves whose best end is known by hand."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lightning_embcomp.methods.budget.config import BudgetControl
from lightning_embcomp.methods.budget.functional import widths_within
from lightning_embcomp.methods.budget.module import BudgetController

START = 1_000_000
NE = 0.8


class Curve:
    """Bytes fall by an e-fold per unit that a method is squeezed, and NE rises linearly with the units.

    Args:
        costs: Relative NE per e-fold of each method.
        most: E-folds that a method can be squeezed by.
        later: Further cost per e-fold that shows at the next event only.
    """

    def __init__(self, costs: Mapping[str, float], most: Mapping[str, float] | None = None, later: float = 0.0) -> None:
        self.costs, self.most, self.late = dict(costs), dict(most or {}), later
        self.units = dict.fromkeys(costs, 0.0)
        self.shown = 0.0  # units whose later cost shows
        self.level = NE
        self.restored = 0

    @property
    def methods(self) -> list[str]:
        return list(self.costs)

    def size(self) -> int:
        return round(START * math.exp(-sum(self.units.values())))

    def ne(self) -> float:
        loss = sum(self.costs[name] * units for name, units in self.units.items())
        return self.level * (1 + loss + self.late * self.shown)

    def act(self, method: str, target: int) -> None:
        units = self.units[method] + math.log(self.size() / target)
        self.units[method] = min(self.most.get(method, math.inf), max(0.0, units))

    def save(self) -> dict[str, Any]:
        return {"units": dict(self.units), "shown": self.shown}

    def restore(self, saved: dict[str, Any]) -> None:
        self.restored += 1
        self.units, self.shown = dict(saved["units"]), saved["shown"]

    def train(self) -> None:
        self.shown = sum(self.units.values())


def run(controller: BudgetController, curve: Curve, events: int) -> list[float]:
    """Prices after each event."""
    prices = []
    for _ in range(events):
        controller.event(curve)
        curve.train()
        prices.append(controller.price)
    controller.settle(curve)
    return prices


def controller_for(efolds: float, max_loss: float | None = 0.002, **control: Any) -> BudgetController:
    return BudgetController(
        round(START * math.exp(-efolds)),
        max_loss=max_loss,
        control=BudgetControl(**{"step": 0.25, "recovery": 0.0, **control}),
    )


def test_the_cheap_method_pays_for_the_whole_way() -> None:
    # 1.01 e-folds of 0.001 are 0.00101, inside 0.002; the first price is 0.002 per e-fold, below the 0.01 of width.
    curve, controller = Curve({"width": 0.01, "precision": 0.001}), controller_for(1.0)
    run(controller, curve, 8)
    assert controller.met(curve.size(), curve.ne())
    assert curve.units["width"] == 0.0
    assert 0.98 * controller.budget <= curve.size() <= controller.budget
    assert controller.rollbacks == 0 and controller.saved is None


def test_costs_and_price_are_those_worked_by_hand() -> None:
    curve, controller = Curve({"width": 0.01, "precision": 0.001}), controller_for(1.0)
    controller.event(curve)
    # 0.25 of an e-fold costs 0.0025 or 0.00025 of NE; the price starts at 0.002 per e-fold and has risen once, by half.
    assert controller.costs["width"] == pytest.approx(0.01, rel=1e-3)
    assert controller.costs["precision"] == pytest.approx(0.001, rel=1e-3)
    assert controller.price == pytest.approx(0.002 * 1.5, rel=1e-5)
    assert curve.units["precision"] == pytest.approx(0.25, rel=1e-4)


def test_a_budget_out_of_reach_ends_at_the_smallest_size_inside_the_guard() -> None:
    # Precision ends at 0.4 e-folds, for 0.0004 of NE. The other 0.0016 pay for 0.16 e-folds of width.
    curve = Curve({"width": 0.01, "precision": 0.001}, most={"precision": 0.4})
    controller = controller_for(1.0)
    run(controller, curve, 80)
    assert curve.ne() <= NE * 1.002
    assert 0.15 <= curve.units["width"] <= 0.1601
    assert not controller.met(curve.size(), curve.ne())


def test_the_price_rises_until_it_pays_for_the_dear_method() -> None:
    curve, controller = Curve({"width": 0.01}), controller_for(0.5, max_loss=0.1)
    controller.control = BudgetControl(step=0.25, price_rate=0.5)
    controller.price = 0.001  # 0.001 * 1.5**n reaches 0.01 at n = 6
    prices = run(controller, curve, 5)
    assert curve.units["width"] == 0.0 and prices == sorted(prices)
    run(controller, curve, 5)
    assert controller.met(curve.size(), curve.ne())


def test_the_price_stays_near_what_the_guard_allows() -> None:
    curve, controller = Curve({"width": 0.01, "precision": 0.02}), controller_for(1.0)  # 0.002 pays for 0.2 e-folds
    prices = run(controller, curve, 40)
    assert not controller.met(curve.size(), curve.ne()) and curve.units["width"] > 0.19
    # Twice the cost of the smallest step, 0.01 e-folds for all of 0.002, and one rise after that; 1.5 ** 40 without.
    assert 0.1 < max(prices) <= 2 * 0.2 * 1.5


def test_harm_that_shows_later_is_rolled_back_to_the_very_state() -> None:
    curve, controller = Curve({"width": 0.001}, later=0.02), controller_for(1.0)
    report = controller.event(curve)
    assert report.acted == "width" and controller.saved is not None
    curve.train()
    report = controller.event(curve)  # 0.25 * 0.021 is more than 0.002
    assert report.rolled_back and report.size == START
    assert curve.units == {"width": 0.0} and controller.saved is None
    assert controller.step == 0.125 and controller.price == pytest.approx(0.002, rel=1e-5)
    run(controller, curve, 60)
    assert curve.ne() <= NE * 1.002 and curve.units["width"] > 0.06  # of 0.002 / 0.021 = 0.095


def test_a_rise_without_a_step_is_not_rolled_back_and_lowers_the_price() -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(0.25)
    run(controller, curve, 3)
    assert controller.met(curve.size(), curve.ne())
    before, restored = controller.price, curve.restored
    curve.level = 0.9
    report = controller.event(curve)
    assert not report.inside and not report.rolled_back and curve.restored == restored
    assert controller.price < before


@pytest.mark.parametrize(("window", "follows"), [(None, False), (4, True)])
def test_only_a_window_lets_the_reference_follow(window: int | None, follows: bool) -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(0.25, window=window)
    run(controller, curve, 3)
    curve.level = 0.9
    run(controller, curve, 30)
    assert controller.met(curve.size(), curve.ne()) is follows
    # Outside the guard bytes come back once the price is below what the method costs.
    assert (curve.size() == START) is not follows


def test_a_given_reference_is_reached_before_the_first_step() -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(1.0)
    controller.given = NE
    curve.level = 0.85
    run(controller, curve, 5)
    assert curve.size() == START and not controller.started
    curve.level = NE
    run(controller, curve, 8)
    assert controller.met(curve.size(), curve.ne())


def test_bytes_below_the_budget_are_given_back() -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(0.5)
    curve.units["width"] = 1.5
    run(controller, curve, 8)
    assert 0.98 * controller.budget <= curve.size() <= controller.budget


def test_without_a_guard_methods_act_in_turn() -> None:
    curve, controller = Curve({"width": 0.5, "precision": 0.1}), controller_for(1.0, max_loss=None)
    run(controller, curve, 6)
    assert 0.98 * controller.budget <= curve.size() <= controller.budget
    assert curve.restored == 0 and min(curve.units.values()) >= 0.25


def test_a_run_that_would_end_outside_the_guard_goes_back_to_the_last_good_state() -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(0.5)
    run(controller, curve, 5)
    for _ in range(2):
        controller.event(curve)  # met: kept, the last time at 0.5 e-folds
    good = curve.units["width"]
    curve.units["width"] = 0.7
    curve.level = 0.9  # for other reasons; not within what a step may cost
    report = controller.finish(curve)
    assert report.rolled_back and report.inside and curve.units["width"] == good
    assert controller.met(report.size, report.ne) and controller.kept is None


@pytest.mark.parametrize("control", [{"window": 50}, {"keep_good": False}])
def test_a_stream_keeps_no_state(control: dict[str, Any]) -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(0.5, **control)
    run(controller, curve, 6)
    assert controller.met(curve.size(), curve.ne()) and controller.kept is None
    curve.level = 0.9
    assert not controller.finish(curve).rolled_back


def test_of_states_above_the_budget_the_smallest_is_kept() -> None:
    curve = Curve({"width": 0.01})  # 0.002 of NE pays for 0.2 e-folds
    controller = controller_for(1.0, price_rate=5.0, patience=1)
    run(controller, curve, 12)
    assert not controller.met(curve.size(), curve.ne())
    for _ in range(2):
        controller.event(curve)
    smallest = curve.units["width"]
    assert smallest > 0.1
    curve.level = 0.81
    for _ in range(20):
        controller.event(curve)
    assert curve.units["width"] < smallest  # bytes were given back outside the guard
    curve.level = NE
    assert controller.finish(curve).rolled_back and curve.units["width"] == smallest


def test_bytes_are_given_back_after_an_epoch_and_three_events_outside() -> None:
    for epoch, control, events in ((0, {}, 3), (8, {}, 11), (8, {"window": 5}, 3), (8, {"patience": 2}, 2)):
        curve, controller = Curve({"width": 0.001}), controller_for(0.25, **control)
        controller.epoch = epoch
        run(controller, curve, 3)
        size, controller.price = curve.size(), 1e-9
        curve.level = 0.9
        for _ in range(events - 1):
            assert controller.event(curve).acted is None
        assert curve.size() == size and controller.event(curve).acted == "width" and curve.size() > size


def test_a_run_that_was_never_compressed_keeps_no_state() -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(-1.0)  # twice as much as there is
    run(controller, curve, 3)
    assert controller.met(curve.size(), curve.ne()) and controller.kept is None


def test_what_is_not_ready_is_only_measured() -> None:
    curve, controller = Curve({"width": 0.001}), controller_for(1.0)
    report = controller.event(curve, ready=False)
    assert report.ne == NE == controller.reference and not controller.started and curve.size() == START


def test_a_saved_controller_goes_on_as_if_it_had_not_stopped() -> None:
    curve, controller = Curve({"width": 0.004, "precision": 0.001}, later=0.002), controller_for(1.0)
    run(controller, curve, 2)
    controller.event(curve)
    other_curve, other = copy.deepcopy(curve), controller_for(1.0)
    other.load_state_dict(copy.deepcopy(controller.state_dict()))
    assert run(controller, curve, 20) == run(other, other_curve, 20)
    assert curve.units == other_curve.units and controller.state_dict() == other.state_dict()


def test_widths_fit_and_no_other_choice_of_those_bytes_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(30, 3, generator=generator).cumsum(1).flip(1).double()
    size = torch.tensor([[0, 10, 20]]) * torch.randint(1, 9, (30, 1), generator=generator)
    chosen = widths_within(cost, size, budget=800)
    taken = size.gather(1, chosen[:, None]).sum()
    assert taken <= 800
    best = (cost.gather(1, chosen[:, None]).sum()).item()
    for _ in range(2000):  # random choices that take no more bytes are no better
        other = torch.randint(0, 3, (30,), generator=generator)
        if size.gather(1, other[:, None]).sum() <= taken:
            assert cost.gather(1, other[:, None]).sum().item() >= best
