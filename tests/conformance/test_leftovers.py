"""What a callback leaves behind for a fit without it, and for a fit of another instance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks

from lightning_embcomp import CounterSettings, DimensionPruning, FrequencyAwareLR, MixedPrecisionSearch, SetupError
from lightning_embcomp.engine.counters import CounterConflictError, counters_of
from lightning_embcomp.surgery import replace, to_plain

from .cases import OFTEN, fit, hosts, logits, model, state_of

SGD: dict[str, Any] = {"dense_optimizer": "sgd", "embedding_lr": 1.0, "dense_lr": 0.05}


@pytest.mark.parametrize("optimizer", ["sgd", "none"])
@pytest.mark.parametrize("form", ["running", "horizon", "known"])
@pytest.mark.parametrize("max_rate", [None, 0.5])
def test_a_fit_without_the_callback_has_plain_rates(optimizer: str, form: str, max_rate: float | None) -> None:
    module = model(embedding_optimizer=optimizer, **SGD)
    fit(module, FrequencyAwareLR(form=form, max_rate=max_rate))  # type: ignore[arg-type]
    assert not hosts(module)[0].engine.counting.rates
    plain = model(True, embedding_optimizer="none", **SGD)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "embedding_bag" not in k}, strict=False)
    path = next(path for path, part in module.named_modules() if part is hosts(module)[0])
    replace(plain, path, to_plain(hosts(module)[0]))
    assert torch.equal(logits(plain), logits(module))
    fit(module)
    fit(plain)
    torch.testing.assert_close(logits(module), logits(plain), rtol=1e-5, atol=1e-5)


class Breaks(callbacks.Callback):
    def on_train_batch_end(self, *args: object) -> None:
        raise KeyError("a bug of the user")


def test_a_fit_that_fails_leaves_plain_rates() -> None:
    module = model(embedding_optimizer="sgd", **SGD)
    with pytest.raises(KeyError):
        fit(module, FrequencyAwareLR(), Breaks())
    assert not hosts(module)[0].engine.counting.rates


def test_rates_and_counters_go_on_in_a_second_fit_of_the_same_instance() -> None:
    module, callback = model(embedding_optimizer="sgd", **SGD), FrequencyAwareLR()
    fit(module, callback)
    counted = counters_of(hosts(module)[0].engine)
    assert counted is not None and counted.step == 25
    fit(module, callback)
    assert counters_of(hosts(module)[0].engine) is counted and counted.step == 50


def test_callbacks_on_tables_of_one_collection_share_counters() -> None:
    def two(**settings: Any) -> Iterator[FrequencyAwareLR]:
        yield FrequencyAwareLR(tables="t_feature_0")
        yield FrequencyAwareLR(tables="t_feature_1", **settings)

    module = model(embedding_optimizer="sgd", **SGD)
    fit(module, *two(), DimensionPruning(target=0.5, schedule=OFTEN))
    counters = counters_of(hosts(module)[0].engine)
    assert counters is not None and [values is not None for values in counters.values] == [True, True, False]
    with pytest.raises(
        CounterConflictError, match=r"FrequencyAwareLR\[t_feature_1\] and FrequencyAwareLR\[t_feature_0\]"
    ):
        fit(model(embedding_optimizer="sgd", **SGD), *two(counter=CounterSettings(half_life=9.0)))


def test_events_are_counted_by_module() -> None:
    callback = DimensionPruning(target=0.5, schedule=OFTEN)
    fit(model(), callback)
    events = callback.state_dict()["events"]
    fit(model(), callback)
    assert callback.state_dict()["events"] == events > 0


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning before 2.6 has none")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averages_are_refused() -> None:
    module = model(True)
    before = state_of(module)
    with pytest.raises(SetupError, match=r"MixedPrecisionSearch\[\*\]: EMAWeightAveraging averages parameters"):
        fit(module, callbacks.EMAWeightAveraging(), MixedPrecisionSearch(bits=8))
    assert before.keys() == state_of(module).keys()
