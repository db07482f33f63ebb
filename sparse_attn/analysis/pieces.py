"""Subword pieces and the words they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.checks import check_floating, check_int

__all__ = ["merge_pieces", "own_word_weight", "word_groups"]

# SentencePiece and byte-level BPE mark the first piece of a word.
_STARTS = ("▁", "Ġ", "Ċ")


def word_groups(tokens: Sequence[str]) -> list[int]:
    """The number of the word that each token belongs to, from the marks of the tokenizer.

    Supported marks: ``##`` before a piece that continues a word (WordPiece), ``@@`` after a piece whose word continues
    (subword-nmt), ``</w>`` after the last piece of a word (CLIP, GPT-1), and ``▁``, ``Ġ`` or ``Ċ`` before the first
    piece of a word (SentencePiece, byte-level BPE). With ``▁``, ``Ġ`` or ``Ċ``, a special token such as ``<s>`` or
    ``[CLS]`` is a word.

    Args:
        tokens: the tokens of one text. The most frequent kind of mark is used for all tokens.

    Returns:
        One number per token, from 0, that increases by one at each new word. Without any mark every token is a word.

    Raises:
        TypeError: if `tokens` is a string, or holds something else than strings.

    Example:
        >>> word_groups(["[CLS]", "un", "##believ", "##able", "story", "[SEP]"])
        [0, 1, 1, 1, 2, 3]
        >>> word_groups(["<s>", "▁un", "believ", "able", "▁story", "</s>"])
        [0, 1, 1, 1, 2, 3]
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        wrong = tokens if isinstance(tokens, str) else next(token for token in tokens if not isinstance(token, str))
        raise TypeError(f"tokens must be a list of strings, got {wrong!r}")
    counts = {
        "continues": sum(token.startswith("##") and len(token) > 2 for token in tokens),
        "continued": sum(token.endswith("@@") and len(token) > 2 for token in tokens),
        "ends": sum(token.endswith("</w>") for token in tokens),
        "starts": sum(token.startswith(_STARTS) for token in tokens),
    }
    rule = max(counts, key=lambda name: counts[name])
    if not counts[rule]:
        return list(range(len(tokens)))
    groups: list[int] = []
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else ""
        if rule == "continues":
            joined = token.startswith("##") and len(token) > 2
        elif rule == "continued":
            joined = before.endswith("@@") and len(before) > 2
        elif rule == "ends":
            joined = not before.endswith("</w>")
        else:
            joined = not token.startswith(_STARTS) and not _special(token) and not _special(before)
        groups.append((groups[-1] + (not joined)) if groups else 0)
    return groups


def merge_pieces(weights: Tensor, query_groups: Sequence[int], key_groups: Sequence[int]) -> Tensor:
    """Attention between words from attention between pieces: summed over the keys, averaged over the queries.

    For weights A and words q and k: ``M[q, k] = 1/|q| Σ_{i in q} Σ_{j in k} A[i, j]``. Rows that sum to one keep that
    sum.

    Args:
        weights: (..., L, S).
        query_groups: the word of each query, L numbers as :func:`word_groups` returns them, from 0 without a gap.
        key_groups: the word of each key, S numbers.

    Returns:
        (..., words among the queries, words among the keys).

    Raises:
        TypeError: if `weights` is not a floating tensor, or a group not an int.
        ValueError: if the number of groups differs from the number of queries or keys, or a word has no piece.

    Example:
        >>> merge_pieces(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]), [0, 0], [0, 0, 1])
        tensor([[0.6250, 0.3750]])

    Reference:
        Clark et al. 2019, "What Does BERT Look At?", section 4.1.
    """
    check_floating(weights, "weights")
    sides = {"query_groups": (query_groups, -2, "queries"), "key_groups": (key_groups, -1, "keys")}
    for name, (groups, dim, side) in sides.items():
        if weights.dim() < 2 or len(groups) != weights.shape[dim]:
            shape = tuple(weights.shape)
            raise ValueError(
                f"{name} must have one number for each of the {side} of weights {shape}, got {len(groups)}"
            )
    rows, columns = (_membership(name, groups, weights) for name, (groups, _, _) in sides.items())
    with torch.autocast(weights.device.type, enabled=False):  # rows of a product in bfloat16 do not sum to one
        return (rows / rows.sum(-1, keepdim=True)) @ weights @ columns.mT


def own_word_weight(weights: Tensor, groups: Sequence[int]) -> Tensor:
    """Weight that each piece gives to the other pieces of its own word, in self-attention.

    The average over texts is high for heads that merge the pieces of words.

    Args:
        weights: (..., L, L).
        groups: the word of each position, L numbers as :func:`word_groups` gives them.

    Returns:
        (..., L); NaN for a word of one piece.

    Raises:
        TypeError: if `weights` is not a floating tensor, or a group not an int.
        ValueError: if the weights are not square, or the number of groups differs from the number of positions.

    Example:
        >>> own_word_weight(torch.tensor([[0.2, 0.8, 0.0], [0.7, 0.2, 0.1], [0.0, 0.0, 1.0]]), [0, 0, 1])
        tensor([0.8000, 0.7000,    nan])

    Reference:
        Correia, Niculae & Martins 2019, "Adaptively Sparse Transformers", section 5.2.
    """
    check_floating(weights, "weights")
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2] or len(groups) != weights.shape[-1]:
        raise ValueError(
            "groups must have one number for each position of weights (..., L, L), "
            f"got {len(groups)} for {tuple(weights.shape)}"
        )
    index = _index("groups", groups, weights)
    others = (index[:, None] == index) & ~torch.eye(len(groups), dtype=torch.bool, device=weights.device)
    return (weights * others).sum(-1).masked_fill(~others.any(-1), torch.nan)


def _index(name: str, groups: Sequence[int], like: Tensor) -> Tensor:
    """The words of the tokens as a tensor of ints."""
    for group in groups:
        check_int(group.item() if isinstance(group, Tensor) else group, name)
    return torch.as_tensor(groups, dtype=torch.int64, device=like.device)


def _membership(name: str, groups: Sequence[int], like: Tensor) -> Tensor:
    """(words, tokens): 1 where a token belongs to a word."""
    index = _index(name, groups, like)
    words: Tensor = torch.arange(int(index.max()) + 1 if len(groups) else 0, device=like.device)
    member = words[:, None] == index
    if not bool(member.any(0).all() and member.any(1).all()):  # a mean over no piece would be NaN
        raise ValueError(f"{name} must number the words from 0 without a gap, got {index.tolist()}")
    return member.to(like.dtype)


def _special(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in {("<", ">"), ("[", "]")}
