"""State of sharded tables brought together."""

import torch

from lightning_embcomp.engine.sharded.whole import WholeReader, whole_tables


def test_state_per_row_of_cut_tables_is_averaged() -> None:
    """Also that of counting optimizers, not momentum alone; state per weight stays as it is."""
    table = "compressed/bags/engine.tables.t."
    saved = {table + "shape": torch.tensor([1, 3, 8, 2, 0]), table + "row_codes": torch.full((3,), 2).byte()}
    saved[table + "rows.2.weight"] = torch.arange(24.0).view(3, 8)
    saved[table + "rows.2.per_weight"] = torch.ones(3, 8)
    for name in ("momentum1", "prev_iter", "row_counter"):
        saved[table + f"rows.2.{name}"] = torch.tensor([[1.0, 3.0], [4.0, 4.0], [0.0, 5.0]])
    found = whole_tables(WholeReader(saved, []))
    for name in ("momentum1", "prev_iter", "row_counter"):
        assert found[f"bags.engine.tables.t.rows.2.{name}"].tolist() == [2.0, 4.0, 2.5]
    assert found["bags.engine.tables.t.rows.2.per_weight"].shape == (3, 8)
    assert found["bags.engine.tables.t.rows.2.weight"].shape == (3, 8)
