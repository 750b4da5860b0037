"""``torch.inference_mode``, ``torch.export`` and ``torch.compile``: what works, and the one place that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from lightning_embcomp.export import ExportOptions, build, export_module, hosts_of, load_model, serve

from .pipeline import Clicks, bag_collection, built_model, click_model, collection, compressed, features, precision_of

# What torch itself says while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def dynamic(batch: Any) -> list[Any]:
    """Every tensor of a batch may have another length."""
    return [None if leaf is None else {0: Dim.DYNAMIC} for leaf in pytree.tree_flatten(batch)[0]]


def served(module: nn.Module) -> Any:
    return serve(build(hosts_of(module), 8))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding_bag_exports_with_any_sizes(tmp_path: Path, padding: int | None, strict: bool) -> None:
    source = nn.EmbeddingBag(2000, 8, mode="mean", padding_idx=padding)
    module = served(compressed(source, round_with=precision_of))
    example = torch.tensor([1, 1999, 3, 40]), torch.tensor([0, 3])
    sizes = ({0: Dim("ids", min=2, max=10_000)}, {0: Dim("bags", min=2, max=1000)})
    program = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)
    torch.export.save(program, tmp_path / "bag.pt2")
    again = torch.export.load(tmp_path / "bag.pt2").module()
    ids, offsets = torch.tensor([5, 3, 1998, 7, 3, 0]), torch.tensor([0, 0, 4])
    assert torch.equal(again(ids, offsets), module(ids, offsets))
    with pytest.raises(IndexError, match="outside"):
        again(torch.tensor([5, 2000]), torch.tensor([0, 1]))


def test_an_embedding_exports() -> None:
    module = served(nn.Embedding(30, 8))
    ids = torch.tensor([[1, 2], [29, 4]])
    assert torch.equal(torch.export.export(module, (ids,)).module()(ids), module(ids))


def test_a_bag_collection_exports_with_any_number_of_ids() -> None:
    module = served(bag_collection())
    program = torch.export.export(module, (features(),), dynamic_shapes=(dynamic(features()),))
    for seed in range(1, 4):
        assert torch.equal(program.module()(features(seed)).values(), module(features(seed)).values())


def test_a_collection_does_not_export() -> None:
    """Its outputs are as long as the batch has ids of each feature, which only the data say."""
    with pytest.raises(GuardOnDataDependentSymNode):
        torch.export.export(served(collection()), (features(),))


def test_a_whole_model_exports_and_runs_in_inference_mode(tmp_path: Path) -> None:
    export_module(compressed(built_model(), round_with=precision_of), tmp_path / "out", ExportOptions())
    model = load_model(tmp_path / "out", click_model())
    dense, sparse, _ = Clicks().batches[0]
    with torch.inference_mode():
        expected = model(dense, sparse)
        assert expected.is_inference() or not expected.requires_grad
    # A lookup completes a KeyedJaggedTensor in place: to `torch.export` it is another input then.
    sizes = (None, [{0: Dim.DYNAMIC} if i == 0 else None for i, _ in enumerate(dynamic(sparse))])
    program = torch.export.export(model, Clicks().batches[0][:2], dynamic_shapes=sizes).module()
    torch.testing.assert_close(program(*Clicks().batches[0][:2]), expected, rtol=0, atol=0)
    found = program(*Clicks().batches[1][:2])
    torch.testing.assert_close(found, model(*Clicks().batches[1][:2]), rtol=0, atol=0)


def test_the_operator_follows_the_rules_of_operators() -> None:
    module = served(compressed(nn.EmbeddingBag(300, 8, mode="sum"), round_with=precision_of)).served
    from lightning_embcomp.export.operator import pool_served_op, tensors_of

    arguments = (
        torch.tensor([0, 5, 299]),
        torch.tensor([0, 1, 3]),
        torch.tensor([1.0, 2.0, 3.0]),
        list(module.classes.rows),
        tensors_of(module.router),
        tensors_of(module.classes),
        [0],
        [8],
        [0],
    )
    torch.library.opcheck(pool_served_op, arguments, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(pool_served_op(*arguments), module(*arguments[:3]))
    with pytest.raises(ValueError, match="offsets go from 0 to 2"):
        pool_served_op(arguments[0], torch.tensor([0, 1, 2]), *arguments[2:])
