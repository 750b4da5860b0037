"""Folders that are missing, damaged, newer or half written, and models that do not fit: clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.export import (
    ExportError,
    ExportOptions,
    build,
    export_module,
    files,
    hosts_of,
    load,
    load_model,
    serve,
)
from lightning_embcomp.export import write as write_export
from lightning_embcomp.export.manifest import SCHEMA
from lightning_embcomp.export.operator import pool_served_op, tensors_of
from lightning_embcomp.tables import UnknownTableError

from .pipeline import bag_collection, built_model, click_model, compressed, features, precision_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed export with shared steps, runs, and a dense part."""
    export_module(compressed(built_model(), round_with=precision_of), tmp_path / "out", ExportOptions(format="packed"))
    return tmp_path / "out"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors and the checksum with them, as a faulty writer would."""
    path = folder / "tables.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(folder, lambda record: record["files"]["tables.safetensors"].update(sha256=checksum))


def refused(folder: Path, *messages: str) -> None:
    with pytest.raises(ExportError) as caught:
        load_model(folder, click_model())
    for message in messages:
        assert re.search(message, str(caught.value)), f"{message!r} is not in {caught.value}"


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: there is no such folder", "embcomp export")


def test_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    refused(folder, "holds no manifest.json, so it is no export")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"schema": 1}', b'{"schema": "1"}'], ids=repr
)
def test_corrupt_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "manifest.json: the manifest is damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(format="zip"),
        lambda r: r.update(row_alignment=0),
        lambda r: r["hosts"][0].update(kind="sandwich"),
        lambda r: r["hosts"][0].update(colour="red"),
        lambda r: r["hosts"][0]["tables"][0].update(rows=-1),
        lambda r: r["hosts"][0]["tables"][0].update(classes=[99]),
        lambda r: r["hosts"][0]["tables"][0].update(dtype="int3"),
        lambda r: r["classes"][0].pop("bits"),
        lambda r: r.update(classes=None),
        lambda r: r["files"].pop("tables.safetensors"),
    ],
)
def test_manifest_that_does_not_fit_together(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_manifest(folder, change)
    refused(folder, "the manifest is damaged")


def test_newer_schema(folder: Path) -> None:
    edit_manifest(folder, lambda record: record.update(schema=SCHEMA + 1))
    refused(folder, f"schema version {SCHEMA + 1}", f"reads up to {SCHEMA}: update")


@pytest.mark.parametrize("name", ["tables.safetensors", "dense.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"{name}: the file is missing")


@pytest.mark.parametrize("name", ["tables.safetensors", "dense.safetensors"])
def test_wrong_checksum(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    refused(folder, f"{name}: the checksum is wrong")
    (folder / name).write_bytes(content[:-10])
    refused(folder, f"{name}: the checksum is wrong")


@pytest.mark.parametrize("name", ["run_end", "run_code", "steps", "offsets", "class.0.values"])
def test_missing_tensor(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"tensor '{name}' is missing")


@pytest.mark.parametrize("name", ["run_end", "run_code", "steps", "offsets", "class.0.values"])
def test_tensor_of_another_size(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(folder, f"tensor '{name}' has shape")


def test_routers_that_lead_elsewhere(folder: Path) -> None:
    def rows(tensors: dict[str, Tensor]) -> None:
        tensors["run_end"][3] += 1

    def codes(tensors: dict[str, Tensor]) -> None:
        tensors["run_code"][0] = 77

    def counts(tensors: dict[str, Tensor]) -> None:
        tensors["run_end"][0] += 1

    before = (folder / "tables.safetensors").read_bytes(), (folder / "manifest.json").read_bytes()
    for change, message in ((rows, "do not cover"), (codes, "of a class that it does not have"), (counts, "routers")):
        edit_tensors(folder, change)
        refused(folder, message)
        for name, content in zip(("tables.safetensors", "manifest.json"), before, strict=True):
            (folder / name).write_bytes(content)
    load_model(folder, click_model())


@pytest.mark.parametrize("write", ["save_file", "_save_text", "_sha256", "_exchange"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_crash_half_way_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, error: BaseException, replaces: bool
) -> None:
    first = build(hosts_of(bag_collection()), 4)
    second = build(hosts_of(bag_collection()), 8)
    if replaces:
        write_export(first, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*")}

    def crash(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, write, crash)
        with pytest.raises(type(error)):
            write_export(second, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if replaces else [])
    write_export(second, tmp_path / "out", overwrite=True)  # and the next attempt works
    assert load(tmp_path / "out").served.tables[0].rows == 300  # type: ignore[union-attr, index]


def test_a_killed_write_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a power cut: nothing is cleaned up."""

    def crash(*args: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(files, "_save_text", crash)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit):
        write_export(build(hosts_of(bag_collection()), 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    [rest] = tmp_path.iterdir()
    with pytest.raises(ExportError, match=r"holds no manifest.json"):
        load(rest)


def test_the_old_export_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_export(build(hosts_of(bag_collection()), 4), tmp_path / "out")
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        write_export(build(hosts_of(bag_collection()), 8), tmp_path / "out", overwrite=True)
    assert load(tmp_path / "out")(features()).values().isfinite().all()


def test_what_is_there_already_is_kept(tmp_path: Path) -> None:
    artefact = build(hosts_of(bag_collection()), 4)
    (tmp_path / "empty").mkdir()
    write_export(artefact, tmp_path / "empty")
    with pytest.raises(ExportError, match="there is an export already.*--overwrite"):
        write_export(artefact, tmp_path / "empty")
    write_export(artefact, tmp_path / "empty", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ExportError, match="holds other things than an export"):
        write_export(artefact, tmp_path / "mine", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="there is a file of that name"):
        write_export(artefact, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [2, 8, 16, 32])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, bits: int) -> None:
    module = bag_collection()
    with torch.no_grad():
        module.embedding_bags["t_c"].weight[49, 3] = value
    with pytest.raises(ExportError, match="table 't_c' holds NaN or infinite weights"):
        build(hosts_of(module), bits)
    rounded = compressed(module, round_with=lambda rows, dim: precision_of(rows, dim, widths=(4,)))
    with pytest.raises(ExportError, match="table 't_c' holds NaN or infinite weights"):
        build(hosts_of(rounded))


def test_weights_too_large_for_float16() -> None:
    module = nn.EmbeddingBag(3, 4, mode="sum")
    with torch.no_grad():
        module.weight[0] = 1e6
    for bits in (8, 16):
        with pytest.raises(ExportError, match="beyond 65504.*32 bits"):
            build(hosts_of(module), bits)
    build(hosts_of(module), 32)


def test_settings_that_are_none(tmp_path: Path) -> None:
    model = built_model()
    for options, message in (
        ({"bits": 5}, "bits is 5; choose one of 2, 4, 8, 16, 32"),
        ({"tables": {"t_user": 3}}, "t_user is 3; choose"),
        ({"row_alignment": 0}, "row_alignment"),
        ({"max_ne_loss": -1.0}, "max_ne_loss"),
        ({"format": "zip"}, "format"),
    ):
        with pytest.raises(ExportError, match=message):
            ExportOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(UnknownTableError, match="no embedding table matches 't_usr'.*t_user"):
        export_module(model, tmp_path / "out", ExportOptions(tables={"t_usr": 4}))
    with pytest.raises(ExportError, match="holds no embedding table"):
        hosts_of(nn.Linear(2, 2))
    with pytest.raises(ExportError, match="pooled by max"):
        hosts_of(nn.EmbeddingBag(3, 4, mode="max"))
    with pytest.raises(ExportError, match="max_norm"):
        hosts_of(nn.Embedding(3, 4, max_norm=1.0))


def test_features_and_ids_that_the_tables_do_not_have(tmp_path: Path) -> None:
    write_export(build(hosts_of(bag_collection()), 4), tmp_path / "out")
    served = load(tmp_path / "out")
    batch = features()
    with pytest.raises(KeyError, match="the batch lacks feature 'a'"):
        served(KeyedJaggedTensor(["c", "b"], torch.tensor([0, 1]), lengths=torch.tensor([1, 1])))
    values = batch.values().clone()
    values[0] = 50
    with pytest.raises(IndexError, match="id 50 .* is outside table 't_c' with 50 rows"):
        served(KeyedJaggedTensor(batch.keys(), values, lengths=batch.lengths()))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5, 2, 6], "bag 1 goes from 5 to 2"),
        ([0, 100_000, 2, 6], "bag 1 goes from 100000 to 2"),
        ([0, -9, 2, 6], "bag 0 goes from 0 to -9"),
        ([0, 1, 5], "offsets go from 0 to 5, but must go from 0 to 6"),
    ],
)
def test_bags_that_no_batch_has(offsets: list[int], message: str) -> None:
    """A lookup reads memory by the offsets, in a graph too."""
    ids, bounds = torch.arange(6), torch.tensor(offsets)
    for padding in (4, None):
        source = nn.EmbeddingBag(10, 8, mode="sum", include_last_offset=True, padding_idx=padding)
        module: Any = serve(build(hosts_of(source), 8))
        for dtype in (torch.int32, torch.int64):
            with pytest.raises(ValueError, match=message):
                module(ids, bounds.to(dtype))
    served = module.served
    inside = ([*served.classes.rows], tensors_of(served.router), tensors_of(served.classes), [0], [8], [0])
    with pytest.raises(ValueError, match=message):
        pool_served_op(ids, bounds, None, *inside)
    with pytest.raises(ValueError, match=r"per_sample_weights of shape \(2,\) do not match"):
        pool_served_op(ids, torch.tensor([0, 6]), torch.ones(2), *inside)


