"""Compare the Triton rounding kernel with the plain one, on CPU by Triton's interpreter (``TRITON_INTERPRET=1``)."""

import torch

from lightning_embcomp.kernels.dispatch import Backend, force_backend
from lightning_embcomp.kernels.quantize import PASS, Rounding, round_rows, round_rows_backward

WIDTHS = torch.tensor([0, 1, 2, 4, 8, PASS])


def compare(rows: int, columns: int, all_candidates: bool) -> None:
    """Same values and gradients, up to the order of sums."""
    source = torch.Generator().manual_seed(rows + columns)
    shares = torch.rand(5, 6, generator=source)
    shares[1, 2:4] = 0.0
    rounding = Rounding(
        group=torch.randint(-1, 5, (rows,), generator=source),
        table=torch.tensor([0, 0, 1, 2, 2]),
        widths=WIDTHS,
        shares=shares,
        steps=torch.rand(3, 6, generator=source) * 0.5 + 0.05,
        offset=torch.randn(3, columns, generator=source) * 0.1,
    )
    values, grad = torch.randn(columns, rows, generator=source).t(), torch.randn(rows, columns, generator=source)
    results = []
    backends: tuple[Backend, ...] = ("reference", "triton")
    for backend in backends:
        with force_backend(backend):
            row_grad, sums = round_rows_backward(grad, values, rounding, all_candidates)
            results.append((round_rows(values, rounding), row_grad, *vars(sums).values()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    for n_rows in (0, 1, 37, 64):
        for n_columns in (1, 6, 16, 40):
            compare(n_rows, n_columns, all_candidates=n_rows != 64)
