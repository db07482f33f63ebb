import pytest
import torch

from sparse_attn.analysis import density, support_counts

N, H, L, S = 2, 3, 5, 7


def test_counts_only_visible_pairs() -> None:
    weights = torch.zeros(N, H, L, S)
    weights[0, 0, 0, 0] = 1.0
    weights[:, 1, :, :] = 0.5
    weights[1, 2, 4, 6] = 1e-30
    visible = torch.ones(L, S, dtype=torch.bool).tril()
    used, pairs = support_counts(weights, visible)
    per_head = N * sum(range(1, L + 1))
    assert used.tolist() == [1, per_head, 0]  # the weight at (4, 6) is not visible
    assert pairs.tolist() == [per_head] * H
    torch.testing.assert_close(density(weights, visible), torch.tensor([1 / 30, 1.0, 0.0]))


def test_density_of_softmax_and_of_one_hot_weights() -> None:
    dense = torch.randn(N, H, L, S).softmax(-1)
    assert density(dense).tolist() == [1.0] * H
    one_hot = torch.nn.functional.one_hot(torch.randint(S, (N, H, L)), S).float()
    torch.testing.assert_close(density(one_hot), torch.full((H,), 1 / S))


def test_unbatched_weights_equal_a_batch_of_one() -> None:
    weights = torch.rand(H, L, S).round()
    assert torch.equal(density(weights), density(weights.unsqueeze(0)))


def test_density_without_visible_pairs_is_nan() -> None:
    assert density(torch.rand(N, H, L, S), torch.zeros(1, dtype=torch.bool)).isnan().all()


@pytest.mark.parametrize(
    ("weights", "visible", "error", "message"),
    [
        (
            torch.ones(H, L, S, dtype=torch.long),
            None,
            TypeError,
            "weights must be a floating-point tensor, got torch.int64",
        ),
        (torch.ones(L, S), None, ValueError, r"\(N, H, L, S\) or \(H, L, S\), got \(5, 7\)"),
        (
            torch.ones(H, L, S),
            torch.ones(L, S),
            TypeError,
            "visible must be a bool tensor, got torch.float32",
        ),
        (torch.ones(H, L, S), torch.ones(S, L, dtype=torch.bool), ValueError, r"\(3, 5, 7\), got \(7, 5\)"),
    ],
)
def test_invalid_input_raises_an_error(
    weights: torch.Tensor, visible: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        density(weights, visible)


def test_lists_are_refused() -> None:
    with pytest.raises(TypeError, match="weights must be a floating-point tensor, got list"):
        density([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="visible must be a bool tensor, got list"):
        density(torch.rand(1, 2, 2), [[True]])  # type: ignore[arg-type]
