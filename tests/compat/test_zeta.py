"""The examples and statements about `sparsemax` and `sparse_softmax` in zeta's documentation."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from sparse_attn.compat import zeta
from sparse_attn.compat.zeta import sparse_softmax, sparsemax


def check(p, k):
    assert (p >= 0).all()
    assert ((p > 0).sum(-1) <= k).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]))


def test_signatures():
    assert list(inspect.signature(zeta.sparsemax).parameters) == ["x", "k"]
    assert str(inspect.signature(zeta.sparse_softmax)) == "(z: 'Tensor', k: 'int' = 3) -> 'Tensor'"


def test_sparsemax_basic_usage():
    p = sparsemax(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), 3)
    check(p, 3)
    assert p.tolist() == [[0, 0, 0, 0, 1]]  # scores differ by one: the largest has all the weight


def test_sparsemax_of_a_large_tensor():
    x = torch.randn(10, 1000)
    p = sparsemax(x, 50)
    check(p, 50)
    check(sparsemax(1e-3 * x, 50), 50)
    assert ((sparsemax(1e-3 * x, 50) > 0).sum(-1) == 50).all()  # sparsemax itself would keep about 800


def test_sparsemax_refuses_k_above_the_number_of_entries():
    with pytest.raises(ValueError, match="k must be at least 1 and at most 3, the size of dim, got 5"):
        sparsemax(torch.tensor([[1.0, 2.0, 3.0]]), 5)


def test_sparse_softmax_basic_usage():
    p = sparse_softmax(torch.tensor([2.0, 1.5, 0.1, -1.0, 3.2, 0.7]), k=3)
    check(p, 3)
    assert p.tolist() == [0, 0, 0, 0, 1, 0]


def test_sparse_softmax_of_each_sample_of_a_batch():
    batch = torch.tensor([[2.0, -0.5], [1.5, -1.0], [0.1, 2.5], [-1.0, 3.0]])
    p = torch.stack([sparse_softmax(sample, k=2) for sample in batch])
    check(p, 2)
    assert torch.equal(p, sparse_softmax(batch, k=2))  # rows are along the last dimension
    assert p.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_sparse_softmax_inside_a_layer():
    class SparseAttention(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k

        def forward(self, queries, keys, values):
            scores = torch.bmm(queries, keys.transpose(1, 2))
            weights = torch.stack([sparse_softmax(sample, k=self.k) for sample in scores])
            check(weights, self.k)
            return torch.bmm(weights, values)

    queries, keys, values = torch.randn(3, 2, 3, 5, requires_grad=True).unbind()
    out = SparseAttention(k=2)(queries, keys, values)
    assert out.shape == (2, 3, 5)
    out.sum().backward()


def test_sparse_softmax_of_large_scores():
    # zeta returns NaN.
    assert sparse_softmax(torch.tensor([100.0, 99.0, 0.0]), k=2).tolist() == [1, 0, 0]
    assert sparse_softmax(torch.tensor([100.0, 99.5, 0.0]), k=2).tolist() == [0.75, 0.25, 0]
