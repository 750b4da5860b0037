"""One of the processes of test_dct, all on the first GPU; run with the name of a backend."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_embcomp.methods.dct.config import FEEDBACK_KINDS, ErrorFeedback, ThresholdSettings
from lightning_embcomp.methods.dct.errors import NonFiniteGradientError
from lightning_embcomp.methods.dct.exchange import GradientExchange
from lightning_embcomp.methods.dct.hook import gradient_thresholding_hook

GPU = torch.device("cuda", 0)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 1)).to(GPU)


def wrap(**settings: Any) -> tuple[DistributedDataParallel, GradientExchange]:
    module = mlp()
    model = DistributedDataParallel(module, device_ids=[0], bucket_cap_mb=0.01)
    parameters = dict(module.named_parameters())
    options: dict[str, Any] = {
        "density": 0.1,
        "feedback": ErrorFeedback(),
        "thresholds": ThresholdSettings(),
        "value_type": "fp32",
        "warmup_steps": 2,
    }
    chosen = [name for name, parameter in parameters.items() if parameter.numel() >= 100]
    exchange = GradientExchange(parameters, chosen, **{**options, **settings})
    model.register_comm_hook(exchange, gradient_thresholding_hook)
    return model, exchange


def train(model: DistributedDataParallel, steps: range) -> float:
    """Plain SGD; the last loss."""
    last = 0.0
    for step in steps:
        source = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(64, 20, generator=source).to(GPU)
        model.zero_grad()
        loss: Tensor = (model(x) - (x[:, :1] - x[:, 1:2]).relu()).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.05)
        last = float(loss)
    return last


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def whole_density() -> None:
    """Plain DDP."""
    plain = DistributedDataParallel(mlp(), device_ids=[0], bucket_cap_mb=0.01)
    train(plain, range(10))
    for kind in ("ec", "none"):
        model, exchange = wrap(density=1.0, feedback=ErrorFeedback(kind=kind))
        train(model, range(10))
        assert exchange.steps == 10
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)


def trains() -> None:
    """All kinds, types of values and limits: processes stay alike, few entries go, and the loss falls."""
    limits = (ThresholdSettings(samples=1000), ThresholdSettings(max_overshoot=2.0))
    for number, kind in enumerate(FEEDBACK_KINDS):
        for value_type in ("fp32", "fp16", "bf16"):
            scale = None if number % 2 else (lambda: 1.0)
            model, exchange = wrap(
                feedback=ErrorFeedback(kind=kind),  # type: ignore[arg-type]
                value_type=value_type,
                thresholds=limits[number % 2],
                loss_scale=scale,
            )
            first = train(model, range(1))
            exchange.measure = True
            assert train(model, range(1, 60)) < first, (kind, value_type)
            mine = weights(model)
            theirs = mine.clone()
            dist.broadcast(theirs, 0)
            assert torch.equal(mine, theirs), (kind, value_type)
            exchange.count()
            assert 0 < exchange.last.entries <= (0.2 if number % 2 else 0.11) * exchange.last.numel


def resumes() -> None:
    """State read from the GPU and given to another exchange: the same bits go on."""
    for kind in FEEDBACK_KINDS:
        feedback = ErrorFeedback(kind=kind)  # type: ignore[arg-type]
        model, exchange = wrap(feedback=feedback)
        train(model, range(12))
        state, then = exchange.state_dict(), {key: value.clone() for key, value in model.state_dict().items()}
        train(model, range(12, 18))
        other, resumed = wrap(feedback=feedback)
        train(other, range(2))  # until buckets are final
        other.load_state_dict(then)
        resumed.load_state_dict(state)
        train(other, range(12, 18))
        assert torch.equal(weights(model), weights(other)), kind


def not_a_number() -> None:
    """Named on all processes, dense or not."""
    for warmup in (0, 100):
        model, _ = wrap(warmup_steps=warmup)
        train(model, range(3))
        if dist.get_rank() == dist.get_world_size() - 1:
            model.module[2].weight.register_hook(lambda grad: grad * torch.nan)
        try:
            train(model, range(3, 4))
        except NonFiniteGradientError as error:
            assert f"'2.weight' holds NaN or infinity on rank {dist.get_world_size() - 1}" in str(error), error
        else:
            raise AssertionError("NaN was exchanged")


def main() -> None:
    """Run all checks."""
    torch.cuda.set_device(GPU)
    dist.init_process_group(sys.argv[1], timeout=timedelta(seconds=120))
    for check in (whole_density, trains, resumes, not_a_number):
        check()
        print(check.__name__, "passed", flush=True)
    print("all checks passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
