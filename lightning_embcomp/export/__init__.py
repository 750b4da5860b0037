"""Exports: low-precision tables that leave training ready to serve."""

from lightning_embcomp.export.artefact import Artefact, build
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.files import folder_bytes, read, write
from lightning_embcomp.export.guard import GuardResult, NEGuardError
from lightning_embcomp.export.loading import ServedModules, load, load_model, put_into, serve
from lightning_embcomp.export.manifest import Manifest
from lightning_embcomp.export.pipeline import ExportOptions, ExportReport, export_module, export_tables
from lightning_embcomp.export.sources import dense_state, hosts_of
from lightning_embcomp.export.tables import ExportHost, ExportTable

__all__ = [
    "Artefact",
    "ExportError",
    "ExportHost",
    "ExportOptions",
    "ExportReport",
    "ExportTable",
    "GuardResult",
    "Manifest",
    "NEGuardError",
    "ServedModules",
    "build",
    "dense_state",
    "export_module",
    "export_tables",
    "folder_bytes",
    "hosts_of",
    "load",
    "load_model",
    "put_into",
    "read",
    "serve",
    "write",
]
