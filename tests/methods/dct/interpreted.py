"""Select by the Triton kernels, run by Triton's interpreter, and as on CPU; print how often there was no room."""

import json
from functools import partial

from lightning_embcomp.kernels.dispatch import force_backend

from .later import KINDS, compare


def main() -> None:
    triton = partial(force_backend, "triton")
    print(json.dumps({kind: compare(kind, "sampled", triton)[0] for kind in KINDS}))


if __name__ == "__main__":
    main()
