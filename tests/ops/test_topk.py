from __future__ import annotations

import math

import numpy
import pytest
import torch

from sparse_attn import SparseAttention, entmax, sparse_softmax, sparsemax, topk_attention, topk_softmax


@pytest.mark.parametrize("k", [1, 2, 5, 11])
@pytest.mark.parametrize(("mapping", "alpha"), [(topk_softmax, 1.0), (sparse_softmax, 2.0)])
def test_only_the_k_largest_scores_are_normalised(mapping, alpha, k):
    x = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    p = mapping(x, k)
    kth = x.sort(-1, descending=True).values[:, k - 1 : k]
    expected = entmax(x.masked_fill(x < kth, -math.inf), alpha)
    torch.testing.assert_close(p, expected)
    upstream = torch.randn_like(p)
    got, wanted = (torch.autograd.grad(y, x, upstream)[0] for y in (p, expected))
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(lambda x: mapping(x, k), (x,))


def test_ties_go_to_the_lowest_index():
    assert topk_softmax(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist() == [0, 0.5, 0.5, 0]
    assert sparse_softmax(torch.zeros(1000), 3).nonzero().flatten().tolist() == [0, 1, 2]


def test_k_equal_to_the_row_size_gives_the_dense_mapping():
    x = torch.randn(3, 13)
    assert torch.equal(topk_softmax(x, 13), entmax(x, 1.0))
    assert torch.equal(sparse_softmax(x, 13), sparsemax(x))


def test_sparse_softmax_equals_sparsemax_if_its_support_has_at_most_k_entries():
    x = torch.randn(7, 101) * 5
    assert ((sparsemax(x) > 0).sum(-1) <= 10).all()
    torch.testing.assert_close(sparse_softmax(x, 10), sparsemax(x))


def test_documented_examples_of_zeta():
    for x, k, dim in (
        (torch.tensor([[1.0, 2, 3, 4, 5]]), 3, -1),
        (torch.randn(10, 1000), 50, -1),
        (torch.tensor([2.0, 1.5, 0.1, -1.0, 3.2, 0.7]), 3, -1),
        (torch.randn(4, 2), 2, 0),
    ):
        p = sparse_softmax(x, k, dim)
        assert ((p > 0).sum(dim) <= k).all()
        torch.testing.assert_close(p.sum(dim), torch.ones_like(p.sum(dim)))


def test_masked_entries_are_never_kept():
    x = torch.tensor([[1.0, -math.inf, 2.0], [-math.inf] * 3])
    assert topk_softmax(x, 3)[0, 1] == 0
    assert topk_softmax(x[:, :2], 2)[0].tolist() == [1, 0]
    assert (topk_softmax(x, 2)[1] == 0).all() and (sparse_softmax(x, 2)[1] == 0).all()
    # k is larger than the number of visible scores.
    scores = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert topk_softmax(scores, 3).tolist() == sparse_softmax(scores, 3).tolist() == [0.5, 0, 0.5, 0]


def test_half_precision_and_dim():
    x = torch.randn(3, 5, 7).bfloat16()
    p = topk_softmax(x, 2, dim=1)
    assert p.dtype == torch.bfloat16
    assert torch.equal(p, topk_softmax(x.float(), 2, dim=1).bfloat16())
    assert ((p > 0).sum(1) == 2).all()


@pytest.mark.parametrize("k", [0, -1, 8])
@pytest.mark.parametrize("mapping", [topk_softmax, sparse_softmax])
def test_k_outside_its_range_raises_an_error(mapping, k):
    with pytest.raises(ValueError, match=rf"k must be at least 1 and at most 7, the size of dim, got {k}"):
        mapping(torch.randn(2, 7), k)


@pytest.mark.parametrize(
    ("k", "got"),
    [
        (2.0, "float"),
        (True, "bool"),
        ("2", "str"),
        (numpy.array([2]), "ndarray"),
        (torch.tensor(2.5), "Tensor of torch.float32"),
        (torch.tensor(2.0), "Tensor of torch.float32"),
        (torch.tensor(2 + 0j), "Tensor of torch.complex64"),
        (torch.tensor(True), "Tensor of torch.bool"),
        (torch.tensor([2, 3]), r"Tensor of torch.int64 and shape \(2,\)"),
    ],
)
def test_k_of_a_wrong_type_raises_an_error(k, got):
    x = torch.randn(1, 2, 5, 7)
    for call in (lambda: topk_softmax(x, k), lambda: topk_attention(x, x, x, k), lambda: SparseAttention(k)):
        with pytest.raises(TypeError, match=f"^k must be an int, got {got}$"):
            call()


@pytest.mark.parametrize("k", [numpy.int64(2), torch.tensor(2), torch.tensor([2], dtype=torch.int32)])
def test_k_may_be_an_int_of_numpy_or_an_integer_tensor_with_one_entry(k):
    x = torch.randn(1, 2, 5, 7)
    assert torch.equal(topk_softmax(x, k), topk_softmax(x, 2))
    assert torch.equal(topk_attention(x, x, x, k), topk_attention(x, x, x, 2))


def test_attention_notices_a_change_of_k_in_place():
    x, k = torch.randn(1, 2, 5, 7), torch.tensor(2)
    topk_attention(x, x, x, k)
    assert torch.equal(topk_attention(x, x, x, k.fill_(4)), topk_attention(x, x, x, 4))
