"""Row utilities: decay, and the mean gain of an occurrence."""

import pytest
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility import UtilityKind

TABLES = (LogicalTable(name="a", rows=3000, dim=4), LogicalTable(name="b", rows=3000, dim=4))


def utility(kind: UtilityKind = "gradient") -> RowUtility:
    return RowUtility(TABLES, kind=kind, device=torch.device("cpu"))


def observe(statistics: RowUtility, weights: Tensor | None = None) -> None:
    """Three bags of table a, with 2, 0 and 1 ids; three of table b, with 1, 1 and 0. Norms are 1 to 6."""
    layout = BagLayout(
        table=torch.tensor([0, 1]),
        bag_start=torch.tensor([0, 3, 6]),
        row_start=torch.tensor([0, 0]),
        column=torch.tensor([0, 4]),
        width=torch.tensor([4, 4]),
        mean=torch.tensor([0, 0]),
        shape=(3, 8),
    )
    norms = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # feature, sample
    grad = (norms.t() / 2).repeat_interleave(4, 1).contiguous()
    offsets = torch.tensor([0, 2, 2, 3, 4, 5, 5])
    statistics.observe(grad, torch.tensor([0, 1, 2, 0, 1]), offsets, layout, weights)


@pytest.mark.parametrize(
    ("kind", "weighted", "gain_a", "gain_b"),
    [
        ("gradient", False, (1 + 1 + 3) / 3, (4 + 5) / 2),
        ("gradient", True, (0.5 + 2 + 3 * 3) / 3, (4 * 0.25 + 5) / 2),
        ("frequency", True, 1.0, 1.0),
    ],
)
def test_mean_gain(kind: UtilityKind, weighted: bool, gain_a: float, gain_b: float) -> None:
    """The mean over occurrences of what each adds to its row's utility: its norm times the size of its weight."""
    statistics = utility(kind)
    weights = torch.tensor([0.5, -2.0, 3.0, -0.25, 1.0]) if weighted else None
    for _ in range(3):
        observe(statistics, weights)
    total, count = statistics.gain.unbind(1)
    assert (total / count).tolist() == pytest.approx([gain_a, gain_b])
    if kind == "gradient":
        added = [statistics.of_table(t).double().sum().item() / 3 for t in range(2)]
        assert added == pytest.approx([3 * gain_a, 2 * gain_b], rel=0.02)


@pytest.mark.parametrize("factor", [0.999, 0.995, 0.98])
def test_decays_over_steps_are_right_on_average(factor: float) -> None:
    statistics = utility()
    statistics.values.fill_(200.0)
    for step in range(100):
        statistics.step = step
        statistics.decay(0, factor)
    assert statistics.of_table(0).double().mean().item() == pytest.approx(200 * factor**100, rel=0.01)
    assert bool((statistics.of_table(1) == 200).all())


def test_decay_depends_on_step_and_table_alone() -> None:
    results = []
    for step in (5, 5, 6):
        statistics = utility()
        statistics.values.fill_(200.0)
        statistics.step = step
        statistics.decay(0, 0.999)
        statistics.decay(1, 0.999)
        results.append(statistics.values.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0][:3000], results[0][3000:])
