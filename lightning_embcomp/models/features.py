"""What the reference models need to know about a categorical feature."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class FeatureLike(Protocol):
    """A categorical feature; :class:`lightning_embcomp.data.CategoricalFeature` is one."""

    @property
    def name(self) -> str:
        """Key of the feature in the ``KeyedJaggedTensor``."""

    @property
    def num_embeddings(self) -> int:
        """Number of ids; every id is in ``[0, num_embeddings)``."""

    @property
    def multi_valued(self) -> bool:
        """Whether an example may hold several ids."""


def feature_records(features: Sequence[FeatureLike | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn features into plain records, which a checkpoint can hold without its classes.

    Args:
        features: Objects with ``name``, ``num_embeddings`` and ``multi_valued``, or records as returned here.

    Returns:
        One ``{"name": str, "num_embeddings": int, "multi_valued": bool}`` for each feature, in order.

    Raises:
        ValueError: If there is no feature, a name is repeated or holds a dot, a number of embeddings is not
            positive, or a record lacks a field.

    Example:
        >>> feature_records([{"name": "user", "num_embeddings": 10, "multi_valued": False}])
        [{'name': 'user', 'num_embeddings': 10, 'multi_valued': False}]
    """
    records: list[dict[str, Any]] = []
    for feature in features:
        if isinstance(feature, Mapping):
            missing = {"name", "num_embeddings"} - feature.keys()
            if missing:
                raise ValueError(f"feature {dict(feature)!r} lacks {sorted(missing)}")
            name, rows, multi_valued = feature["name"], feature["num_embeddings"], feature.get("multi_valued", False)
        else:
            name, rows, multi_valued = feature.name, feature.num_embeddings, feature.multi_valued
        records.append({"name": str(name), "num_embeddings": int(rows), "multi_valued": bool(multi_valued)})
    if not records:
        raise ValueError("features is empty: the model needs at least one categorical feature")
    seen: set[str] = set()
    for record in records:
        name = record["name"]
        if name in seen:
            raise ValueError(f"feature name {name!r} occurs twice; every feature needs a name of its own")
        if "." in name or not name:
            # A table's name is part of a module path, where a dot separates levels.
            raise ValueError(f"feature name {name!r} must not be empty or hold a dot; rename the column")
        if record["num_embeddings"] <= 0:
            raise ValueError(f"feature {name!r} has num_embeddings={record['num_embeddings']}; it must be positive")
        seen.add(name)
    return records
