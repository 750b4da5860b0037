"""Load an export: as a module of its own, or into the model that it was made from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_embcomp.deferred import deferred_tables
from lightning_embcomp.export.artefact import Artefact
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.expansion import Expanded, expand
from lightning_embcomp.export.files import read
from lightning_embcomp.export.hosts import ServedHost, feature_tables, serve_host
from lightning_embcomp.export.manifest import HostSpec
from lightning_embcomp.export.serving import ServedTables
from lightning_embcomp.export.sources import describe
from lightning_embcomp.export.tables import full_name
from lightning_embcomp.surgery import replace as replace_module
from lightning_embcomp.tables import HostView, find_hosts


class ServedModules(nn.Module):
    """The served modules of an export with several; ``modules["model.user"]`` is the one at that path.

    Args:
        modules: Module by path.
    """

    def __init__(self, modules: dict[str, ServedHost]) -> None:
        super().__init__()
        self.paths = tuple(modules)
        self.served = nn.ModuleList(modules.values())

    def __getitem__(self, path: str) -> nn.Module:
        if path not in self.paths:
            raise KeyError(f"the export holds no module {path!r}; it holds {', '.join(self.paths)}")
        return self.served[self.paths.index(path)]

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, path: str) -> bool:
        return path in self.paths

    def keys(self) -> tuple[str, ...]:
        """Paths of the modules, in order."""
        return self.paths


def load(dirpath: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """Load the tables of an export for serving.

    Args:
        dirpath: Folder that :func:`~lightning_embcomp.export.files.write` or ``embcomp export`` wrote.
        device: Where lookups run; there are kernels for CPUs and CUDA.

    Returns:
        For one module with tables, a module with its interface (``EmbeddingBagCollection``, ``EmbeddingCollection``,
        ``nn.EmbeddingBag`` or ``nn.Embedding``); for several, :class:`ServedModules`, by path.

    Raises:
        ExportError: If the folder is no export, is damaged, newer than this version, or lacks what is needed to tell
            the module's interface.
    """
    return serve(read(dirpath, dense=False), device)


def serve(artefact: Artefact, device: torch.device | str = "cpu") -> nn.Module:
    """Serve an export that is in memory; see :func:`load`."""
    modules = serve_by_path(artefact, device)
    return next(iter(modules.values())) if len(modules) == 1 else ServedModules(modules)


def serve_by_path(artefact: Artefact, device: torch.device | str = "cpu") -> dict[str, ServedHost]:
    """Serve an export that is in memory; the module at each path.

    Args:
        artefact: The export.
        device: Where lookups run.
    """
    return _modules(expand(artefact), artefact.manifest.hosts, device)


def serve_tables(artefact: Artefact) -> nn.Module:
    """Serve the tables of an export module by module, without the interfaces that it may not know.

    Args:
        artefact: The export.

    Returns:
        A list of :class:`~lightning_embcomp.export.serving.ServedTables`.
    """
    expanded, found, first = expand(artefact), [], 0
    for host in artefact.manifest.hosts:
        found.append(ServedTables(expanded, range(first, first + len(host.tables))))
        first += len(host.tables)
    return nn.ModuleList(found)


def load_model(dirpath: str | os.PathLike[str], module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Put an export into the model that it was made from.

    Args:
        dirpath: Folder of the export.
        module: A model of the same class and settings. A LightningModule whose ``configure_model`` was not called yet
            is built without allocating its tables; otherwise build it inside
            :func:`~lightning_embcomp.deferred.deferred_tables` to save that memory.
        device: Where lookups run.

    Returns:
        ``module``, in evaluation mode, with served tables and the exported dense part.

    Raises:
        ExportError: If the model does not fit the export, or the folder cannot be read.
    """
    return put_into(read(dirpath), module, device)


