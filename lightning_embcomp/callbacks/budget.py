"""One budget for dimension pruning and mixed precision."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_embcomp.methods.budget.callback import BudgetCallback
from lightning_embcomp.methods.budget.config import BudgetControl, BudgetOf, check_budget, check_start
from lightning_embcomp.methods.fiited.callback import DimensionPruning
from lightning_embcomp.methods.fiited.config import Granularity, PruningSchedule
from lightning_embcomp.methods.mpe.callback import MixedPrecisionSearch
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization
from lightning_embcomp.sizes import parse_bytes

_FLOAT_BITS = 32


class CompressionBudget(BudgetCallback):
    """Hold tables to one byte budget by pruning and mixed precision together, as long as validation NE allows it.

    Brings its own :class:`DimensionPruning` and :class:`MixedPrecisionSearch`; list neither for the same tables. At
    every event each of them offers its next step, validation measures what the steps would cost, and the cheaper one is
    made if it costs no more than the price of a byte. The price rises while bytes exceed the budget, and falls outside
    the guard. A step is on probation until the next event; if NE leaves the guard, all goes back to the state before
    it, which is kept in memory for so long.

    Logged at every event: ``budget/multiplier`` (the price), ``budget/bytes``, ``budget/training_bytes``,
    ``budget/serving_bytes``, ``budget/ne``, ``budget/limit``, ``budget/guard`` (1 inside), ``budget/met``,
    ``budget/share`` (of the weights), ``budget/average_bits``, ``budget/rolled_back`` and ``budget/snapshot_bytes``.

    Args:
        memory: Bytes for the selected tables, as a number or like ``2GB``. Give this or ``ratio``.
        ratio: Plain bytes over those of the budget.
        max_ne_loss: Relative increase of validation NE that is allowed; null switches the guard off, so that the
            methods act in turn whatever NE does.
        of: Bytes that count: ``serving`` are rows and router of the exported tables in memory, ``training`` weights,
            fused optimizer state, router and statistics while training, where only pruning helps.
        tables: Globs of the tables; one that starts with ``!`` excludes.
        reference_ne: NE that losses are counted from, for example that of a plain run; no step is made before it is
            reached. By default the lowest NE that the run itself has shown.
        start: Share of the weights that is stored from the first step on; 1 starts from whole tables.
        control: How the price moves and how far a step goes.
        schedule: When pruning moves rows.
        granularity: What pruning lets live or die.
        search: How what rounding costs is measured; its epochs or steps are the warm-up. ``serving`` only.
        quantization: How values are rounded. ``serving`` only.

    Raises:
        ValueError: If memory or ratio are missing, both given, or a setting is out of range or has no effect.

    Example:
        >>> CompressionBudget(memory="2GB", max_ne_loss=0.0005).budget
        2000000000
    """

    def __init__(
        self,
        memory: int | str | None = None,
        ratio: float | None = None,
        max_ne_loss: float | None = 0.0005,
        of: BudgetOf = "serving",
        tables: str | Sequence[str] = "*",
        reference_ne: float | None = None,
        start: float = 1.0,
        control: BudgetControl | None = None,
        schedule: PruningSchedule | None = None,
        granularity: Granularity | None = None,
        search: PrecisionSearch | None = None,
        quantization: RowQuantization | None = None,
    ) -> None:
        check_budget(memory, ratio, max_ne_loss, reference_ne)
        pruning = DimensionPruning(
            target=1 - check_start(start), tables=tables, schedule=schedule, granularity=granularity
        )
        if of not in ("serving", "training"):
            raise ValueError(f"CompressionBudget: of must be 'serving' or 'training', not {of!r}")
        if of == "training" and (search or quantization):
            raise ValueError("CompressionBudget: search and quantization have no effect with of='training': drop them")
        members: list[DimensionPruning | MixedPrecisionSearch] = [pruning]
        if of == "serving":
            members.append(_precision(search or PrecisionSearch(), quantization, tables))
        super().__init__(
            members,
            budget=None if memory is None else parse_bytes(memory),
            ratio=ratio,
            of=of,
            max_ne_loss=max_ne_loss,
            reference_ne=reference_ne,
            control=control,
        )


def _precision(
    search: PrecisionSearch, quantization: RowQuantization | None, tables: str | Sequence[str]
) -> MixedPrecisionSearch:
    """A search that ends with all rows at the largest width; what follows is up to the budget."""
    largest = search.widths[-1]
    if search.method != "sensitivity":
        raise ValueError("CompressionBudget: search.method must be 'sensitivity', whose errors are compared by byte")
    if largest == _FLOAT_BITS:
        raise ValueError(
            f"CompressionBudget: search.widths {list(search.widths)} hold {_FLOAT_BITS} bits: use widths up to 8"
        )
    if quantization is not None and quantization.offset:
        raise ValueError("CompressionBudget: quantization.offset would fill columns that pruning cuts: leave it out")
    return MixedPrecisionSearch(ratio=_FLOAT_BITS / largest, tables=tables, search=search, quantization=quantization)
