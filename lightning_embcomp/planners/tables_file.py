"""Read a list of tables, to plan before there is a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from lightning_embcomp.planners.options import PlanInputError

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer] | None] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "none": None,
}
_DTYPES = {"float32": DataType.FP32, "float16": DataType.FP16}
_SHARED = ("dim", "pooling")
_KNOWN = ("name", "rows", *_SHARED)


@dataclass(frozen=True, kw_only=True)
class TableList:
    """Tables of a file.

    Args:
        module: A collection of them on the meta device.
        pooling: Ids per sample, by table name.
    """

    module: nn.Module
    pooling: dict[str, float]


def read_tables(path: str | os.PathLike[str]) -> TableList:
    r"""Read a YAML file of tables.

    The file holds ``tables``, a list of mappings with ``name``, ``rows``, ``dim`` and, where it is not 1, ``pooling``
    (ids per sample). Beside it stand, where wanted, ``dim`` and ``pooling`` for tables without their own,
    ``optimizer`` (``rowwise_adagrad`` by default, ``adagrad``, ``sgd``, or ``none`` for tables that are trained from
    ``configure_optimizers``) and ``dtype`` (``float32`` or ``float16``).

    Args:
        path: The file.

    Returns:
        The tables; nothing is allocated.

    Raises:
        PlanInputError: If the file is missing or holds something else, with the entry.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "tables.yaml"
        >>> _ = file.write_text("dim: 16\ntables:\n- {name: user, rows: 1000000, pooling: 3}\n")
        >>> listed = read_tables(file)
        >>> listed.pooling, [tuple(weight.shape) for weight in listed.module.parameters()]
        ({'user': 3.0}, [(1000000, 16)])
    """
    content = _load(Path(path))
    if isinstance(content, list):
        content = {"tables": content}
    if not isinstance(content, Mapping) or not isinstance(content.get("tables"), list) or not content["tables"]:
        raise PlanInputError(f"{path}: write a list of tables under 'tables:', each with name, rows and dim")
    _check_keys(content, ("tables", "optimizer", "dtype", *_SHARED), f"{path}")
    optimizer = _choice(content, "optimizer", _OPTIMIZERS, "rowwise_adagrad", path)
    dtype = _choice(content, "dtype", _DTYPES, "float32", path)
    configs, pooling = [], {}
    for number, entry in enumerate(content["tables"], start=1):
        where = f"{path}: table {number}"
        if not isinstance(entry, Mapping):
            raise PlanInputError(f"{where} is {entry!r}; write {{name: user, rows: 1000000, dim: 64}}")
        _check_keys(entry, _KNOWN, where)
        name = entry.get("name")
        if not isinstance(name, str) or not name or name in pooling:
            raise PlanInputError(f"{where} needs a name of its own, not {name!r}")
        where = f"{where} ({name})"
        rows = int(_number(entry, "rows", where, whole=True))
        dim = int(_number({**content, **entry}, "dim", where, whole=True))
        pooling[name] = _number({"pooling": 1, **content, **entry}, "pooling", where)
        configs.append(
            EmbeddingBagConfig(
                name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name], data_type=_DTYPES[dtype]
            )
        )
    module = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    chosen = _OPTIMIZERS[optimizer]
    if chosen is not None:
        with warnings.catch_warnings():
            # Behind it torch imports all of its distributed optimizers, some of which it deprecates itself.
            warnings.simplefilter("ignore", DeprecationWarning)
            apply_optimizer_in_backward(chosen, module.parameters(), {"lr": 0.01})
    return TableList(module=module, pooling=pooling)


def _load(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise PlanInputError(f"{path}: it cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise PlanInputError(f"{path}: this is not YAML: {' '.join(str(error).split())}") from error


def _check_keys(entry: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise PlanInputError(f"{where}: there is no {unknown[0]!r}; known are {', '.join(known)}")


def _choice(
    content: Mapping[str, Any], key: str, choices: Mapping[str, Any], default: str, path: str | os.PathLike[str]
) -> str:
    value = content.get(key, default)
    if value not in choices:
        raise PlanInputError(f"{path}: {key} must be one of {', '.join(choices)}, not {value!r}")
    return str(value)


def _number(entry: Mapping[str, Any], key: str, where: str, *, whole: bool = False) -> float:
    value = entry.get(key)
    allowed = int if whole else (int, float)
    if not isinstance(value, allowed) or isinstance(value, bool) or not value > 0:
        kind = "a whole number" if whole else "a number"
        raise PlanInputError(f"{where}: {key} must be {kind} above 0, not {value!r}")
    return float(value)
