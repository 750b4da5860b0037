"""``torch.compile`` around the tables: same training, and no new graphs when rows move."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import DimensionPruning
from lightning_embcomp.engine import bag_layout, routed
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels import graphs
from lightning_embcomp.models import ClickModel
from lightning_embcomp.models.click_model import Batch

FEATURES = [{"name": name, "num_embeddings": 200} for name in "abc"]
STEPS, EVENT = 6, 3


def batches() -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        lengths = torch.randint(0, 4, (24,), generator=source)
        ids = torch.randint(0, 200, (int(lengths.sum()),), generator=source)
        sparse = KeyedJaggedTensor(list("abc"), ids, lengths=lengths)
        found.append((torch.rand(8, 2, generator=source), sparse, torch.randint(0, 2, (8,), generator=source).float()))
    return found


def losses(prepare: Callable[[nn.Module], Any], graphs_so_far: Callable[[], int] = lambda: 0) -> list[float]:
    """Train with a pruning event in between."""
    torch.manual_seed(0)
    callback = DimensionPruning(target=0.5)
    model = ClickModel("dlrm", 8, (16,), (16,), features=FEATURES, num_dense=2)
    callback.setup(pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False), model, "fit")
    assert model.model is not None and callback.pruner is not None
    prepare(model.model)
    optimizer = model.configure_optimizers()
    found, made = [], 0
    for step, (dense, sparse, label) in enumerate(batches()):
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, sparse), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        if step == 1:
            made = graphs_so_far()
        if step == EVENT:
            assert callback.pruner.step(0.98).changed_rows > 0
    assert graphs_so_far() == made
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
@pytest.mark.parametrize("parts", [[""], ["dense_arch", "inter_arch", "over_arch"]], ids=["whole", "dense"])
def test_compiled_training_equals_eager_and_compiles_once(parts: list[str]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def compiled(model: nn.Module) -> None:
        for part in parts:
            model.get_submodule(part).compile(backend=counter)

    found = losses(compiled, lambda: counter.frame_count)
    assert counter.frame_count >= 3
    torch.testing.assert_close(found, losses(lambda model: None), rtol=1e-6, atol=1e-6)


def test_tables_that_train_are_no_part_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "capturing", lambda device: True)

    def look_up(model: nn.Module) -> None:
        (engine,) = [module for module in model.modules() if isinstance(module, RoutedEmbeddings)]
        with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph: rows move"):
            engine(torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
        monkeypatch.undo()

    losses(look_up)


def test_layouts_of_a_graph_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = bag_layout.FeatureShapes((0,), (12,), (False,), torch.device("cpu"))
    known = bag_layout.pooled_layout(shapes, 3)
    kept: list[object] = []
    monkeypatch.setattr(graphs, "_kept", kept)
    for module in (bag_layout, graphs):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    assert bag_layout.pooled_layout(shapes, 3) is known and kept == [known]
    with pytest.raises(RuntimeError, match="run a lookup of the same batch size before capturing"):
        bag_layout.pooled_layout(shapes, 17)