def put_into(artefact: Artefact, module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Put an export that is in memory into a model; see :func:`load_model`."""
    views = find_hosts(module)
    if not views and isinstance(module, pl.LightningModule):
        with deferred_tables():
            module.configure_model()
        views = find_hosts(module)
    manifest = artefact.manifest
    exported = {host.path for host in manifest.hosts}
    kept = [view for view in views if view.path not in exported and _is_dense(view, artefact.dense)]
    by_path = {view.path: view for view in views if view not in kept}
    missing = sorted(exported ^ set(by_path))
    if missing:
        where = "model" if missing[0] in by_path else "export"
        raise ExportError(f"only the {where} holds tables at {missing[0]!r}: load it into a model of the same settings")
    specs = tuple(_fitted(host, by_path[host.path]) for host in manifest.hosts)
    fitted = replace(artefact, manifest=manifest.with_(hosts=specs))
    for path, served in _modules(expand(fitted), specs, device).items():
        if path:
            replace_module(module, path, served)
        else:
            module = served
    for view in kept:
        if view.tables[0].weight is not None and view.tables[0].weight.is_meta:
            view.module.to_empty(device=device)
    if artefact.dense:
        _load_dense(module, artefact.dense)
    return module.eval()


def _is_dense(view: HostView, dense: Mapping[str, Tensor]) -> bool:
    """Whether the dense part holds a plain embedding: a checkpoint alone does not tell it from other weights."""
    return isinstance(view.module, nn.Embedding | nn.EmbeddingBag) and f"{view.path}.weight" in dense


def _modules(expanded: Expanded, hosts: Sequence[HostSpec], device: torch.device | str) -> dict[str, ServedHost]:
    modules, first = {}, 0
    for host in hosts:
        indices = range(first, first + len(host.tables))
        first += len(host.tables)
        served = ServedTables(expanded, indices, feature_tables(host.tables), device)
        modules[host.path] = serve_host(host, host.tables, served)
    return modules


def _fitted(host: HostSpec, view: HostView) -> HostSpec:
    """What an export says about a module, completed and checked by the module itself."""
    found = describe(view)
    if host.kind not in ("unknown", found.kind):
        raise ExportError(f"{host.path!r} was exported as a {host.kind}, but the model holds a {found.kind} there")
    wanted = {table.name: table for table in host.tables}
    for name in sorted(wanted.keys() ^ {table.name for table in found.tables}):
        where = "export" if name in wanted else "model"
        raise ExportError(f"only the {where} holds table {name!r} at {host.path!r}")
    order = {table.name: table for table in found.tables}
    tables = []
    for spec in host.tables:
        mine = order[spec.name]
        if (spec.rows, spec.dim) != (mine.rows, mine.dim):
            raise ExportError(
                f"table {full_name(host.path, spec.name)!r} was exported as {spec.rows} × {spec.dim}, but the model has"
                f" {mine.rows} × {mine.dim}"
            )
        if host.kind != "unknown" and spec.features and (spec.features, spec.mean) != (mine.features, mine.mean):
            raise ExportError(
                f"table {full_name(host.path, spec.name)!r} was exported with features {list(spec.features)},"
                f" mean={spec.mean}; the model has {list(mine.features)}, mean={mine.mean}"
            )
        tables.append(replace(spec, features=mine.features, mean=mine.mean))
    if [table.name for table in found.tables] != [table.name for table in host.tables]:
        raise ExportError(f"the tables of {host.path!r} are in another order than in the export")
    return replace(
        host,
        kind=found.kind,
        tables=tuple(tables),
        is_weighted=found.is_weighted,
        need_indices=found.need_indices,
        include_last_offset=found.include_last_offset,
        # Of a compressed nn.Embedding the padding row reads as zero, whatever is stored for it.
        padding_idx=getattr(view.module, "padding_idx", None) if host.kind == "unknown" else host.padding_idx,
    )


def _load_dense(module: nn.Module, dense: Mapping[str, Tensor]) -> None:
    try:
        missing, unexpected = module.load_state_dict(dict(dense), strict=False)
    except RuntimeError as error:
        raise ExportError(f"the dense part does not fit the model: {' '.join(str(error).split())}") from error
    if missing or unexpected:
        lacks = f"the export lacks {missing[0]}" if missing else f"the model has no {unexpected[0]}"
        raise ExportError(f"the dense part does not fit the model: {lacks}")


__all__ = ["ServedModules", "load", "load_model", "put_into", "serve", "serve_by_path", "serve_tables"]
