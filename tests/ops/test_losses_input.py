"""Error messages of the losses, and the values that ``ignore_index`` can have."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from sparse_attn import entmax15_loss, entmax_loss, sparsemax_loss

N, C, D1 = 7, 5, 3
X, TARGET = torch.zeros(2, C, D1), torch.zeros(2, D1, dtype=torch.int64)
PROBABILITIES = torch.full((2, C, D1), 1 / C)


@pytest.mark.parametrize(
    ("error", "message", "args", "keywords"),
    [
        (TypeError, "x must be a torch.Tensor, got list", ([1.0], TARGET), {}),
        (TypeError, "x must have a floating dtype .*, got torch.int64", (X.long(), TARGET), {}),
        (TypeError, "x must have a floating dtype .*, got torch.complex64", (X.cfloat(), TARGET), {}),
        (ValueError, r"x must have shape \(C\), .*, got shape \(\)", (X[0, 0, 0], TARGET[0, 0]), {}),
        (TypeError, "target must be a torch.Tensor, got int", (X, 1), {}),
        (ValueError, "target must be on the device of x, cpu, got meta", (X, TARGET.to("meta")), {}),
        (
            ValueError,
            r"target must have shape \(2, 3\) \(class indices\) or \(2, 5, 3\) .*, got shape \(3, 2\)",
            (X, TARGET.T),
            {},
        ),
        (ValueError, r"target must have shape \(\) .*, got shape \(1,\)", (X[0, :, 0], TARGET[0, :1]), {}),
        (TypeError, "target must be int64 or uint8 .*, got torch.int32", (X, TARGET.int()), {}),
        (TypeError, "target must be int64 or uint8 .*, got torch.float32", (X, TARGET.float()), {}),
        (TypeError, "target must be floating .*, got torch.int64", (X, PROBABILITIES.long()), {}),
        (
            ValueError,
            "ignore_index must be negative for a target of probabilities, got 0",
            (X, PROBABILITIES),
            {"ignore_index": 0},
        ),
        (IndexError, r"target must be in \[0, 4\] or ignore_index \(-100\), got 5", (X, TARGET + 5), {}),
        (
            IndexError,
            r"target must be in \[0, 4\] or ignore_index \(2\), got -100",
            (X, TARGET - 100),
            {"ignore_index": 2},
        ),
        (TypeError, "ignore_index must be an int, got float", (X, TARGET), {"ignore_index": 1.0}),
        (TypeError, "ignore_index must be an int, got bool", (X, TARGET), {"ignore_index": True}),
        (ValueError, "reduction must be one of none, mean, sum, got 'avg'", (X, TARGET), {"reduction": "avg"}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", (X, TARGET), {"label_smoothing": 1.5}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got -0.1", (X, TARGET), {"label_smoothing": -0.1}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got nan", (X, TARGET), {"label_smoothing": math.nan}),
        (TypeError, "label_smoothing must be a number, got '0.1'", (X, TARGET), {"label_smoothing": "0.1"}),
        (TypeError, "weight must be a torch.Tensor, got list", (X, TARGET), {"weight": [1.0] * C}),
        (TypeError, "weight must have a floating dtype", (X, TARGET), {"weight": torch.ones(C, dtype=torch.int64)}),
        (ValueError, r"weight must have shape \(C\), got shape \(1, 5\)", (X, TARGET), {"weight": torch.ones(1, C)}),
        (
            ValueError,
            r"weight must have shape \(5,\), one per class, got shape \(3,\)",
            (X, TARGET),
            {"weight": torch.ones(3)},
        ),
        (
            ValueError,
            "weight must be on the device of x, cpu, got meta",
            (X, TARGET),
            {"weight": torch.ones(C, device="meta")},
        ),
        (ValueError, r"alpha must be in \(0, inf\), got 0", (X, TARGET, 0.0), {}),
        (ValueError, r"alpha must be in \(0, inf\), got nan", (X, TARGET, math.nan), {}),
        (ValueError, r"alpha must be in \(0, inf\), got -1", (X, TARGET, torch.tensor(-1.0)), {}),
        (ValueError, r"alpha must be in \(0, inf\), got nan", (X, TARGET, torch.full((2, 1, 1), math.nan)), {}),
        (TypeError, "alpha must be a number or a floating tensor, got str", (X, TARGET, "1.5"), {}),
        (
            TypeError,
            "alpha must be a number or a floating tensor, got a tensor of torch.int64",
            (X, TARGET, TARGET),
            {},
        ),
        (
            ValueError,
            r"alpha must broadcast against x of shape \(2, 5, 3\) with size 1 along dim 1, got shape \(2,\); for one "
            r"alpha per entry of dim 0 use alpha.view\(-1, 1, 1\)",
            (X, TARGET, torch.ones(2)),
            {},
        ),
        (ValueError, "alpha must broadcast against x", (X, TARGET, torch.ones(2, C, 1)), {}),
    ],
)
def test_invalid_input_raises_an_error(error, message, args, keywords):
    with pytest.raises(error, match=message):
        entmax_loss(*args, **keywords)
    if len(args) == 2:
        with pytest.raises(error, match=message):
            sparsemax_loss(*args, **keywords)
        with pytest.raises(error, match=message):
            entmax15_loss(*args, **keywords)


def test_ignore_index_can_be_any_integer_if_the_target_holds_indices():
    x, target = torch.randn(N, C), torch.randint(C, (N,))
    expected = entmax_loss(x[1:], target[1:])
    for ignored in (-100, -1, C, 10**12, numpy.int64(-1), torch.tensor(-1)):
        target[0] = ignored
        torch.testing.assert_close(entmax_loss(x, target, ignore_index=ignored), expected)


def test_a_class_out_of_range_is_refused_under_vmap_and_grad():
    for function in (entmax_loss, torch.func.grad(entmax_loss)):
        with pytest.raises(IndexError, match=r"target must be in \[0, 4\] or ignore_index \(-100\), got"):
            torch.func.vmap(function)(X[..., 0], TARGET[:, 0] + 5)
        with pytest.raises(IndexError, match=r"target must be in \[0, 4\] or ignore_index \(-100\), got"):
            torch.func.vmap(function, in_dims=(0, None))(X[..., 0], torch.tensor(7))
