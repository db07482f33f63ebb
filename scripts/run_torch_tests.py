"""Call our functions at α = 1 with the samples that torch tests its own with, and print where the results differ.

    python scripts/run_torch_tests.py

The samples (OpInfo) come with torch, in ``torch.testing``, and need expecttest. Outputs and gradients are compared with
those of torch's function, in float64. Samples with dropout cannot agree, since ours draws other random numbers: they
are counted apart, and do not make the exit status 1 as every other difference does.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from sparse_attn import entmax, entmax_attention, entmax_loss

_DROPOUT = "dropout draws other random numbers"


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.softmax``, whose ``dtype`` casts the scores first."""
    return entmax(x if dtype is None else x.to(dtype), 1.0, dim)


def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``scaled_dot_product_attention``."""
    return entmax_attention(query, key, value, 1.0, *args, **kwargs)


def cross_entropy(x: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.cross_entropy``."""
    return entmax_loss(x, target, 1.0, **kwargs)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "nn.functional.scaled_dot_product_attention": (F.scaled_dot_product_attention, attention),
    "nn.functional.cross_entropy": (F.cross_entropy, cross_entropy),
    "softmax": (torch.softmax, softmax),
}


def results(function: Callable[..., Tensor], sample: Any) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input, with the random numbers of one seed."""
    torch.manual_seed(0)
    x = sample.input.detach().requires_grad_()
    output = function(x, *sample.args, **sample.kwargs)
    return output.detach(), torch.autograd.grad(output, x, torch.ones_like(output))[0]


def difference(torchs: Callable[..., Tensor], ours: Callable[..., Tensor], sample: Any) -> str | None:
    """How ours fails a sample, in a few words; None where it agrees."""
    expected = results(torchs, sample)
    try:
        torch.testing.assert_close(results(ours, sample), expected, equal_nan=True)
    except AssertionError:
        dropout = sample.kwargs.get("dropout_p", 0.0) > 0
        return _DROPOUT if dropout else "another result"
    except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def main() -> int:
    """Print one line per function, and one per kind of failure below it."""
    failed = False
    for info in op_db:
        if info.name not in FUNCTIONS or info.variant_test_name:
            continue
        samples = list(info.sample_inputs("cpu", torch.float64, requires_grad=False))
        kinds = Counter(difference(*FUNCTIONS[info.name], sample) for sample in samples)
        print(f"{info.name}: {kinds.pop(None, 0)} of {len(samples)} samples agree")
        for kind, count in kinds.most_common():
            print(f"    {count:3}  {kind}")
        failed |= bool(kinds.keys() - {_DROPOUT})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
