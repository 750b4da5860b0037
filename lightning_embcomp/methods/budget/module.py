"""The controller: one price per byte, steps on probation, and the way back to the last good state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_embcomp.methods.budget.config import BudgetControl
from lightning_embcomp.methods.budget.functional import (
    Offer,
    best_offer,
    cost_of,
    first_price,
    next_price,
    saves_enough,
)

_SMALLEST_STEP = 0.01
_HEADROOM = 2.0  # of the price over the dearest step that stays inside the guard
_REGAIN = 1.5  # growth of the step after one that was kept
_PATIENCE = 3  # events outside the guard before bytes are given back: NE of a model in training is not smooth


class Plant(Protocol):
    """What is controlled: a model whose methods can make its tables smaller or larger."""

    @property
    def methods(self) -> Sequence[str]:
        """Methods that can act now."""

    def size(self) -> int:
        """Bytes that count."""

    def ne(self) -> float:
        """Validation NE."""

    def act(self, method: str, target: int) -> None:
        """Let one method bring the bytes close to a number, as far as it can."""

    def save(self) -> dict[str, Any]:
        """A copy of all that training and the methods change."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Go back to a copy."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an event found and did.

    Args:
        size: Bytes after the event.
        ne: NE of the state after the event; NaN without a guard.
        inside: Whether the NE that the event found was inside the guard.
        rolled_back: Whether it went back to the last good state.
        acted: Method that made a step; None for none.
    """

    size: int
    ne: float
    inside: bool
    rolled_back: bool = False
    acted: str | None = None


class BudgetController:
    """Brings a size down to a budget, as long as the NE guard is kept.

    Args:
        budget: Bytes.
        max_loss: Relative increase of NE that is allowed; None for no guard, where methods act in turn.
        reference: NE that losses are counted from; None for the lowest measured in this run.
        control: How the price moves and how far a step goes.
        epoch: Events in an epoch; 0 if data have none.

    Attributes:
        price: The multiplier: relative NE that an e-fold of bytes may cost.
        step: Size of the next step, a logarithm.
        saved: State before the step that is on probation; None if none is.
        entered: Whether NE has been inside the guard, since tables started anew if they have.
        kept: The last state inside budget and guard, or the smallest inside the guard; None if none is held.
    """

    def __init__(
        self,
        budget: int,
        *,
        max_loss: float | None,
        reference: float | None = None,
        control: BudgetControl | None = None,
        epoch: int = 0,
    ) -> None:
        self.budget, self.max_loss, self.given, self.epoch = budget, max_loss, reference, epoch
        self.control = control or BudgetControl()
        self.price = 0.0
        self.step = self.control.step
        self.costs: dict[str, float] = {}
        self.saved: dict[str, Any] | None = None
        self.kept: dict[str, Any] | None = None
        self.rollbacks = 0
        self._history: list[float] = []
        self._first_size = 0
        self._good: tuple[int, float] = (0, math.nan)  # size and NE before the step on probation
        self._kept: tuple[int, float] = (0, math.nan)  # size and NE of the state that is kept
        self._last = ""
        self.entered = False
        self._low = math.inf  # NE since tables started anew
        self._waited = 0  # events outside the guard, or since that low

    @property
    def reference(self) -> float:
        """NE that losses are counted from; NaN before any was measured."""
        return self.given if self.given is not None else min(self._history, default=math.nan)

    @property
    def limit(self) -> float:
        """Largest NE inside the guard."""
        if self.max_loss is None or math.isnan(self.reference):
            return math.inf
        return self.reference * (1 + self.max_loss)

    @property
    def started(self) -> bool:
        """Whether steps have been possible."""
        return self.price > 0

    @property
    def patience(self) -> int:
        """Events outside the guard before bytes are given back."""
        if self.control.patience is not None:
            return self.control.patience
        return _PATIENCE + (self.epoch if self.control.window is None else 0)

    def inside(self, ne: float) -> bool:
        """Whether an NE is inside the guard."""
        return self.max_loss is None or ne <= self.limit

    def met(self, size: int, ne: float) -> bool:
        """Whether a state is inside budget and guard."""
        return size <= self.budget and self.inside(ne)

    def event(self, plant: Plant, *, ready: bool = True) -> Report:
        """Measure, settle the step on probation, move the price, and perhaps make a step.

        Args:
            plant: What is controlled.
            ready: Whether steps are allowed yet; before, NE is measured for the reference only.
        """
        settled = self.settle(plant)
        if settled.rolled_back or not ready:
            return settled
        size, ne, inside = settled.size, settled.ne, settled.inside
        self.entered = self.entered or inside
        if not self.entered:  # a model that has yet to come near its reference
            return self._await(plant, settled)
        self._start(size)
        self._move_price(size, inside)
        self._keep(plant, size, ne)
        self._waited = 0 if inside else self._waited + 1
        acted = None
        if inside and size > self.budget:
            acted = self._squeeze(plant, size, ne)
        elif self._waited >= self.patience or (inside and size < (1 - self.control.tolerance) * self.budget):
            acted = self._give_back(plant, size, inside)
        return Report(size=plant.size(), ne=ne, inside=inside, acted=acted) if acted else settled

    def start_over(self, plant: Plant) -> None:
        """Go all the way with the first method at once, because its tables start from fresh values.

        There is nothing trained to lose, and what comes of it shows only once the tables are trained again: no step is
        on probation, and nothing else is done until NE is inside the guard. If it stops falling before, bytes are given
        back.
        """
        size = plant.size()
        self._start(size)
        self.entered, self._low, self._waited = False, math.inf, 0
        if size > self.budget:
            self._last = plant.methods[0]
            plant.act(self._last, self._inside_band())

    def _start(self, size: int) -> None:
        if not self.started:
            self._first_size = size
            self.price = self._first_price()

    def _await(self, plant: Plant, settled: Report) -> Report:
        """Wait as long as NE falls."""
        self._waited = 0 if settled.ne < self._low else self._waited + 1
        self._low = min(self._low, settled.ne)
        if not self._last or self._waited < self.patience:
            return settled
        self._waited = 0
        self.price = next_price(
            self.price, size=settled.size, budget=self.budget, tolerance=1.0, inside=False, rate=self.control.price_rate
        )
        acted = self._grow(plant, settled.size, self._first_size, [self._last])
        return Report(size=plant.size(), ne=settled.ne, inside=False, acted=acted) if acted else settled

    def settle(self, plant: Plant) -> Report:
        """Measure, and keep or take back the step on probation."""
        size = plant.size()
        if self.max_loss is None:
            return Report(size=size, ne=math.nan, inside=True)
        ne = plant.ne()
        inside = ne <= self.limit
        if self.saved is not None and not inside:
            return self._roll_back(plant, size, ne)
        if self.saved is not None:
            self.saved = None
            self.step = min(self.control.step, self.step * _REGAIN)
        self._observe(ne)
        return Report(size=size, ne=ne, inside=inside)

    def finish(self, plant: Plant) -> Report:
        """Settle, and go back to the state that is kept, if the run would end outside the guard or larger."""
        settled = self.settle(plant)
        kept, self.kept = self.kept, None
        (size, ne), ends_inside = self._kept, self.inside(settled.ne)
        if kept is None or not self.inside(ne) or (ends_inside and settled.size <= max(size, self.budget)):
            return settled
        plant.restore(kept)
        return Report(size=plant.size(), ne=ne, inside=True, rolled_back=True)

    def _keep(self, plant: Plant, size: int, ne: float) -> None:
        """Hold on to a state inside the guard that the methods have made, if none is held that is smaller.

        With a window, the data drift: an old state has no claim to be better than the last one.
        """
        wanted = self.control.keep_good and self.max_loss is not None and self.control.window is None
        if not (wanted and self._last and self.inside(ne)):
            return
        if self.kept is None or size <= max(self._kept[0], self.budget) or not self.inside(self._kept[1]):
            self.kept, self._kept = plant.save(), (size, ne)

    def _observe(self, ne: float) -> None:
        self._history.append(ne)
        window = self.control.window
        self._history = [min(self._history)] if window is None else self._history[-window:]

    def _move_price(self, size: int, inside: bool) -> None:
        control = self.control
        self.price = next_price(
            self.price,
            size=size,
            budget=self.budget,
            tolerance=control.tolerance,
            inside=inside,
            rate=control.price_rate,
        )

    def _roll_back(self, plant: Plant, size: int, ne: float) -> Report:
        assert self.saved is not None
        good_size, good_ne = self._good
        plant.restore(self.saved)
        self.saved = None
        self.rollbacks += 1
        found = cost_of(Offer(method=self._last, size=size, ne=ne), size=good_size, ne=good_ne)
        self.costs[self._last] = max(self.costs.get(self._last, 0.0), found)
        self.step = max(_SMALLEST_STEP, self.step / 2)
        self._move_price(good_size, inside=False)
        return Report(size=plant.size(), ne=good_ne, inside=False, rolled_back=True)

    def _squeeze(self, plant: Plant, size: int, ne: float) -> str | None:
        target = max(round(size * math.exp(-self.step)), self._inside_band())
        if self.max_loss is None:
            return self._in_turn(plant, size, target)
        before = plant.save()
        offers = []
        for method in plant.methods:
            plant.act(method, target)
            offers.append(Offer(method=method, size=plant.size(), ne=plant.ne()))
            plant.restore(before)
        # A method that has come to its end makes no offer.
        offers = [offer for offer in offers if saves_enough(offer, size=size, target=target)]
        self.costs |= {offer.method: cost_of(offer, size=size, ne=ne) for offer in offers}
        self._cap_price(math.log(size / target))
        # What an offer may show at once, for its expected NE at the next event to be inside the guard.
        limit = ne + (self.limit - ne) / (1 - self.control.recovery)
        chosen = best_offer(offers, size=size, ne=ne, limit=limit, price=self.price)
        if chosen is None:
            if offers and all(offer.ne > limit for offer in offers):
                self.step = max(_SMALLEST_STEP, self.step / 2)
            return None
        plant.act(chosen.method, target)
        self.saved, self._good, self._last = before, (size, ne), chosen.method
        return chosen.method

    def _cap_price(self, step: float) -> None:
        """Stop the price where a step that it pays for would leave the guard: above, it only takes longer to fall."""
        assert self.max_loss is not None
        most = self.max_loss / (1 - self.control.recovery) / step
        self.price = min(self.price, max(_HEADROOM * most, self._first_price()))

    def _first_price(self) -> float:
        return first_price(self.max_loss or 1.0, size=self._first_size, budget=self.budget)

    def _in_turn(self, plant: Plant, size: int, target: int) -> str | None:
        """Without a guard nothing is known of costs: the methods take turns."""
        for method in sorted(plant.methods, key=lambda name: name == self._last):
            plant.act(method, target)
            if plant.size() < size:
                self._last = method
                return method
        return None

    def _give_back(self, plant: Plant, size: int, inside: bool) -> str | None:
        """Return bytes to the method whose last step cost most.

        Outside the guard only what costs more than the price is returned, so that a guard which is left for other
        reasons first lets the price fall.
        """
        most = self._inside_band() if inside else max(self._first_size, self.budget)
        return self._grow(
            plant, size, most, [name for name in plant.methods if inside or self.costs.get(name, 0.0) > self.price]
        )

    def _grow(self, plant: Plant, size: int, most: int, methods: Sequence[str]) -> str | None:
        """Let the first method that can take one step of bytes, up to a size."""
        target = min(round(size * math.exp(self.step)), most)
        if target <= size:
            return None
        for method in sorted(methods, key=lambda name: -self.costs.get(name, 0.0)):
            plant.act(method, target)
            if plant.size() > size:
                return method
        return None

    def _inside_band(self) -> int:
        """Bytes to aim at: the middle of what is left as it is."""
        return round(self.budget * (1 - self.control.tolerance / 2))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, the state before a step on probation included."""
        return {
            "price": self.price,
            "step": self.step,
            "costs": dict(self.costs),
            "saved": self.saved,
            "kept": self.kept,
            "kept_at": list(self._kept),
            "rollbacks": self.rollbacks,
            "history": list(self._history),
            "first_size": self._first_size,
            "good": list(self._good),
            "last": self._last,
            "entered": self.entered,
            "low": self._low,
            "waited": self._waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved run."""
        self.price, self.step = float(state["price"]), float(state["step"])
        self.costs = dict(state["costs"])
        self.saved, self.kept = state["saved"], state["kept"]
        self._kept = (int(state["kept_at"][0]), float(state["kept_at"][1]))
        self.rollbacks = int(state["rollbacks"])
        self._history = list(state["history"])
        self._first_size = int(state["first_size"])
        self._good = (int(state["good"][0]), float(state["good"][1]))
        self._last, self.entered = str(state["last"]), bool(state["entered"])
        self._low, self._waited = float(state["low"]), int(state["waited"])
