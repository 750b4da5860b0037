"""One of several processes of test_exchange; run with the name of a check."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_embcomp.methods.dct import exchange as exchange_module
from lightning_embcomp.methods.dct.config import FEEDBACK_KINDS, ErrorFeedback, ThresholdSettings
from lightning_embcomp.methods.dct.errors import NonFiniteGradientError
from lightning_embcomp.methods.dct.exchange import GradientExchange
from lightning_embcomp.methods.dct.hook import gradient_thresholding_hook
from lightning_embcomp.methods.dct.selection import waits_at_once
from tests.methods.dct.reference import NumpyFeedback

EXACT = ThresholdSettings(life_span=1)
"""With fewer entries than samples, thresholds are exact in every step."""


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 1))


def wrap(module: nn.Module, **settings: Any) -> tuple[DistributedDataParallel, GradientExchange]:
    """DistributedDataParallel in several buckets, with the hook."""
    model = DistributedDataParallel(module, bucket_cap_mb=0.01)
    parameters = dict(module.named_parameters())
    chosen = [name for name, parameter in parameters.items() if parameter.numel() >= 100]
    options: dict[str, Any] = {
        "density": 0.1,
        "feedback": ErrorFeedback(),
        "thresholds": ThresholdSettings(),
        "value_type": "fp32",
        "warmup_steps": 0,
    }
    exchange = GradientExchange(parameters, chosen, **{**options, **settings})
    model.register_comm_hook(exchange, gradient_thresholding_hook)
    return model, exchange


def batch(step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + (dist.get_rank() if rank is None else rank))
    x = torch.randn(16, 20, generator=generator)
    return x, (x[:, :1] - x[:, 1:2]).relu()


def train(model: nn.Module, steps: range, accumulate: int = 1) -> list[Tensor]:
    """Plain SGD; the last gradients."""
    for step in steps:
        model.zero_grad()
        for micro in range(accumulate):
            x, y = batch(step * accumulate + micro)
            context = model.no_sync() if micro + 1 < accumulate else _nothing()  # type: ignore[operator]
            with context:
                ((model(x) - y) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad  # type: ignore[operator]
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def mean_over_workers(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    total = tensor.double()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).numpy()


def same_everywhere(model: nn.Module) -> None:
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter), "the workers' weights have drifted apart"


def whole_density() -> None:
    """Everything is sent: plain DDP, bit for bit, through bucket rebuilds, warm-up and accumulation."""
    for accumulate in (1, 2):
        plain = DistributedDataParallel(mlp(), bucket_cap_mb=0.01)
        train(plain, range(10), accumulate)
        for kind in ("ec", "none", "ef21", "econtrol"):
            for warmup in (0, 3):
                model, exchange = wrap(mlp(), density=1.0, feedback=ErrorFeedback(kind=kind), warmup_steps=warmup)
                train(model, range(10), accumulate)
                assert exchange.steps == 10
                tolerance = {"ef21": 1e-6, "econtrol": 1e-6}.get(kind, 0.0)  # sums of differences
                for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance, msg=f"{kind} {warmup}")
                same_everywhere(model)


def references() -> None:
    """50 steps on one parameter against NumPy, and the invariant of the residuals."""
    rank, world, numel, density = dist.get_rank(), dist.get_world_size(), 400, 0.1
    kinds = [("ec", None), ("none", None)] + [(kind, m) for kind in ("ef21", "econtrol") for m in (0.0, 0.8)]
    for kind, momentum in kinds:
        eta = 0.05
        feedback = ErrorFeedback(kind=kind, eta=eta if kind == "econtrol" else None, momentum=momentum)  # type: ignore[arg-type]
        module = nn.Linear(numel, 1, bias=False)
        nn.init.zeros_(module.weight)
        model, exchange = wrap(module, density=density, feedback=feedback, thresholds=EXACT)
        numpy = NumpyFeedback(world, numel, kind, 40, eta, momentum or 0.0)
        generator = torch.Generator().manual_seed(3)
        total = np.zeros(numel)
        for step in range(50):
            # Workers differ: each has a direction of its own besides the noise.
            everyone = torch.randn(world, numel, generator=generator) + torch.linspace(-1, 1, world)[:, None]
            model.zero_grad()
            model(everyone[rank : rank + 1]).sum().backward()
            wanted = numpy.step(everyone.double().numpy())
            found = module.weight.grad.double().numpy()[0]  # type: ignore[union-attr]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5, err_msg=f"{kind} {momentum} step {step}")
            state = exchange.state["weight"]
            if kind == "ec":
                # Of the mean gradient, what the workers have not stepped along is the mean of their residuals.
                total += everyone.double().numpy().mean(0) - found
                np.testing.assert_allclose(state.residual, numpy.e[rank], rtol=1e-4, atol=2e-5)
                np.testing.assert_allclose(mean_over_workers(state.residual), total, rtol=1e-4, atol=1e-4)
            if kind == "econtrol":
                # e_T is the sum of g_t - h_{t+1}, with the mean of gradients in place of g.
                assert state.residual is not None and state.estimate is not None
                total += numpy.v[rank] - state.estimate.double().numpy()
                np.testing.assert_allclose(state.residual.double().numpy(), total, rtol=1e-4, atol=1e-4)
            if kind in ("ef21", "econtrol"):
                assert state.mean is not None
                np.testing.assert_allclose(state.estimate, numpy.h[rank], rtol=1e-4, atol=2e-5)
                np.testing.assert_allclose(state.mean, numpy.h.mean(0), rtol=1e-4, atol=2e-5)
        assert exchange.steps == 50


def value_types() -> None:
    """Rounded values: what rounding takes off stays in the residual, and all workers read the same numbers."""
    for value_type in ("fp32", "fp16", "bf16"):
        for size in (1e-12, 1.0, 1e12):
            module = nn.Linear(500, 1, bias=False)
            model, exchange = wrap(module, density=0.05, value_type=value_type)
            missing = np.zeros(500)
            for step in range(20):
                x = size * torch.randn(2, 500, generator=torch.Generator().manual_seed(step))
                model.zero_grad()
                model(x[dist.get_rank()][None]).sum().backward()
                assert module.weight.grad is not None
                missing += x.double().numpy().mean(0) - module.weight.grad.double().numpy()[0]
            mine = mean_over_workers(exchange.state["weight"].residual)
            np.testing.assert_allclose(mine, missing, rtol=1e-4, atol=1e-4 * size)
            first = module.weight.grad.clone()  # type: ignore[union-attr]
            dist.broadcast(first, 0)
            assert torch.equal(first, module.weight.grad)  # type: ignore[arg-type]
            assert exchange.count() and 10 < exchange.last.entries <= 25


def explosion() -> None:
    """More entries than allowed on one worker: all exchange that step densely, and nothing is left over."""
    module = nn.Linear(1000, 1, bias=False)
    for kind, momentum in (("ec", None), ("ef21", 0.0), ("econtrol", 0.0), ("none", None)):
        model, exchange = wrap(
            module,
            density=0.01,
            feedback=ErrorFeedback(kind=kind, momentum=momentum),  # type: ignore[arg-type]
            thresholds=ThresholdSettings(max_overshoot=10.0),
        )
        state = exchange.state["weight"]
        owed = np.zeros(1000)
        for step in range(6):
            x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(step))
            if step == 4:
                x[1] *= 1000
            before = mean_over_workers(state.residual) if state.residual is not None else owed
            model.zero_grad()
            model(x[dist.get_rank()][None]).sum().backward()
            assert exchange.count() and module.weight.grad is not None
            assert (exchange.last.entries == 1000) == (step == 4), (kind, step, exchange.last.entries)
            if step == 4:
                wanted = x.double().numpy().mean(0) + state.gain * before
                np.testing.assert_allclose(module.weight.grad.numpy()[0], wanted, rtol=1e-4, atol=1e-3)
                if state.residual is not None:
                    left = (1 - state.gain) * before
                    np.testing.assert_allclose(mean_over_workers(state.residual), left, rtol=1e-4, atol=1e-4)
                if state.estimate is not None and state.mean is not None:
                    np.testing.assert_allclose(mean_over_workers(state.estimate), state.mean, rtol=1e-4, atol=1e-4)


def later() -> None:
    """What runs on GPUs, which read counts with the headers, trains to the same bits: kinds, values, limits, scales."""
    limits = (ThresholdSettings(), ThresholdSettings(max_overshoot=1.1))
    for number, (kind, value_type) in enumerate(
        (kind, value_type) for kind in FEEDBACK_KINDS for value_type in ("fp32", "fp16")
    ):
        settings: dict[str, Any] = {
            "feedback": ErrorFeedback(kind=kind, eta=0.0625 if kind == "econtrol" else None),  # type: ignore[arg-type]
            "value_type": value_type,
            "thresholds": limits[number % 2],
            "loss_scale": None if number % 3 else (lambda: 1024.0),
            "warmup_steps": 2,
        }
        gradients, states, figures = [], [], []
        for at_once in (True, False):

            def answer(device: torch.device, at_once: bool = at_once) -> bool:
                return at_once

            exchange_module.waits_at_once = answer
            model, exchange = wrap(mlp(), **settings)
            gradients.append(train(model, range(12)))
            states.append(exchange.state_dict()["parameters"])
            assert exchange.count() or exchange.steps == 12
            figures.append((exchange.total.sent, exchange.total.entries))
        assert figures[0] == figures[1], (settings, figures)
        for one, two in zip(*gradients, strict=True):
            assert torch.equal(one, two), settings
        for name, one in states[0].items():
            for key, value in one.items():
                other = states[1][name][key]
                assert torch.equal(value, other) if torch.is_tensor(value) else value == other, (settings, name, key)
    try:
        not_a_number()
    finally:
        exchange_module.waits_at_once = waits_at_once


def warm_up() -> None:
    """Dense steps are those of plain DDP, and estimates become the means of what was seen."""
    module = nn.Linear(500, 1, bias=False)
    for kind in ("ef21", "econtrol"):
        model, exchange = wrap(module, feedback=ErrorFeedback(kind=kind), warmup_steps=4)
        seen = []
        for step in range(4):
            x = torch.randn(2, 500, generator=torch.Generator().manual_seed(step))
            seen.append(x)
            model.zero_grad()
            model(x[dist.get_rank()][None]).sum().backward()
            torch.testing.assert_close(module.weight.grad, x.mean(0)[None], rtol=0, atol=1e-7)
        state = exchange.state["weight"]
        everything = torch.stack(seen).mean(0)
        assert state.estimate is not None and state.mean is not None
        torch.testing.assert_close(state.estimate, everything[dist.get_rank()], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.mean, everything.mean(0), rtol=1e-5, atol=1e-6)
        assert state.residual is None or not state.residual.any()


def drift() -> None:
    """Gradients that shrink or grow against an old threshold: it is replaced before its life span ends."""
    module = nn.Linear(10_000, 1, bias=False)
    model, exchange = wrap(
        module,
        density=0.02,
        feedback=ErrorFeedback(kind="none"),
        thresholds=ThresholdSettings(life_span=10**6, samples=1000, drift=2.0),
    )
    counts, sizes = [], [1.0] * 3 + [0.1] * 3 + [10.0] * 3
    for step, size in enumerate(sizes):
        x = size * torch.randn(1, 10_000, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(x).sum().backward()
        assert exchange.count()
        counts.append(exchange.last.entries)
    assert all(50 < count <= 200 for count in counts[:3]), counts
    assert counts[3] == 0 and all(50 < count <= 200 for count in counts[4:6]), counts
    assert counts[6] == 200 and all(50 < count <= 200 for count in counts[7:]), counts


def figures() -> None:
    """Norms and bytes of a step."""
    model, exchange = wrap(mlp())
    train(model, range(3))
    before = {name: state.residual.clone() for name, state in exchange.state.items() if state.residual is not None}
    x, y = batch(7)
    alone = mlp()
    alone.load_state_dict(model.module.state_dict())
    ((alone(x) - y) ** 2).mean().backward()
    exchange.measure = True
    model.zero_grad()
    ((model(x) - y) ** 2).mean().backward()
    assert exchange.count()
    gradient = left = 0.0
    for name, parameter in alone.named_parameters():
        if name not in before:
            continue
        g = parameter.grad.double().numpy().ravel()  # type: ignore[union-attr]
        f = g + before[name].double().numpy()
        gradient += g @ g
        left += np.sum(np.sort(np.abs(f))[: len(f) - len(f) // 10] ** 2)
    logged = exchange.last.logged()
    numels = [parameter.numel() for parameter in alone.parameters()]
    assert logged["dense_bytes"] == 4 * sum(numels)  # two workers
    assert logged["bytes_sent"] == logged["bytes_received"]
    assert 0.05 < logged["density"] <= 0.1 + 1e-3
    assert logged["bytes_sent"] < 0.3 * logged["dense_bytes"]
    # At an old threshold, fewer than the wanted entries are sent.
    assert 1.0 <= logged["residual_ratio"] / math.sqrt(left / gradient) < 1.3
    assert logged["selection_seconds"] > 0 and logged["exchange_seconds"] > 0


def not_a_number() -> None:
    """One worker's NaN stops all of them, with its rank and the parameter, dense or not."""
    for warmup in (0, 100):
        model, _ = wrap(mlp(), warmup_steps=warmup)
        train(model, range(3))
        if dist.get_rank() == 1:
            model.module[2].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), torch.nan))  # type: ignore[index,union-attr]
        try:
            train(model, range(3, 4))
        except NonFiniteGradientError as error:
            assert "'2.weight' holds NaN or infinity on rank 1, in exchange 4" in str(error), error
        else:
            raise AssertionError("NaN was exchanged")


def sparse_gradients() -> None:
    """Named and refused."""
    module = nn.Sequential(nn.EmbeddingBag(100, 8, sparse=True), nn.Linear(8, 100))
    model, _ = wrap(module)
    try:
        model(torch.arange(6).view(2, 3)).sum().backward()
    except NotImplementedError as error:
        assert "'0.weight' has sparse gradients" in str(error), error
    else:
        raise AssertionError("sparse gradients were exchanged")


def death() -> None:
    """The others end with an error when a process dies."""
    model, _ = wrap(mlp())
    train(model, range(3))
    if dist.get_rank() == 1:
        os._exit(3)
    try:
        train(model, range(3, 6))
    except RuntimeError as error:
        assert "another process has ended or does not answer" in str(error), error
        print("all checks passed", flush=True)
        os._exit(0)
    raise AssertionError("the death of a process was not noticed")


CHECKS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        whole_density,
        references,
        value_types,
        explosion,
        later,
        warm_up,
        drift,
        figures,
        not_a_number,
        sparse_gradients,
        death,
    )
}


def main() -> None:
    """Run the checks that are named."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name in sys.argv[1:]:
        CHECKS[name]()
        print(name, "passed", flush=True)
    print("all checks passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
