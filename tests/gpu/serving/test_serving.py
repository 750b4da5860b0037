"""Exported tables on a GPU: the same rows as on the CPU, no waiting, and in CUDA graphs."""

from pathlib import Path

import pytest
import torch

from lightning_embcomp.export import build, dense_state, hosts_of, load_model, write
from tests.export.pipeline import Clicks, built_model, click_model, compressed, precision_of
from tests.kernels.test_dequantize import CASES, batch, served

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", CASES)
def test_lookups_equal_those_of_the_cpu_and_do_not_wait(name: str, id_type: torch.dtype, weighted: bool) -> None:
    tables, bits = CASES[name]
    module = served(tables, bits, True)
    ids, offsets, weights = batch(tables, id_type)
    given = (ids, offsets, weights if weighted else None)
    wanted = module(*given)
    module.to(GPU)
    theirs = [None if tensor is None else tensor.to(GPU) for tensor in given]
    module(*theirs)  # compiles, and copies layouts
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = module(*theirs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["rowwise_8", "rowwise_4", "codes", "pruned_and_rounded"])
def test_a_captured_lookup_reads_new_ids(name: str) -> None:
    tables, bits = CASES[name]
    module = served(tables, bits, False).to(GPU)
    ids, offsets, _ = (None if tensor is None else tensor.to(GPU) for tensor in batch(tables, torch.int64))
    assert ids is not None and offsets is not None
    for _ in range(2):
        module(ids, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(ids, offsets)
    lengths = offsets.diff()
    first = torch.repeat_interleave(offsets[:-1], lengths)
    ids.copy_(ids[first + (offsets[1:] - 1).repeat_interleave(lengths) - torch.arange(len(ids), device=GPU)])
    graph.replay()
    torch.testing.assert_close(found, module(ids, offsets), **CLOSE)


@pytest.mark.parametrize("widths", [(8,), (4,), (8, 4, 2, 0)])
def test_a_loaded_model_predicts_what_it_does_on_the_cpu(widths: tuple[int, ...], tmp_path: Path) -> None:
    model = compressed(built_model(), round_with=lambda rows, dim: precision_of(rows, dim, widths=widths))
    folder = write(build(hosts_of(model), 8, dense=dense_state(model)), tmp_path / "export")
    plain = load_model(folder, click_model()).eval()
    ours = load_model(folder, click_model(), device=GPU).to(GPU).eval()
    with torch.inference_mode():
        for dense, sparse, _ in Clicks().batches:
            found = ours(dense.to(GPU), sparse.to(GPU)).cpu()
            torch.testing.assert_close(found, plain(dense, sparse), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_served_model_can_be_compiled(tmp_path: Path) -> None:
    folder = write(build(hosts_of(built_model()), 8, dense=dense_state(built_model())), tmp_path / "export")
    model = load_model(folder, click_model(), device=GPU).to(GPU).eval()
    compiled = torch.compile(model.model, mode="reduce-overhead")
    dense, sparse, _ = Clicks().batches[0]
    with torch.no_grad():
        for _ in range(3):
            found = compiled(dense.to(GPU), sparse.to(GPU)).squeeze(1).clone()
        torch.testing.assert_close(found, model(dense.to(GPU), sparse.to(GPU)), rtol=1e-4, atol=1e-4)
