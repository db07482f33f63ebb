"""The initial state of every test: one thread, Triton's interpreter without a GPU, a working Ctrl-C, a fixed seed, and
`torch.empty` filled with NaN.
"""

from __future__ import annotations

import functools
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# Tests are small and run in several processes: further threads in each process would only wait for one another.
torch.set_num_threads(1)

# torch lists its constructors at the first use of a default device and keeps this list. The list must contain the real
# `torch.empty`, not the one below: otherwise a model on the meta device would be allocated, however large it is.
with torch.device("meta"):
    torch.empty(0)

# Without a GPU, kernels in Triton run in its interpreter. Triton reads this variable when it is imported, and torch can
# import Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A process in the background of a shell script ignores Ctrl-C, and the processes that tests start would inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill floating tensors of `torch.empty` and `torch.empty_like` with NaN, so that unwritten values fail a test."""

    def filled(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(create)
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
