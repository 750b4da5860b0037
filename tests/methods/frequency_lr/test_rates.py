"""Every update rule over 100 steps against NumPy, wherever rows are trained."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_embcomp.engine.counters import CounterSettings, counters_of
from lightning_embcomp.engine.host import HeldTable, OneEngine
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.plan import FixedPlan, ReadPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.kernels.dispatch import force_backend
from lightning_embcomp.methods.frequency_lr.functional import lookup_frequency
from lightning_embcomp.methods.frequency_lr.module import FrequencyRates

from .reference import NumpySGD

ROWS, DIM, STEPS, LR = (50, 9), 8, 100, 0.3
TABLES = tuple(LogicalTable(name=f"t{t}", rows=rows, dim=DIM, chunks=2) for t, rows in enumerate(ROWS))
EXACT = CounterSettings(encoding="exact", counted="presence")
RULES: dict[str, dict[str, Any]] = {
    "running": {"form": "running"},
    "occurrence": {"form": "running", "counted": "occurrence"},
    "half-life": {"form": "running", "half_life": 7.0},
    "occurrence, half-life": {"form": "running", "counted": "occurrence", "half_life": 2.5},
    "short half-life": {"form": "running", "half_life": 0.5},
    "horizon": {"form": "horizon"},
    "known": {"form": "known"},
    "known occurrence": {"form": "known", "counted": "occurrence"},
    "cap": {"form": "running", "max_rate": 0.1},
}


def make_engine(kind: str, sparse: bool = False) -> RoutedEmbeddings:
    """Two tables of whole rows, fused SGD or rows of an optimizer from outside."""
    spec = FusedOptimizerSpec(kind="sgd", options={"learning_rate": LR}) if kind == "fused" else None
    engine = RoutedEmbeddings(TABLES, (0, 0, 1), options=RoutedOptions(optimizer=spec, sparse=sparse))
    engine.move(FixedPlan([2, 2]))
    generator = torch.Generator().manual_seed(1)
    for t, rows in enumerate(ROWS):
        engine.load_rows(t, 0, torch.randn(rows, DIM, generator=generator))
    return engine


def held_tables(engine: RoutedEmbeddings) -> list[HeldTable]:
    host = OneEngine(engine)
    return [HeldTable(host, t, table.name) for t, table in enumerate(engine.tables)]


def add_rates(engine: RoutedEmbeddings, rule: dict[str, Any], encoding: str = "exact") -> FrequencyRates:
    settings: dict[str, Any] = {"encoding": encoding, "counted": "presence"}
    settings.update((key, rule[key]) for key in ("counted", "half_life") if key in rule)
    rates = FrequencyRates(
        held_tables(engine),
        form=rule["form"],
        counter=CounterSettings(**settings),
        max_rate=rule.get("max_rate"),
        owner="test",
    )
    rates.set_horizon(STEPS)
    if rule["form"] == "known":
        for table, counts in zip(rates.tables, id_counts(), strict=True):
            rates.set_occurrences(table, counts, STEPS)
    return rates


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Bags of 0 to 5 skewed ids for 6 examples and 3 features."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (18,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    counts = lengths.view(3, 6).sum(1).tolist()
    ids = [(torch.rand(n, generator=generator) ** 3 * ROWS[t]).long() for n, t in zip(counts, (0, 0, 1), strict=True)]
    return torch.cat(ids), offsets


def id_counts() -> list[Tensor]:
    """Occurrences of every row over all steps."""
    totals = [torch.zeros(rows, dtype=torch.int64) for rows in ROWS]
    for step in range(STEPS):
        ids, offsets = batch(step)
        split = int(offsets[12])
        for t, part in enumerate((ids[:split], ids[split:])):
            totals[t] += torch.bincount(part, minlength=ROWS[t])
    return totals


def presence_by_hand(counts: Tensor) -> np.ndarray:
    """Probability that one of the draws of a step is row k."""
    occurrences = np.maximum(counts.numpy().astype(float), 1)
    share = occurrences / occurrences.sum()
    return 1 - (1 - share) ** (occurrences.sum() / STEPS)


def references(engine: RoutedEmbeddings, rule: dict[str, Any]) -> list[NumpySGD]:
    kept = {key: rule[key] for key in ("form", "counted", "half_life") if key in rule}
    made = []
    for t, counts in enumerate(id_counts()):
        occurrence = rule.get("counted") == "occurrence"
        frequency = np.maximum(counts.numpy(), 1) / STEPS if occurrence else presence_by_hand(counts)
        weight = engine.read_rows(t, 0, ROWS[t]).numpy()
        made.append(
            NumpySGD(weight, lr=LR, horizon=STEPS, frequency=frequency, cap=rule.get("max_rate", np.inf), **kept)
        )
    return made


def run(engine: RoutedEmbeddings, numpy: list[NumpySGD], optimizer: torch.optim.Optimizer | None) -> None:
    """100 steps with a fixed, skewed loss; NumPy gets the gradient of each occurrence by hand."""
    for step in range(STEPS):
        ids, offsets = batch(step)
        pooled = engine(ids, offsets)
        # d/dx of sum(sin x) is cos x; every id of a bag gets the gradient of the bag.
        grad = pooled.detach().cos().double().numpy()
        if optimizer is not None:
            optimizer.zero_grad()
        pooled.sin().sum().backward()
        if optimizer is not None:
            optimizer.step()
        per_table: list[tuple[list[int], list[np.ndarray]]] = [([], []), ([], [])]
        for bag in range(18):
            feature, example = divmod(bag, 6)
            for i in range(int(offsets[bag]), int(offsets[bag + 1])):
                table = per_table[0 if feature < 2 else 1]
                table[0].append(int(ids[i]))
                table[1].append(grad[example, feature * DIM : (feature + 1) * DIM])
        for reference, (rows, grads) in zip(numpy, per_table, strict=True):
            reference.step(rows, np.array(grads))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rule", RULES)
def test_fused_rows(rule: str, backend: str) -> None:
    engine = make_engine("fused")
    add_rates(engine, RULES[rule])
    numpy = references(engine, RULES[rule])
    with force_backend(backend):  # type: ignore[arg-type]
        run(engine, numpy, None)
    for t, reference in enumerate(numpy):
        np.testing.assert_allclose(engine.read_rows(t, 0, ROWS[t]).numpy(), reference.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_another_optimizer(rule: str, sparse: bool) -> None:
    engine = make_engine("trained", sparse)
    add_rates(engine, RULES[rule])
    numpy = references(engine, RULES[rule])
    for rows in engine.classes:
        rows.learning_rate = LR  # type: ignore[attr-defined]
    run(engine, numpy, torch.optim.SGD(engine.parameters(), lr=LR))
    for t, reference in enumerate(numpy):
        np.testing.assert_allclose(engine.read_rows(t, 0, ROWS[t]).numpy(), reference.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fused", "trained"])
@pytest.mark.parametrize("rule", ["running", "half-life", "occurrence, half-life"])
def test_counts_are_those_of_numpy(rule: str, kind: str) -> None:
    engine = make_engine(kind)
    rates = add_rates(engine, RULES[rule])
    numpy = references(engine, RULES[rule])
    run(engine, numpy, None)
    counters = counters_of(engine)
    assert counters is not None
    for t, reference in enumerate(numpy):
        np.testing.assert_allclose(counters.counts(t).numpy(), reference.count, rtol=1e-5)
    assert rates.bytes_per_row() == 4.0


@pytest.mark.parametrize("half_life", [None, 4.0])
def test_log_counters_follow_the_exact_ones(half_life: float | None) -> None:
    """The mean over rows that are looked up alike; one counter alone is rough."""
    table = (LogicalTable(name="t", rows=4000, dim=4),)
    engine = RoutedEmbeddings(table, options=RoutedOptions(optimizer=FusedOptimizerSpec(kind="sgd")))
    engine.move(FixedPlan([1]))
    counter = CounterSettings(half_life=half_life)
    FrequencyRates(held_tables(engine), form="running", counter=counter, max_rate=None, owner="test")
    expected = 0.0
    for step in range(60):  # with the half-life, sweeps happen after 32 steps
        expected = expected * (1.0 if half_life is None else 0.5 ** (1 / half_life)) + (step % 3 != 0)
        ids = torch.arange(4000) if step % 3 else torch.empty(0, dtype=torch.int64)
        offsets = torch.tensor([0, ids.numel()])
        engine(ids, offsets).sum().backward()
    counters = counters_of(engine)
    assert counters is not None
    counts = counters.counts(0)
    assert float(counts.mean()) == pytest.approx(expected, rel=0.03)
    assert float(counts.std()) < 0.25 * expected
    assert (counters.halvings > 0) == (half_life is not None)


def test_rows_without_storage_are_counted() -> None:
    engine = make_engine("fused")
    add_rates(engine, RULES["running"])
    codes = [torch.arange(rows).remainder(3).to(torch.uint8) for rows in ROWS]
    engine.move(ReadPlan(lambda t, start, stop: codes[t][start:stop]))
    numpy = references(engine, RULES["running"])
    run(engine, numpy, None)
    counters = counters_of(engine)
    assert counters is not None
    for t, reference in enumerate(numpy):
        np.testing.assert_array_equal(counters.counts(t).numpy(), reference.count)


@pytest.mark.parametrize("kind", ["fused", "trained"])
def test_evaluation_counts_nothing(kind: str) -> None:
    engine = make_engine(kind)
    add_rates(engine, RULES["running"])
    counters = counters_of(engine)
    assert counters is not None
    engine.eval()
    engine(*batch(0)).sum().backward()
    engine.train()
    with torch.no_grad():
        engine(*batch(0))
    with torch.inference_mode():
        engine(*batch(0))
    engine(*batch(0))  # a forward pass alone is no step
    assert counters.step == 0 and not counters.counts(0).any()
    engine(*batch(0)).sum().backward()
    assert counters.step == 1 and counters.counts(0).any()


def test_the_rate_of_a_scheduler_is_what_is_scaled() -> None:
    moved = []
    for rate in (0.1, 0.4):
        engine = make_engine("fused")
        add_rates(engine, RULES["running"])
        before = engine.read_rows(0, 0, ROWS[0])
        engine.set_learning_rate(rate)
        engine(*batch(0)).sum().backward()
        moved.append(engine.read_rows(0, 0, ROWS[0]) - before)
    torch.testing.assert_close(moved[1], 4 * moved[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoding", ["exact", "log"])
@pytest.mark.parametrize("rule", ["running", "half-life", "known", "horizon"])
def test_a_restored_engine_goes_on_bit_for_bit(rule: str, encoding: str) -> None:
    def steps(engine: RoutedEmbeddings, first: int, last: int) -> None:
        for step in range(first, last):
            engine(*batch(step)).sin().sum().backward()

    through, half, other = (make_engine("fused") for _ in range(3))
    for engine in (through, half, other):
        add_rates(engine, RULES[rule], encoding)
    steps(through, 0, 40)
    steps(half, 0, 25)
    saved = {key: value.clone() for key, value in half.state_dict().items()}
    steps(other, 50, 53)  # what it was before does not matter
    other.load_state_dict(saved)
    steps(other, 25, 40)
    one, two = through.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and any("count" in key or "freq" in key for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_counters_of_another_encoding_are_not_read() -> None:
    exact, log = make_engine("fused"), make_engine("fused")
    add_rates(exact, RULES["running"])
    add_rates(log, RULES["running"], "log")
    with pytest.raises(RuntimeError, match="counter.log"):
        log.load_state_dict(exact.state_dict())


def test_known_frequencies_in_one_byte_are_close() -> None:
    rates = add_rates(make_engine("fused"), RULES["known"], "log")
    for table, counts in zip(rates.tables, id_counts(), strict=True):
        exact = lookup_frequency(counts, STEPS, presence=True).mul(STEPS).rsqrt()
        found = rates.multipliers(table.shards[0], torch.arange(table.logical.rows))[1]
        assert float((found / exact).log().abs().max()) < 0.2
    assert rates.bytes_per_row() == 1.0


def test_two_lookups_before_one_backward_pass() -> None:
    """A module may look one engine up twice; each lookup is a step of its own."""
    engine = make_engine("trained")
    add_rates(engine, RULES["running"])
    loss = engine(*batch(0)).sum() + engine(*batch(1)).sum()
    loss.backward()
    counters = counters_of(engine)
    assert counters is not None and counters.step == 2
    assert isinstance(engine.class_1, nn.Parameter) and engine.class_1.grad is not None
