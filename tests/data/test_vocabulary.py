"""Vocabularies against hand-worked ones and a plain dictionary."""

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lightning_embcomp.data import ClickLogSchema, Split
from lightning_embcomp.data import vocabulary as vocabulary_module
from lightning_embcomp.data.vocabulary import ValueCounter

from .files import ready, write

SCHEMA = ClickLogSchema(label="y", categorical=("c",), multi_valued={"t": "|"})


def test_hand_worked(tmp_path: Path) -> None:
    # 8 training rows: b 3 times, a and c twice, missing once; d only afterwards.
    values = ["b", "a", "c", "b", "", "c", "a", "b", "d", "b"]
    tags = ["x|y", "", "y", "y|z", "|", "y", "x|x", "q", "z", "x"]
    rows = "".join(f"{index % 2},{value},{tag}\n" for index, (value, tag) in enumerate(zip(values, tags, strict=True)))
    file = write(tmp_path / "log.csv", "y,c,t\n" + rows)
    settings = {"format": "table", "schema": SCHEMA, "split": Split(validation=0.1, test=0.1), "shuffle": False}
    data = ready(file, **settings)
    assert data.log.values("c").to_list() == ["b", "a", "c"]
    assert data.id_counts("c").tolist() == [1, 3, 2, 2]
    assert data.log.values("t").to_list() == ["y", "x", "q", "z"]
    assert data.id_counts("t").tolist() == [0, 4, 3, 1, 1]
    _, sparse, _ = next(iter(data.train_dataloader()))
    assert sparse["c"].values().tolist() == [1, 2, 3, 1, 0, 3, 2, 1]
    assert sparse["t"].lengths().tolist() == [2, 0, 1, 2, 0, 1, 2, 1]
    validation, test = (list(loader)[0][1] for loader in (data.val_dataloader(), data.test_dataloader()))  # type: ignore[index]
    assert validation["c"].values().tolist() == [0] and validation["t"].values().tolist() == [4]
    assert test["c"].values().tolist() == [1] and test["t"].values().tolist() == [2]

    rare = ready(file, min_count=3, **settings)
    assert rare.log.values("c").to_list() == ["b"]
    assert rare.id_counts("c").tolist() == [5, 3]
    assert rare.id_counts("t").tolist() == [2, 4, 3]
    assert [feature.num_embeddings for feature in rare.features] == [2, 3]


@pytest.mark.parametrize("compact_at", [1, 50, 1 << 20])
def test_counting_in_blocks(monkeypatch: pytest.MonkeyPatch, compact_at: int) -> None:
    monkeypatch.setattr(vocabulary_module, "_COMPACT_AT", compact_at)
    generator = np.random.default_rng(0)
    texts = [f"v{number}" for number in generator.zipf(1.3, 3000) % 500]
    counter = ValueCounter()
    for begin in range(0, 3000, 700):
        counter.add(pl.Series(texts[begin : begin + 700]))
    vocabulary = counter.vocabulary(min_count=2)
    expected = sorted(
        ((value, count) for value, count in Counter(texts).items() if count >= 2), key=lambda pair: (-pair[1], pair[0])
    )
    assert vocabulary.values.to_list() == [value for value, _ in expected]
    assert vocabulary.counts[1:].tolist() == [count for _, count in expected]
    assert vocabulary.counts.sum() == 3000
    ids = {value: index for index, (value, _) in enumerate(expected, start=1)}
    assert vocabulary.encode(pl.Series(texts)).tolist() == [ids.get(value, 0) for value in texts]


def test_unknown_feature(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", "y,c,t\n1,a,x\n")
    data = ready(file, format="table", schema=SCHEMA, split=Split(validation=0, test=0))
    with pytest.raises(KeyError, match="'d'; there are"):
        data.id_counts("d")
