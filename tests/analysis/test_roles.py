import math

import pytest
import torch

from sparse_attn.analysis import (
    attention_rollout,
    entropy,
    mean_per_head,
    monotonicity,
    name_roles,
    offset_weight,
    strongest_at_offset,
)

N, H, L, S = 2, 3, 5, 7


def shifted(offset: int, length: int = L) -> torch.Tensor:
    """Weights (1, length, length) of a head: 0.75 on the position at `offset`, 0.25 on the first position."""
    weights = torch.zeros(1, length, length)
    for query in range(length):
        weights[0, query, min(max(query + offset, 0), length - 1)] += 0.75
        weights[0, query, 0] += 0.25
    return weights


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_positional_head_is_found_at_its_offset(offset: int) -> None:
    weights = shifted(offset)
    for other in (-1, 0, 1):
        share = mean_per_head(strongest_at_offset(weights, other))
        # at one end of the word, `shifted` clamps the position to the query's own
        assert share.item() == pytest.approx(1.0 if other == offset else (1 / L if other == 0 else 0.0))
    assert mean_per_head(offset_weight(weights, offset)).item() == pytest.approx(
        0.75 + 0.25 / (L - abs(offset)) * (offset <= 0)
    )


def test_queries_without_a_key_at_the_offset_have_value_nan() -> None:
    weights = torch.rand(N, H, L, L).softmax(-1)
    previous = offset_weight(weights, -1)
    assert previous.shape == (N, H, L)
    assert previous[..., 0].isnan().all()
    torch.testing.assert_close(previous[..., 1:], weights.diagonal(offset=-1, dim1=-2, dim2=-1))
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    assert offset_weight(weights, 1, causal).isnan().all()
    assert strongest_at_offset(weights, 1, causal).isnan().all()


def test_an_invisible_key_is_never_the_strongest() -> None:
    weights = torch.tensor([[[0.1, 0.9], [0.4, 0.6]]])
    causal = torch.ones(2, 2, dtype=torch.bool).tril()
    assert strongest_at_offset(weights, 0, causal).tolist() == [[1.0, 1.0]]


def test_entropy_by_hand() -> None:
    weights = torch.zeros(1, 3, 4)
    weights[0, 0, 2] = 1.0
    weights[0, 1, :] = 0.25
    visible = torch.tensor([[True], [True], [False]])
    values = entropy(weights, visible)
    torch.testing.assert_close(values, torch.tensor([[0.0, math.log(4), math.nan]]), equal_nan=True)
    torch.testing.assert_close(mean_per_head(values), torch.tensor([math.log(4) / 2]))


def test_relative_entropy_is_one_for_equal_weights() -> None:
    visible = torch.ones(L, L, dtype=torch.bool).tril()
    weights = torch.zeros(1, L, L).masked_fill(~visible, -torch.inf).softmax(-1)
    values = entropy(weights, visible, relative=True)
    torch.testing.assert_close(values, torch.tensor([[math.nan, 1.0, 1.0, 1.0, 1.0]]), equal_nan=True)


def test_a_head_gets_the_role_that_exceeds_its_threshold_most() -> None:
    shares = {
        "previous": torch.tensor([0.8, 0.5, 0.2, math.nan, 0.6]),
        "next": torch.tensor([0.6, 0.1, 0.4, math.nan, 0.1]),
        "diffuse": torch.tensor([0.1, 0.1, 0.89, 0.99, 0.99]),
    }
    assert name_roles(shares) == ["previous", "previous", "mixed", "diffuse", "previous"]
    easier = {"previous": 0.5, "next": 0.3, "diffuse": 1.0}
    assert name_roles(shares, easier) == ["next", "previous", "next", "mixed", "previous"]


@pytest.mark.parametrize(("shares", "got"), [({}, "none"), ({"first": torch.ones(H)}, "first")])
def test_empty_shares_and_a_role_without_a_threshold_raise_an_error(shares: dict[str, torch.Tensor], got: str) -> None:
    with pytest.raises(ValueError, match=f"previous, self, next, monotone, diffuse, got {got}"):
        name_roles(shares)


def test_monotonicity_by_hand() -> None:
    scans = torch.eye(L, S)
    scans[L - 1] = 0.0  # a padded query
    stays = torch.zeros(L, S)
    stays[:, 3] = 1.0
    back = torch.eye(L, S).flip(0)
    weights = torch.stack([scans, stays, back])
    assert monotonicity(weights).flatten().tolist() == pytest.approx([1.0, 0.0, -1.0])
    batch = torch.stack([weights, weights])
    visible = torch.ones(2, 1, L, S, dtype=torch.bool)
    visible[1, :, 1:] = False  # the second word has one query only
    values = monotonicity(batch, visible)
    assert values.shape == (2, 3, 1)
    assert values[1].isnan().all()
    assert mean_per_head(values).tolist() == pytest.approx([1.0, 0.0, -1.0])


def test_monotonicity_is_the_correlation_with_the_mean_key_position() -> None:
    weights = torch.rand(H, L, S).softmax(-1)
    centre = (weights * torch.arange(S)).sum(-1)
    for head in range(H):
        oracle = torch.corrcoef(torch.stack([torch.arange(L).float(), centre[head]]))[0, 1]
        torch.testing.assert_close(monotonicity(weights)[head, 0], oracle)


def test_mean_per_head_refuses_a_tensor_of_one_dimension() -> None:
    with pytest.raises(ValueError, match=r"\(N, H, L\) or \(H, L\), got \(5,\)"):
        mean_per_head(torch.zeros(5))


def test_mean_per_head_of_counts_is_not_rounded() -> None:
    assert mean_per_head(torch.tensor([[1, 2], [0, 1]])).tolist() == [1.5, 0.5]


def test_offset_statistics_without_keys_are_nan() -> None:
    for statistic in (offset_weight, strongest_at_offset):
        values = statistic(torch.zeros(3, 2, 0), 0)
        assert values.shape == (3, 2) and values.isnan().all()


def test_a_single_tensor_is_no_list_of_layers() -> None:
    with pytest.raises(TypeError, match=r"weights must be a list of one tensor per layer, got a tensor of shape \(2,"):
        attention_rollout(torch.rand(2, 1, 3, 5, 5))  # type: ignore[arg-type]


def test_the_mean_of_many_queries_is_not_summed_in_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):  # the sum is above the largest float16
        values = torch.full((64, H, 512), 6.1).to(dtype)
        assert mean_per_head(values).tolist() == [float(values[0, 0, 0])] * H


def test_statistics_do_not_change_under_autocast() -> None:
    weights = torch.zeros(1, 40, 1000)
    weights[0, torch.arange(40), 960 + torch.arange(40) % 5] = 1.0  # bfloat16 cannot distinguish these positions
    square = torch.rand(H, L, L).softmax(-1)
    for statistic in (lambda: monotonicity(weights), lambda: attention_rollout([square, square])):
        with torch.autocast("cpu", torch.bfloat16):
            inside = statistic()
        torch.testing.assert_close(inside, statistic())


def test_monotonicity_without_queries_is_nan() -> None:
    assert monotonicity(torch.rand(N, H, 0, S)).isnan().tolist() == [[[True]] * H] * N
