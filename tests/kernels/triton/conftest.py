"""Kernels run on the GPU where there is one, and otherwise in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from sparse_attn import use_backend
from sparse_attn.kernels import triton

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    """Every test of this folder computes with the kernels, or is skipped if they cannot run."""
    if not triton.available():
        pytest.skip(triton.status()[1])
    with use_backend("triton"):
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if triton.interpreted() else "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The interpreter computes both values of `tl.where`; the value that is not used can cause a warning of NumPy.
    for item in items:
        if "kernels/triton" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))
