"""What is exported, written, loaded and served is what the source itself computes."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface

from lightning_embcomp.export import build, dense_state, hosts_of, load, load_model, read, serve, write
from lightning_embcomp.export.expansion import expand
from lightning_embcomp.export.loading import ServedModules
from lightning_embcomp.models import ClickModel

from .pipeline import (
    DIM,
    Clicks,
    bag_collection,
    built_model,
    click_model,
    collection,
    compressed,
    engines,
    features,
    precision_of,
    trainer,
)

FORMATS = ("fbgemm", "packed")
WIDTHS: dict[str, tuple[int, ...]] = {
    "8": (8,), "4": (4,), "2": (2,), "odd": (1, 3, 5, 6, 7), "mixed": (8, 4, 2, 0), "all": (8, 4, 3, 0, 2),
}  # fmt: skip
SAME = 2e-6
"""Allowed difference of logits: float32 sums in another order, at logits of about 1."""


def export(module: nn.Module, folder: Path, bits: int = 8, **options: Any) -> Path:
    return write(build(hosts_of(module), bits, dense=dense_state(module), **options), folder)


def logits(model: nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(dense, sparse).numpy() for dense, sparse, _ in Clicks().batches])


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("format", FORMATS)
def test_predictions_are_those_of_the_rounded_source(tmp_path: Path, format: str, widths: str, shuffled: bool) -> None:
    rounding = partial(precision_of, shuffled=shuffled, widths=WIDTHS[widths])
    source = compressed(built_model(), round_with=rounding)
    folder = export(source, tmp_path / "out", format=format)
    exported = load_model(folder, click_model())
    assert isinstance(exported, ClickModel)
    assert np.abs(logits(exported) - logits(source)).max() <= SAME
    assert np.abs(logits(exported) - logits(compressed(built_model()))).max() > 100 * SAME  # rounding matters


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("bits", "limit"), [(32, SAME), (16, 2e-3), (8, 2e-2), (4, 0.4), (2, 2.0)])
def test_post_training_error_is_that_of_the_width(tmp_path: Path, format: str, bits: int, limit: float) -> None:
    source = built_model()
    exported = load_model(export(source, tmp_path / "out", bits, format=format), click_model())
    worst = np.abs(logits(exported) - logits(source)).max()
    assert limit / 50 < worst <= limit or bits == 32
    assert worst <= limit


@pytest.mark.parametrize("widths", ["mixed", "odd"])
@pytest.mark.parametrize("alignment", [1, 16])
def test_both_formats_give_the_same_tables(widths: str, alignment: int) -> None:
    source = compressed(built_model(), round_with=partial(precision_of, widths=(*WIDTHS[widths], 32)))
    one, other = (expand(build(hosts_of(source), 4, format=format, row_alignment=alignment)) for format in FORMATS)
    assert len(one.rows) == len(other.rows) == len(WIDTHS[widths]) + 1 - (0 in WIDTHS[widths])
    for a, b in zip(one.rows, other.rows, strict=True):
        assert torch.equal(a, b) and a.shape[1] % alignment == 0
    assert torch.equal(one.counts, other.counts)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_are_those_of_fbgemm(bits: int, shared: bool) -> None:
    """FBGEMM's own inference table over the exported bytes reads the same values."""
    module: nn.Module = nn.EmbeddingBag(90, DIM, mode="sum")
    rounding = partial(precision_of, widths=(bits,)) if shared else None
    artefact = build(hosts_of(compressed(module, round_with=rounding)), bits, row_alignment=16)
    [rows] = expand(artefact).rows
    table = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", 90, DIM, getattr(SparseType, f"INT{bits}"), EmbeddingLocation.HOST)],
        device="cpu",
        output_dtype=SparseType.FP32,
        row_alignment=16,
    )
    table.initialize_weights()
    table.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)[0][0].copy_(rows)
    expected = table(torch.arange(90, dtype=torch.int32), torch.arange(91, dtype=torch.int32))
    if shared:
        expected = expected + rounding(90, DIM).offset  # type: ignore[misc]
    found = serve(artefact)(torch.arange(90), torch.arange(90))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_pruned_rows_and_columns_stay_pruned(tmp_path: Path, format: str) -> None:
    source = compressed(built_model(), chunks=4, code=1)
    folder = export(source, tmp_path / "out", 8, format=format)
    artefact = read(folder)
    assert [spec.format.columns for spec in artefact.manifest.classes] == [((0, 4),)]
    [rows] = expand(artefact).rows
    assert rows.shape[1] == 4 + 4  # header and four values: nothing for the other twelve columns
    served = load(folder)
    for t, table in enumerate(engines(source)[0].tables):
        values = served.served.read_rows(t, 0, table.rows)
        assert not bool(values[:, 4:].any()) and bool(values[:, :4].any())
    dead = compressed(built_model(), chunks=4, code=0)
    empty = read(export(dead, tmp_path / "dead", format=format))
    assert empty.manifest.classes == () and sum(t.numel() for t in empty.tensors.values()) <= 6
    exported = load_model(tmp_path / "dead", click_model())
    np.testing.assert_allclose(logits(exported), logits(dead), atol=SAME)


