"""Attention without projections: top-k, entmax, or both."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from entmax import entmax_bisect
from torch import Tensor, nn

from sparse_attn import SparseAttention, alpha_per_head
from sparse_attn.optim import alpha_param_groups, freeze_alpha, set_alpha

N, H, L, S, D = 2, 3, 5, 7, 11


def inputs(*, heads: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    batch = (N, H) if heads else (N,)
    return tuple(torch.randn(*batch, length, D, dtype=torch.float64) for length in (L, S, S))


def keep_best(scores: Tensor, k: int | None) -> Tensor:
    """Mask all scores except the `k` largest. Without ties, no other score reaches the `k`-th largest."""
    if k is None:
        return scores
    return scores.masked_fill(scores < scores.sort(-1, descending=True).values[..., k - 1, None], -1e4)


def expected_output(inputs: tuple[Tensor, Tensor, Tensor], k: int | None, alpha: float, scale: float) -> Tensor:
    query, key, value = inputs
    scores = keep_best(scale * query @ key.transpose(-2, -1), k)
    weights = scores.softmax(-1) if alpha == 1 else entmax_bisect(scores, alpha, n_iter=100)
    return weights @ value


def test_the_documented_example() -> None:
    queries, keys, values = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert SparseAttention(k=2)(queries, keys, values).shape == (2, 3, 5)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(("k", "alpha"), [(3, None), (None, 1.5), (None, 1.0), (None, 1.3), (4, 1.5), (2, 2.0)])
def test_output_equals_the_formula(k: int | None, alpha: float | None, scale: float | None, heads: bool) -> None:
    tensors = inputs(heads=heads)
    output = SparseAttention(k=k, alpha=alpha, scale=scale)(*tensors)
    expected = expected_output(tensors, k, 1.0 if alpha is None else alpha, scale or 1 / math.sqrt(D))
    torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("k", [None, 4])
def test_one_alpha_per_head(k: int | None) -> None:
    alphas = (1.0, 1.5, 2.0)
    tensors = inputs()
    output = SparseAttention(k=k, alpha=torch.tensor(alphas))(*tensors)
    for head, alpha in enumerate(alphas):
        one = tuple(x[:, head] for x in tensors)
        expected = expected_output(one, k, alpha, 1 / math.sqrt(D))
        torch.testing.assert_close(output[:, head], expected, rtol=1e-8, atol=1e-9)


def test_a_parameter_is_learnt_and_a_tensor_is_a_buffer() -> None:
    parameter = nn.Parameter(torch.full((H,), 1.5))
    learnt = SparseAttention(alpha=parameter)
    learnt(*inputs()).square().sum().backward()
    assert learnt.raw_alpha is parameter and [name for name, _ in learnt.named_parameters()] == ["raw_alpha"]
    assert parameter.grad is not None and bool((parameter.grad != 0).all())
    assert torch.equal(learnt.alpha, parameter)
    fixed = SparseAttention(alpha=torch.full((H,), 1.5))
    assert list(fixed.state_dict()) == ["raw_alpha"] and not list(fixed.parameters())
    assert not list(SparseAttention(k=2).state_dict())


@pytest.mark.parametrize(
    ("arguments", "shape"), [({"k": 3}, ()), ({"alpha": 1.25}, ()), ({"k": 3, "alpha": torch.full((H,), 1.25)}, (H,))]
)
def test_a_learnt_alpha_starts_at_one_or_at_the_given_value(arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    attention = SparseAttention(**arguments, learn_alpha=True)
    (alpha,) = attention.parameters()
    assert alpha.shape == shape and set(alpha.flatten().tolist()) == {1.25 if "alpha" in arguments else 1.0}
    tensors = inputs()
    torch.testing.assert_close(attention(*tensors), SparseAttention(**arguments)(*tensors))
    attention(*tensors).square().sum().backward()
    assert alpha.grad is not None and bool((alpha.grad != 0).all())
    assert "learn_alpha=True, alpha_range=(1.0, 2.0), scale=None" in repr(attention)


@pytest.mark.parametrize(("sign", "bound"), [(1, 1.0), (-1, 1.75)])
def test_a_learnt_alpha_stays_in_its_range_after_a_large_step(sign: int, bound: float) -> None:
    attention = SparseAttention(alpha=nn.Parameter(torch.full((H,), 1.5)), alpha_range=(1.0, 1.75))
    optimizer = torch.optim.SGD(attention.parameters(), lr=1e3)
    (sign * attention.alpha.square().sum()).backward()
    optimizer.step()
    assert attention.alpha.tolist() == [bound] * H
    torch.testing.assert_close(attention(*(tensors := inputs())), SparseAttention(alpha=bound)(*tensors))


def test_functions_for_alpha_find_the_learnt_alpha_of_sparse_attention() -> None:
    model = nn.Sequential(
        SparseAttention(alpha=nn.Parameter(torch.full((H,), 1.5))), SparseAttention(k=2), SparseAttention(alpha=1.5)
    )
    assert {name: alpha.tolist() for name, alpha in alpha_per_head(model).items()} == {"0": [1.5] * H}
    (group,) = alpha_param_groups(model, lr=1.0)
    assert group["params"] == [model[0].raw_alpha]
    set_alpha(model, {"0": [1.0, 1.25, 2.0]})
    assert alpha_per_head(model)["0"].tolist() == [1.0, 1.25, 2.0]
    model.half()
    assert model[0].alpha.dtype == torch.float32
    freeze_alpha(model)
    assert not model[0].raw_alpha.requires_grad
    copied = nn.Sequential(SparseAttention(alpha=torch.full((H,), 1.5)))
    copied.load_state_dict(model[:1].state_dict())
    assert copied[0].alpha.tolist() == [1.0, 1.25, 2.0]


@pytest.mark.parametrize(
    "attention", [SparseAttention(k=2), SparseAttention(alpha=1.5), SparseAttention(k=3, alpha=2.0)]
)
def test_masking_keys_equals_removing_them(attention: SparseAttention) -> None:
    query, key, value = inputs()
    short = attention(query, key[..., :4, :], value[..., :4, :])
    visible = torch.arange(S) < 4
    torch.testing.assert_close(attention(query, key, value, visible.expand(L, S)), short)
    added = torch.zeros(S, dtype=torch.float64).masked_fill(~visible, -math.inf)
    torch.testing.assert_close(attention(query, key, value, attn_mask=added.expand(L, S)), short)


def test_is_causal_hides_later_keys() -> None:
    attention = SparseAttention(k=2, alpha=1.5)
    query, key, value = inputs()
    output = attention(query, key, value, is_causal=True)
    for i in range(L):
        row = attention(query[..., i : i + 1, :], key[..., : i + 1, :], value[..., : i + 1, :])
        torch.testing.assert_close(output[..., i : i + 1, :], row)


def test_dropout_is_applied_only_in_training() -> None:
    attention = SparseAttention(alpha=1.0, dropout=0.5)
    query, key, value = inputs()
    ones = torch.ones_like(value)  # the output is then the sum of the weights
    sums = attention(query, key, ones)[..., 0]
    assert bool(((sums - 1).abs() > 1e-3).any())
    torch.testing.assert_close(attention.eval()(query, key, ones)[..., 0], torch.ones(N, H, L).double())


KINDS = [SparseAttention(k=2), SparseAttention(alpha=1.4), SparseAttention(k=3, alpha=1.6)]


@pytest.mark.parametrize("attention", KINDS, ids=str)
@pytest.mark.parametrize("heads", [True, False])
def test_gradients_equal_finite_differences(attention: SparseAttention, heads: bool) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, attn_mask=bias)

    bias = torch.randn(L, S, dtype=torch.float64).masked_fill(torch.rand(L, S) < 0.2, -math.inf)
    assert torch.autograd.gradcheck(run, tuple(x.requires_grad_() for x in inputs(heads=heads)), fast_mode=True)


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_a_learnt_mask_and_alpha_get_gradients(attention: SparseAttention) -> None:
    attention = SparseAttention(k=attention.k, alpha=nn.Parameter(torch.full((H,), 1.4, dtype=torch.float64)))
    tensors = inputs()

    def run(bias: Tensor, alpha: Tensor) -> Tensor:
        return torch.func.functional_call(attention, {"raw_alpha": alpha}, (*tensors, bias))

    assert torch.autograd.gradcheck(
        run, (torch.randn(H, L, S, dtype=torch.float64).requires_grad_(), attention.raw_alpha)
    )


@pytest.mark.parametrize("attention", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(S,), (L, S), (1, L, S), (N, 1, S), (N, L, S)], ids=str)
def test_masks_of_inputs_without_heads_broadcast_to_their_scores(
    attention: SparseAttention, shape: tuple[int, ...]
) -> None:
    query, key, value = inputs(heads=False)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    expected = attention(query[:, None], key[:, None], value[:, None], mask.expand(N, L, S)[:, None])[:, 0]
    torch.testing.assert_close(attention(query, key, value, mask), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_a_query_without_visible_keys_gets_zeros_and_no_gradient(attention: SparseAttention) -> None:
    query, key, value = (x.requires_grad_() for x in inputs())
    mask = torch.ones(L, S, dtype=torch.bool)
    mask[2] = False
    output = attention(query, key, value, mask)
    assert output[:, :, 2].eq(0).all() and bool(output[:, :, 1].ne(0).any())
    output.sum().backward()
    assert query.grad[:, :, 2].eq(0).all() and all(x.grad.isfinite().all() for x in (query, key, value))


def test_a_query_keeps_all_keys_if_there_are_fewer_than_k() -> None:
    tensors = inputs()
    torch.testing.assert_close(SparseAttention(k=S + 4)(*tensors), SparseAttention(alpha=1.0)(*tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_half_precision_is_close_to_float64_and_keeps_its_dtype(attention: SparseAttention, dtype: torch.dtype) -> None:
    narrow = tuple(x.to(dtype) for x in inputs())
    output = attention(*narrow, is_causal=True)
    assert output.dtype == dtype
    expected = attention(*(x.double() for x in narrow), is_causal=True)
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)


# torch's tracer builds an autograd function in a deprecated way and warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("attention", [*KINDS, SparseAttention(alpha=1.3, learn_alpha=True)], ids=str)
def test_the_layer_compiles_into_one_graph(attention: SparseAttention) -> None:
    tensors = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for causal in (False, True):
        expected = attention(*tensors, is_causal=causal)
        torch.testing.assert_close(compiled(*tensors, is_causal=causal), expected, rtol=1e-9, atol=1e-12)


def test_copies_and_repr_keep_the_arguments() -> None:
    attention = SparseAttention(k=3, alpha=torch.tensor([1.0, 1.5, 2.0]), scale=0.7)
    tensors = inputs()
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        torch.testing.assert_close(other(*tensors), attention(*tensors), rtol=0, atol=0)
    assert repr(attention) == "SparseAttention(k=3, alpha=[1.0, 1.5, 2.0], scale=0.7, dropout=0.0)"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, r"must be given k \(an int of at least 1\), alpha \(in \(0, inf\)\) or both"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 1.5}, TypeError, "k must be an int, got float"),
        ({"alpha": 0.0}, ValueError, r"alpha must be in \(0, inf\), got 0.0"),
        ({"alpha": torch.tensor([1.5, -1.0])}, ValueError, r"alpha must be in \(0, inf\), got -1"),
        ({"alpha": "entmax"}, TypeError, "alpha must be a number or a floating tensor, got str"),
        ({"alpha": nn.Parameter(torch.tensor(2.5))}, ValueError, r"alpha must be in alpha_range \[1, 2\], got 2.5"),
        ({"k": 2, "learn_alpha": True, "alpha_range": (1.25, 2)}, ValueError, r"in alpha_range \[1.25, 2\], got 1$"),
        ({"k": 2, "learn_alpha": "no"}, TypeError, "learn_alpha must be True or False, got 'no'"),
        ({"k": 2, "scale": "a"}, TypeError, "scale must be a number, got 'a'"),
        ({"k": 2, "dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
    ],
)
def test_an_invalid_argument_raises_an_error(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseAttention(**kwargs)


def test_invalid_input_raises_an_error() -> None:
    attention = SparseAttention(k=2)
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"query must be \(N, L, E\) or \(N, H, L, D\), got shape \(5, 11\)"):
        attention(query[0, 0], key[0, 0], value[0, 0])
    with pytest.raises(ValueError, match=r"same last size D; got query \(2, 3, 5, 11\), key \(2, 3, 7, 5\)"):
        attention(query, key[..., :5], value)
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor, got list"):
        attention(query.tolist(), key, value)
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    with pytest.raises(TypeError, match="is_causal must be True or False, got tensor"):
        attention(query, key, value, None, mask)
    with pytest.raises(ValueError, match=r"alpha must be a number or have shape \(H,\) = \(3,\), got \(2,\)"):
        SparseAttention(alpha=torch.tensor([1.5, 2.0]))(query, key, value)


def test_a_tensor_is_copied_and_a_tensor_with_a_gradient_is_refused() -> None:
    alpha = torch.tensor([1.5])
    attention = SparseAttention(alpha=alpha)
    alpha.fill_(2.0)
    assert attention.alpha.tolist() == [1.5]
    with pytest.raises(ValueError, match=r"^alpha must be a number, a parameter or a tensor without gradient"):
        SparseAttention(alpha=1 + torch.zeros(1, requires_grad=True).sigmoid())
