import math

import pytest
import torch

from sparse_attn import entmax
from sparse_attn.analysis import attention_rollout, head_diversity, own_word_weight


def test_diversity_equals_the_divergence_from_the_mean_head() -> None:
    weights = entmax(2 * torch.randn(2, 3, 5, 7, dtype=torch.float64), 1.5)
    mean = weights.mean(1, keepdim=True)
    terms = torch.where(weights > 0, weights * (weights / mean).log(), 0.0)
    torch.testing.assert_close(head_diversity(weights), terms.sum(-1).mean(1))


def test_diversity_of_equal_and_of_disjoint_heads() -> None:
    equal = torch.rand(1, 1, 5, 7, dtype=torch.float64).softmax(-1).expand(1, 3, 5, 7)
    torch.testing.assert_close(head_diversity(equal), torch.zeros(1, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    disjoint = torch.eye(3).unsqueeze(1)
    torch.testing.assert_close(head_diversity(disjoint), torch.tensor([math.log(3)]))


def test_a_query_without_visible_keys_has_diversity_nan() -> None:
    weights = torch.rand(2, 3, 5).softmax(-1)
    visible = torch.ones(3, 5, dtype=torch.bool)
    visible[1] = False
    assert head_diversity(weights, visible).isnan().tolist() == [False, True, False]


def test_rollout_sums_over_all_paths() -> None:
    layers = [torch.rand(2, heads, 5, 5, dtype=torch.float64).softmax(-1) for heads in (3, 2, 1)]
    rolled = attention_rollout(layers, residual=0.25)
    step = [0.25 * torch.eye(5, dtype=torch.float64) + 0.75 * layer.mean(1) for layer in layers]
    expected = torch.einsum("nij,njk,nkl->nil", step[2], step[1], step[0])
    torch.testing.assert_close(rolled, expected)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert torch.equal(attention_rollout(layers, residual=1.0), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


def test_rollout_is_zero_without_a_path() -> None:
    causal = torch.rand(2, 5, 5).tril()
    rolled = attention_rollout([causal / causal.sum(-1, keepdim=True)] * 3)
    assert torch.equal(rolled != 0, torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("weights", "residual", "message"),
    [
        ([], 0.5, "weights must be of at least one layer, got none"),
        ([torch.rand(2, 3, 5)], 0.5, r"weights must all be \(N, H, L, L\) .* got \[\(2, 3, 5\)\]"),
        ([torch.rand(2, 3, 3), torch.rand(2, 5, 5)], 0.5, "with the same N and L"),
        ([torch.rand(2, 3, 3)], 1.5, r"residual must lie in \[0, 1\], got 1.5"),
    ],
)
def test_invalid_input_of_rollout_raises_an_error(weights: list[torch.Tensor], residual: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_rollout(weights, residual)


def test_own_word_weight() -> None:
    weights = torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(-1)
    found = own_word_weight(weights, [0, 0, 0, 1, 2])
    for row, others in {0: [1, 2], 1: [0, 2], 2: [0, 1]}.items():
        torch.testing.assert_close(found[..., row], weights[..., row, others].sum(-1))
    assert found[..., 3:].isnan().all()
    with pytest.raises(ValueError, match=r"groups must have one number for each position .* got 4 for \(2, 3, 5, 5\)"):
        own_word_weight(weights, [0, 0, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diversity_in_half_precision_has_only_the_rounding_error_of_the_result(dtype: torch.dtype) -> None:
    weights = torch.randn(8, 64, 512).softmax(-1).to(dtype)
    expected = head_diversity(weights.double()).to(dtype)
    torch.testing.assert_close(head_diversity(weights), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