def test_models_that_do_not_fit(folder: Path) -> None:
    def fails(model: nn.Module, message: str) -> None:
        with pytest.raises(ExportError, match=message):
            load_model(folder, model)

    other = [{"name": "user", "num_embeddings": 1500}, {"name": "item", "num_embeddings": 600}]
    fails(click_model(features=other), "only the export holds table 't_tags'")
    wider = [*other, {"name": "tags", "num_embeddings": 71}]
    fails(click_model(features=wider), "t_tags' was exported as 70 × 16, but the model has 71 × 16")
    turned = [other[1], other[0], {"name": "tags", "num_embeddings": 70}]
    fails(click_model(features=turned), "in another order")
    fails(click_model(pooling="mean"), "mean=False; the model has .* mean=True")
    fails(click_model(over_layers=(8,)), "the dense part does not fit the model: .*size mismatch")
    fails(click_model(over_layers=(16, 16)), "the dense part does not fit the model")
    fails(nn.ModuleDict({"x": nn.Embedding(3, 4)}), "only the .* holds tables at")


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


def with_own_behaviour(kind: str) -> nn.Module:
    if kind == "forward":
        return Scaled(9, 4)
    module: nn.Module = nn.Embedding(9, 4)
    if kind == "assigned":
        vars(module)["forward"] = Scaled(9, 4).forward
    elif kind == "hook":
        module.register_forward_hook(lambda module, args, out: 3 * out)
    elif kind == "compressed":
        module = compressed(module)
        module.register_forward_pre_hook(lambda module, args: args)
    else:
        nn.utils.parametrizations.weight_norm(module)
    return module


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("forward", "table 'x' is a Scaled with a forward of its own"),
        ("assigned", "table 'x' is a Embedding with a forward of its own"),
        ("hook", "table 'x' has hooks"),
        ("compressed", "table 'x' has hooks"),
        ("parametrization", "table 'x' is a ParametrizedEmbedding with a forward|table 'x' has a parametrization"),
    ],
)
def test_modules_that_do_more_than_their_tables(tmp_path: Path, kind: str, message: str) -> None:
    root = nn.ModuleDict({"x": with_own_behaviour(kind)})
    with pytest.raises(ExportError, match=message):
        export_module(root, tmp_path / "out")
    write_export(build(hosts_of(nn.ModuleDict({"x": nn.Embedding(9, 4)}))), tmp_path / "plain")
    with pytest.raises(ExportError, match=message):
        load_model(tmp_path / "plain", root)


def test_unallocated_tables_have_nothing_to_export() -> None:
    from lightning_embcomp import deferred_tables

    with deferred_tables():
        module = bag_collection()
    with pytest.raises(ExportError, match="table 't_a' is not allocated"):
        build(hosts_of(module))
