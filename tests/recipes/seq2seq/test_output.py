"""The output distribution and its loss, compared with the definition, and with cross-entropy at α = 1."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from entmax import entmax_bisect

from recipes.seq2seq.output import OUTPUT_KINDS, next_token_log_probabilities, output_alpha, output_loss
from recipes.seq2seq.tokenizer import PAD

N, V = 7, 11
ALPHAS = {"softmax": 1.0, "sparsemax": 2.0, "entmax15": 1.5, "entmax": 1.25}


def test_the_kinds_have_their_alpha() -> None:
    assert {kind: output_alpha(kind, 1.25) for kind in OUTPUT_KINDS} == ALPHAS


@pytest.mark.parametrize("alpha", ALPHAS.values())
def test_probabilities_are_softmax_or_entmax_of_the_logits_of_possible_tokens(alpha: float) -> None:
    logits = 2 * torch.randn(3, N, V, dtype=torch.float64)
    before = logits.clone()
    probabilities = next_token_log_probabilities(logits, alpha).exp()
    assert torch.equal(logits, before)
    writable = torch.tensor([index for index in range(V) if index not in (0, 1, 3)])
    expected = torch.zeros_like(logits)
    if alpha == 1:
        expected[..., writable] = logits[..., writable].softmax(-1)
    else:
        expected[..., writable] = entmax_bisect(logits[..., writable], alpha, n_iter=80)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-9)
    assert next_token_log_probabilities(logits.bfloat16(), alpha).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-9, 1.25, 1.5, 2.0])
def test_the_loss_is_the_fenchel_young_loss_with_label_smoothing(alpha: float, smoothing: float) -> None:
    logits = 2 * torch.randn(N, V, dtype=torch.float64)
    target = torch.tensor([4, PAD, 5, 2, 10, 3, PAD])
    if alpha < 1.1:
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1)
    else:
        p = entmax_bisect(logits, alpha, n_iter=80)
        entropy = (1 - (p**alpha).sum(-1)) / (alpha * (alpha - 1))
    of_target = logits.gather(1, target[:, None])[:, 0]
    losses = (p * logits).sum(-1) + entropy - of_target + smoothing * (of_target - logits.mean(-1))
    expected = losses[target != PAD]
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum())):
        actual = output_loss(logits, target, alpha, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-6)
    if alpha < 1.1:
        cross_entropy = F.cross_entropy(logits, target, ignore_index=PAD, label_smoothing=smoothing)
        actual = output_loss(logits, target, alpha, label_smoothing=smoothing)
        torch.testing.assert_close(actual, cross_entropy, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "alpha", "message"),
    [
        ("dense", 1.5, "output must be one of softmax, sparsemax, entmax15, entmax, got 'dense'"),
        ("entmax", 0.0, r"output_alpha must be in \(0, inf\), got 0"),
        ("entmax", math.nan, r"output_alpha must be in \(0, inf\), got nan"),
    ],
)
def test_an_unknown_output_or_an_invalid_alpha_raises_an_error(kind: str, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_alpha(kind, alpha)
