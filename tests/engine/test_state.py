"""Saving and restoring an engine, and what is said when that cannot be done."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.statistics import RowUtility

from .engines import TABLES, assert_same_state, make_engine, random_codes, snapshot, train


def tracked(kind: FusedKind | None, seed: int | None) -> RoutedEmbeddings:
    engine = make_engine(kind, None if seed is None else random_codes(seed))
    engine.track_utility(RowUtility(TABLES, device=torch.device("cpu")))
    return engine


@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad", None])
def test_round_trip_into_an_engine_of_other_sizes(kind: FusedKind | None, seed: int | None) -> None:
    engine, other = tracked(kind, 1), tracked(kind, seed)
    if kind is not None:
        train(engine, 7)
        train(other, 2)
    saved = snapshot(engine)
    assert other.load_state_dict(saved).missing_keys == []
    assert_same_state(saved, snapshot(other))
    if kind is not None:
        train(engine, 5, first=7)
        train(other, 5, first=7)
        assert_same_state(snapshot(engine), snapshot(other))


def test_the_state_is_that_of_every_table_alone() -> None:
    """A checkpoint can be read without the module: codes as bit planes, rows in logical order."""
    engine = tracked("rowwise_adagrad", 1)
    saved = engine.state_dict()
    codes = random_codes(1)[0]
    planes = saved["tables.a.codes"]
    bits = torch.stack([(planes[row // 64] >> (row % 64)) & 1 for row in range(130)])
    assert torch.equal((bits * torch.tensor([1, 2, 4])).sum(1), codes.long())
    assert saved["tables.a.shape"].tolist() == [1, 130, 16, 4, 0]
    for code in range(1, 5):
        rows = engine.read_rows(0, 0, 130)[codes == code]
        assert torch.equal(saved[f"tables.a.rows.{code}.weight"], rows[:, : 4 * code])
        assert saved[f"tables.a.rows.{code}.momentum1"].shape == (rows.shape[0],)


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda saved: saved.__delitem__(key)


def with_value(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda saved: saved.__setitem__(key, change(saved[key]))


def unknown_code(planes: Tensor) -> Tensor:
    planes = planes.clone()
    planes[0, 0] |= 1
    planes[0, 1] |= 1
    planes[0, 2] |= 1
    return planes


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no codes": (without("tables.a.codes"), "tables.a.codes"),
    "no rows": (without("tables.c.rows.3.weight"), r"tables.c.rows.3.weight"),
    "no utility": (without("tables.b.utility"), "tables.b.utility"),
    "no steps": (without("steps"), "steps"),
    "no rate": (without("rate"), "rate"),
    "extra key": (lambda saved: saved.__setitem__("tables.z.codes", saved["tables.a.codes"]), "tables.z.codes"),
    "newer": (with_value("tables.a.shape", lambda s: s + torch.tensor([1, 0, 0, 0, 0])), "saved in format 2.*update"),
    "newer and longer": (
        with_value("tables.a.shape", lambda s: torch.cat([s + torch.tensor([1, 0, 0, 0, 0]), s])),
        "saved in format 2",
    ),
    "unknown layout": (with_value("tables.a.shape", lambda s: s + torch.tensor([0, 0, 0, 0, 9])), "layout"),
    "rows cut": (with_value("tables.a.rows.2.weight", lambda w: w[:-1]), "tables.a.rows.2.weight.*damaged"),
    "state cut": (with_value("tables.c.rows.7.momentum1", lambda m: m[:-1]), "tables.c.rows.7.momentum1.*damaged"),
    "utility cut": (with_value("tables.c.utility", lambda u: u[:-1]), "tables.c.utility.*damaged"),
    "codes cut": (with_value("tables.a.codes", lambda c: c[:-1]), "tables.a.codes.*damaged"),
    "a plane more": (with_value("tables.a.codes", lambda c: torch.cat([c, c], 1)), "tables.a.codes.*damaged"),
    "unknown code": (with_value("tables.a.codes", unknown_code), "tables.a.codes.*damaged"),
    "steps cut": (with_value("steps", lambda s: s[:1]), "steps.*damaged"),
    "rate cut": (with_value("rate", lambda r: r[:0]), "rate.*damaged"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_loaded_is_named_and_changes_nothing(damage: str, strict: bool) -> None:
    engine, other = tracked("rowwise_adagrad", 1), tracked("rowwise_adagrad", 2)
    saved = snapshot(engine)
    do, message = DAMAGE[damage]
    do(saved)
    before = snapshot(other)
    if damage == "extra key" and not strict:
        assert other.load_state_dict(saved, strict=False).unexpected_keys == ["tables.z.codes"]
        return
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(saved, strict=strict)
    if damage != "extra key":
        assert_same_state(before, snapshot(other))
    train(other, 2)


@pytest.mark.parametrize(
    "table",
    [
        LogicalTable(name="a", rows=131, dim=16, chunks=4),
        LogicalTable(name="a", rows=130, dim=16, chunks=2),
        LogicalTable(name="a", rows=130, dim=16, chunks=4, layout="chunks"),
        LogicalTable(name="a", rows=130, dim=20, chunks=5),
    ],
)
def test_another_configuration_is_named(table: LogicalTable) -> None:
    engine = make_engine(tables=(TABLES[0],), features=(0,))
    other = make_engine(tables=(table,), features=(0,))
    before = snapshot(other)
    with pytest.raises(
        RuntimeError, match=r"table 'a' was saved as .* = \(130, 16, 4, 'prefix'\), but is configured as"
    ):
        other.load_state_dict(snapshot(engine))
    assert_same_state(before, snapshot(other))


def test_no_state_at_all_is_reported_as_missing() -> None:
    engine = make_engine()
    before = snapshot(engine)
    assert engine.load_state_dict({}, strict=False).missing_keys == ["tables"]
    assert_same_state(before, snapshot(engine))
    with pytest.raises(RuntimeError, match="Missing key"):
        engine.load_state_dict({})


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_the_learning_rate_is_restored(kind: FusedKind) -> None:
    """Unscaled: a class of narrow rows keeps its factor."""
    engine, other = make_engine(kind), make_engine(kind)
    for each in (engine, other):
        each.scale_rates(0.5)
    engine.set_learning_rate(0.3)
    saved = snapshot(engine)
    assert saved["rate"].dtype == torch.float64 and saved["rate"].tolist() == [0.3]
    other.load_state_dict(saved)
    assert other.classes[0].learning_rate == 0.3  # type: ignore[attr-defined]
    train(engine, 3)
    train(other, 3)
    assert_same_state(snapshot(engine), snapshot(other))


def test_rows_of_other_optimizers_have_no_rate() -> None:
    assert "rate" not in make_engine(None).state_dict()


def test_foreign_keys_alone_are_named() -> None:
    found = make_engine().load_state_dict({"what": torch.ones(1)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["tables"], ["what"])
