"""The output of the model: the distribution of the next token in decoding, and the Fenchel-Young loss in training.

The loss includes padding, beginning of sequence and unknown among the possible tokens; the distribution excludes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import entmax, entmax15_loss, entmax_loss, sparsemax_loss
from sparse_attn.checks import check_alpha

from .attention import NAMED_ALPHA
from .tokenizer import BOS, PAD, UNK

OUTPUT_KINDS = ("softmax", "sparsemax", "entmax15", "entmax")
NEVER_WRITTEN = (PAD, BOS, UNK)


def output_alpha(kind: str, alpha: float) -> float:
    """The α of an output kind: fixed by its name, or the given α for "entmax".

    Raises:
        ValueError: The kind is unknown, or α is outside (0, inf).

    Example:
        >>> output_alpha("sparsemax", 1.5), output_alpha("entmax", 1.25)
        (2.0, 1.25)
    """
    if kind not in OUTPUT_KINDS:
        raise ValueError(f"output must be one of {', '.join(OUTPUT_KINDS)}, got {kind!r}")
    check_alpha(alpha, "output_alpha")
    return NAMED_ALPHA.get(kind, float(alpha))


def next_token_log_probabilities(logits: Tensor, alpha: float) -> Tensor:
    """Log-probabilities of the next token, which is never padding, beginning of sequence or unknown.

    The distribution is α-entmax over the logits of all other tokens, so that it sums to one over the possible outputs.

    Args:
        logits: (..., target_size), the output of the model.
        alpha: 1 for softmax; above 1, other tokens than these three can have the log-probability ``-inf`` too.

    Returns:
        (..., target_size), in the dtype of ``logits`` or at least float32.

    Example:
        >>> next_token_log_probabilities(torch.tensor([9.0, 9.0, 0.0, 9.0, 0.1, -4.0]), 2.0).exp()
        tensor([0.0000, 0.0000, 0.4500, 0.0000, 0.5500, 0.0000])
    """
    written = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    written[..., list(NEVER_WRITTEN)] = float("-inf")
    return written.log_softmax(-1) if alpha == 1 else entmax(written, alpha).log()


def output_loss(
    logits: Tensor, target: Tensor, alpha: float, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    r"""The Fenchel-Young loss of α-entmax over all tokens; cross-entropy at α = 1. Padding as a target is ignored.

    With label smoothing ε the loss is :math:`L(z, y) + ε (z_y - \bar z)`; at α = 1, this is cross-entropy with label
    smoothing.

    Args:
        logits: (N, target_size).
        target: (N,) token ids, 0 = padding.
        alpha: α of the output.
        label_smoothing: ε in [0, 1), spread evenly over all tokens.
        reduction: "mean" or "sum" over the tokens.

    Reference:
        Peters, Niculae & Martins 2019 (ACL); label smoothing after Peters & Martins 2021 (NAACL), section 3.
    """
    if alpha == 1:
        return F.cross_entropy(logits, target, ignore_index=PAD, label_smoothing=label_smoothing, reduction=reduction)
    named = {1.5: entmax15_loss, 2.0: sparsemax_loss}.get(alpha)
    if named is not None:
        return named(logits, target, ignore_index=PAD, label_smoothing=label_smoothing, reduction=reduction)
    return entmax_loss(logits, target, alpha, ignore_index=PAD, label_smoothing=label_smoothing, reduction=reduction)
