"""Bytes that are reported are those of the files and of the storages."""

from __future__ import annotations

from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_embcomp.export import ExportOptions, export_module, export_tables, load, read
from lightning_embcomp.export.accounting import plain_bytes, serving_bytes
from lightning_embcomp.export.bits import pack_bits, packed_bytes, unpack_bits
from lightning_embcomp.export.checkpoint import hosts_of_checkpoint
from lightning_embcomp.export.serving import ServedTables
from lightning_embcomp.export.view import render

from .pipeline import ROWS, bag_collection, built_model, compressed, precision_of


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("format", ["fbgemm", "packed"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_byte_is_counted(tmp_path: Path, format: str, alignment: int, shuffled: bool) -> None:
    source = compressed(built_model(), round_with=partial(precision_of, shuffled=shuffled, widths=(8, 2, 32, 0)))
    options = ExportOptions(format=format, row_alignment=alignment, bits=4)  # type: ignore[arg-type]
    report = export_module(source, tmp_path / "out", options)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert report.disk.total == files["manifest.json"] + files["tables.safetensors"]
    assert report.dense == files["dense.safetensors"]
    assert report.plain == 64 * sum(ROWS.values())
    assert report.disk_ratio == report.plain / report.disk.total
    assert (report.disk.padding > 0) == (alignment == 16 and format == "fbgemm")
    assert (report.serving.padding > 0) == (alignment == 16)

    served = load(tmp_path / "out")
    [tables] = [part for part in served.modules() if isinstance(part, ServedTables)]
    assert serving_bytes(served, report.manifest) == report.serving
    rows = sum(part.untyped_storage().nbytes() for part in {p.data_ptr(): p for p in tables.classes.rows}.values())
    assert report.serving.values + report.serving.row_parameters + report.serving.padding <= rows
    assert report.serving.shared_parameters == 4 * 16 * 3
    assert report.serving.router >= tables.router.packed.words.nbytes


def test_the_report_reads_well(tmp_path: Path) -> None:
    report = export_module(built_model(), tmp_path / "out", ExportOptions(bits=4))
    console = Console(width=80, file=StringIO())
    console.print(render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("row parameters", "plain, float32", "per row", "16 of 16", "NE guard: not run"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("origin", ["plain", "compressed", "checkpoint", "plain checkpoint"])
def test_plain_bytes_are_those_of_the_dtype(tmp_path: Path, origin: str) -> None:
    root: Any = nn.ModuleDict({"bags": bag_collection().half(), "user": nn.EmbeddingBag(30, 8, mode="sum")})
    if "plain" not in origin:
        compressed(root)
    if "checkpoint" in origin:
        hosts, dense = hosts_of_checkpoint({"state_dict": root.state_dict()}, "x.ckpt")
        report = export_tables(hosts, dense, tmp_path / "out")
    else:
        report = export_module(root, tmp_path / "out")
    other = 0 if origin == "plain checkpoint" else 4 * 30 * 8  # not told from other weights there
    assert report.plain == 2 * (300 * 16 + 50 * 8) + other
    assert plain_bytes(read(tmp_path / "out").manifest) == report.plain
    console = Console(width=80, file=StringIO())
    console.print(render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("plain, float16, float32" if other else "plain, float16") in text


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_packed_integers_come_back(bits: int, count: int) -> None:
    values = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_bits(values, bits)
    assert packed.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, count, bits), values)
    number = sum(int(value) << (bits * i) for i, value in enumerate(values.tolist()))
    assert bytes(packed.tolist()) == number.to_bytes(packed.numel(), "little")
    with pytest.raises(ValueError, match="bytes, not"):
        unpack_bits(torch.zeros(packed.numel() + 1, dtype=torch.uint8), count, bits)
