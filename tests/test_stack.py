"""The check of torch, torchrec and fbgemm against each other."""

import pytest

from lightning_embcomp import stack
from lightning_embcomp.stack import StackMismatchError, check_stack, find_mismatch, installed_versions


def versions(
    torch: str | None = "2.13.0",
    torchrec: str | None = "1.8.0",
    cuda: str | None = None,
    cpu: str | None = None,
) -> dict[str, str | None]:
    return {"torch": torch, "torchrec": torchrec, "fbgemm-gpu": cuda, "fbgemm-gpu-cpu": cpu}


@pytest.mark.parametrize(
    "good",
    [
        versions(cpu="1.8.0"),
        versions("2.13.0+cpu", cpu="1.8.0"),
        versions("2.13.1+cu130", cuda="1.8.0"),
        versions("2.13.0", "1.8.0+cpu", cpu="1.8.0+cpu"),
        versions("2.11.0", "1.6.0", cuda="1.6.0"),
        versions("2.13.0+cu130", "1.8.0+cu130", cuda="1.8.0+cu130"),
        versions("2.11.0+cu130", "1.6.1", cpu="1.6.0"),
    ],
)
def test_known_trios_pass(good: dict[str, str | None]) -> None:
    check_stack(good)


@pytest.mark.parametrize(
    ("bad", "problem", "mend"),
    [
        (versions(cpu="1.9.0"), "fbgemm-gpu-cpu 1.9.0 does not load beside torch 2.13.0", '"fbgemm-gpu-cpu==1.8.*"'),
        (versions(cuda="1.7.0"), "fbgemm-gpu 1.7.0 does not load", '"fbgemm-gpu==1.8.*"'),
        (versions(torchrec="1.6.0", cpu="1.8.0"), "torchrec 1.6.0 does not work", '--no-deps "torchrec==1.8.*"'),
        (versions("2.11.0", cpu="1.8.0"), "needs fbgemm-gpu-cpu 1.6", '"torch==2.11.*" "fbgemm-gpu-cpu==1.6.*"'),
        (versions("2.15.0", "1.9.0", cuda="1.9.0"), "torch 2.15.0 is not a release", '"torch==2.13.*"'),
        (versions(cuda="1.8.0", cpu="1.8.0"), "both installed", "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu"),
        (versions("2.13.0+cpu", cuda="1.8.0"), "CUDA build", "pip uninstall -y fbgemm-gpu\n"),
        (versions("2.13.0+cu130", cuda="1.8.0+cu126"), "package index of cu130", "pip uninstall -y fbgemm-gpu\n"),
        (
            versions("2.11.0+cu130", "1.6.0", cuda="1.8.0"),
            "needs fbgemm-gpu 1.6",
            '"torch==2.11.*" "fbgemm-gpu==1.6.*"',
        ),
        (versions(torch=None, cpu="1.8.0"), "torch is not installed", '"torch==2.13.*"'),
        (versions(torchrec=None, cpu="1.8.0"), "torchrec is not installed", '"torchrec==1.8.*"'),
        (versions(), "neither fbgemm-gpu-cpu nor fbgemm-gpu", '"fbgemm-gpu-cpu==1.8.*"'),
    ],
)
def test_mismatch_is_named_with_the_mend(bad: dict[str, str | None], problem: str, mend: str) -> None:
    with pytest.raises(StackMismatchError) as error:
        check_stack(bad)
    assert problem in str(error.value)
    assert mend in str(error.value)


def test_a_mismatch_is_an_import_error() -> None:
    with pytest.raises(ImportError):
        check_stack(versions(cpu="1.9.0"))


def test_this_environment_passes() -> None:
    found = installed_versions()
    assert found["torch"] is not None
    assert find_mismatch(found) is None
    check_stack()


def test_a_package_that_is_missing_reads_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_PACKAGES", ("torch", "no-such-distribution"))
    assert installed_versions()["no-such-distribution"] is None
