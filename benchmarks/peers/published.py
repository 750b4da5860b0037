"""Peers that were not run, and why."""

from __future__ import annotations

NOT_RUN: tuple[dict[str, str | None], ...] = (
    {
        "name": "TorchRec's in-training embedding pruning (ITEP)",
        "source": "torchrec.modules.itep_modules",
        "reason": "its operators init_address_lookup, remap_indices_update_utils and prune_embedding_tables are not in"
        " FBGEMM's CPU build; whole rows of this engine by frequency × gradient stand in for it",
        "published": None,
    },
    {
        "name": "AdaEmbed (OSDI 2023)",
        "source": "https://www.usenix.org/conference/osdi23/presentation/lai",
        "reason": "no public code was found; whole rows of this engine by frequency × gradient stand in for it",
        "published": "35 to 60 % of the embedding size saved in deployment, with gains of accuracy (industrial models)",
    },
    {
        "name": "PEP, the authors' code (ICLR 2021)",
        "source": "https://arxiv.org/abs/2101.07577",
        "reason": "tied to PyTorch 1.1, its own loaders and its own models; a reconstruction is run instead",
        "published": None,
    },
    {
        "name": "TT-Rec (MLSys 2021)",
        "source": "https://arxiv.org/abs/2101.11714",
        "reason": "its kernels are for CUDA",
        "published": "model size 4 to 221 times smaller at 0.03 to 0.3 % less accuracy (Criteo Kaggle, MLPerf DLRM)",
    },
    {
        "name": "CAFE (SIGMOD 2024)",
        "source": "https://arxiv.org/abs/2312.03256",
        "reason": "its sketch and tables are part of its own DLRM code; not built here",
        "published": "at 10,000 times smaller tables 3.92 % more test AUC than the methods compared (Criteo Kaggle)",
    },
    {
        "name": "DHE, deep hash embeddings",
        "source": "https://arxiv.org/abs/2010.10784",
        "reason": "a network in the place of tables; not built here",
        "published": None,
    },
)
"""Figures are those of the papers' abstracts, on other data, models and counts of bytes: they do not compare."""


def ops_missing() -> list[str]:
    """Operators of TorchRec's own pruning that the installed FBGEMM does not have.

    Example:
        >>> set(ops_missing()) <= {"init_address_lookup", "remap_indices_update_utils", "prune_embedding_tables"}
        True
    """
    import fbgemm_gpu  # noqa: F401 - registers the operators
    import torch

    names = ("init_address_lookup", "remap_indices_update_utils", "prune_embedding_tables")
    return [name for name in names if not hasattr(torch.ops.fbgemm, name)]