# PyTorch's own bags take weights for sums only.
@pytest.mark.parametrize(("mean", "weighted"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("routed", [False, True])
def test_bag_collections(tmp_path: Path, mean: bool, weighted: bool, routed: bool) -> None:
    source: Any = bag_collection(mean, weighted)
    expected = source(features(weighted=weighted))
    module: Any = compressed(source) if routed else source
    served: Any = load(export(module, tmp_path / "out", 32))
    found = served(features(weighted=weighted))
    assert isinstance(served, EmbeddingBagCollectionInterface)
    assert found.keys() == expected.keys() and found.length_per_key() == expected.length_per_key()
    torch.testing.assert_close(found.values(), expected.values(), rtol=1e-6, atol=1e-6)
    assert served.is_weighted() == weighted and str(served.device) == "cpu"
    configs = zip(served.embedding_bag_configs(), bag_collection(mean).embedding_bag_configs(), strict=True)
    for one, other in configs:
        assert (one.name, one.num_embeddings, one.embedding_dim, one.feature_names, one.pooling) == (
            (other.name, other.num_embeddings, other.embedding_dim, other.feature_names, other.pooling)
        )
    assert served.state_dict() == {} and list(served.parameters()) == []


@pytest.mark.parametrize("routed", [False, True])
def test_collections(tmp_path: Path, routed: bool) -> None:
    source: Any = collection()
    expected = source(features())
    served: Any = load(export(compressed(source) if routed else source, tmp_path / "out", 32))
    found = served(features())
    assert isinstance(served, EmbeddingCollectionInterface) and served.need_indices() and served.embedding_dim() == 16
    assert served.embedding_names_by_table() == source.embedding_names_by_table()
    assert found.keys() == expected.keys()
    for key, jagged in expected.items():
        torch.testing.assert_close(found[key].values(), jagged.values())
        assert torch.equal(found[key].weights(), jagged.weights())


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_embedding_bags(tmp_path: Path, mode: str, last: bool, padding: int | None, routed: bool) -> None:
    source = nn.EmbeddingBag(40, 8, mode=mode, include_last_offset=last, padding_idx=padding)
    ids = torch.tensor([3, 1, 1, 39, 3, 3, 0])
    offsets = torch.tensor([0, 2, 2, 5, *([7] if last else [])])
    plain, square = source(ids, offsets).detach(), source(ids[:6].view(2, 3)).detach()
    served = load(export(compressed(source) if routed else source, tmp_path / "out", 32))
    torch.testing.assert_close(served(ids, offsets), plain)
    torch.testing.assert_close(served(ids[:6].view(2, 3)), square)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings(tmp_path: Path, padding: int | None, routed: bool) -> None:
    source = nn.Embedding(40, 8, padding_idx=padding)
    ids = torch.tensor([[3, 1], [39, 3]])
    expected = source(ids).detach()
    served = load(export(compressed(source) if routed else source, tmp_path / "out", 32))
    torch.testing.assert_close(served(ids), expected)


def test_several_modules_by_path(tmp_path: Path) -> None:
    root = nn.ModuleDict({"user": nn.EmbeddingBag(30, 8, mode="sum"), "offer": nn.Embedding(20, 4)})
    served = load(export(root, tmp_path / "out", 32))
    assert isinstance(served, ServedModules)
    assert served.keys() == ("user", "offer") and len(served) == 2 and "user" in served
    ids = torch.tensor([1, 19])
    torch.testing.assert_close(served["offer"](ids), root["offer"](ids).detach())
    with pytest.raises(KeyError, match="no module 'item'; it holds user, offer"):
        served["item"]


def test_validation_after_loading_gives_the_same_auc(tmp_path: Path) -> None:
    source = compressed(built_model(), round_with=precision_of)
    folder = export(source, tmp_path / "out", format="packed")
    before = trainer().validate(source, datamodule=Clicks(), verbose=False)[0]
    after = trainer().validate(load_model(folder, click_model()), datamodule=Clicks(), verbose=False)[0]
    for name, value in before.items():
        assert after[name] == pytest.approx(value, abs=1e-6), name


def test_copies_of_served_modules_work(tmp_path: Path) -> None:
    served = load(export(bag_collection(), tmp_path / "out", 4))
    expected = served(features()).values()
    for other in (copy.deepcopy(served), pickle.loads(pickle.dumps(served)), served.half()):
        assert torch.equal(other(features()).values(), expected)


def test_a_model_is_filled_without_its_tables_being_allocated(tmp_path: Path) -> None:
    folder = export(built_model(), tmp_path / "out", 4)
    model = click_model()
    seen: list[bool] = []
    original = model.configure_model

    def spy() -> None:
        original()
        seen.extend(p.is_meta for name, p in model.named_parameters() if "embedding_bags" in name)

    model.configure_model = spy  # type: ignore[method-assign]
    load_model(folder, model)
    assert seen == [True] * 3
    assert not any(p.is_meta for p in model.parameters())


def test_sizes_are_those_of_the_formats(tmp_path: Path) -> None:
    """1500 rows of 16 columns at widths 8, 4, 2, 0 in equal groups: bits add up, and nothing is kept per row."""
    module = compressed(nn.EmbeddingBag(1500, DIM, mode="sum"), round_with=precision_of)
    packed = build(hosts_of(module), format="packed")
    values = {name: tensor.nbytes for name, tensor in packed.tensors.items()}
    assert {name: n for name, n in values.items() if name.startswith("class")} == {
        "class.0.values": 375 * 4,
        "class.1.values": 375 * 8,
        "class.2.values": 375 * 16,
    }
    others = sum(n for name, n in values.items() if not name.startswith("class"))
    assert others == 4 * (4 + 1) + 18 + 64  # runs, steps, offset
    served = build(hosts_of(module), format="fbgemm")
    assert [served.tensors[f"class.{c}.rows"].shape for c in range(3)] == [(375, 8), (375, 12), (375, 20)]
    assert served.manifest.row_alignment == 1
