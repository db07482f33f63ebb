"""Beam search over a batch, with cached keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.checks import check_number
from sparse_attn.evaluation import evaluating

from ..tokenizer import BOS, EOS
from .prefixes import Hypothesis, Models, Prefixes, as_models, check_counts, check_source

STRONGEST_PENALTY = 10


def beam_search(
    model: Models,
    source: Tensor,
    *,
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.0,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    r"""The best hypotheses of a search that keeps ``beam_size`` prefixes per step.

    Hypotheses of length :math:`\ell`, the end-of-sequence token included, are ranked by

    .. math:: \frac{\log p}{\left((5 + \ell) / 6\right)^{\lambda}}, \qquad \lambda = \text{length\_penalty}

    A step keeps the ``beam_size`` most probable extensions of a row's prefixes, if their probability is not zero;
    extensions that end leave the beam. The search of a row stops when no prefix can become one of the
    ``n_best`` hypotheses. ``beam_size=1`` is greedy decoding. The result of a row does not depend on the other rows.

    Args:
        model: One model, or several whose probabilities are averaged. The mode of each module is not changed.
        source: (N, S) token ids, 0 = padding.
        beam_size: Prefixes kept per row, at least 1.
        max_length: Maximum number of tokens of a hypothesis, without the end-of-sequence token; at least 1.
        length_penalty: 0 ranks by probability; larger values favour longer hypotheses. Within [-10, 10].
        n_best: Maximum number of hypotheses returned per row, from 1 to ``beam_size``.

    Returns:
        The hypotheses of each row, best first: at least one, and fewer than ``n_best`` if the search found fewer. A row
        gets unfinished hypotheses only if no hypothesis has ended after ``max_length`` tokens.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument is outside its range.

    Example:
        >>> from recipes.seq2seq.model import Seq2SeqTransformer
        >>> model = Seq2SeqTransformer(11, 13, dim=16, num_heads=2, ff_dim=32, output="entmax15")
        >>> found = beam_search(model, torch.randint(4, 11, (3, 7)), beam_size=5, max_length=4, n_best=2)
        >>> len(found), all(1 <= len(hypotheses) <= 2 for hypotheses in found)
        (3, True)

    Reference:
        The length penalty of Wu et al. 2016, "Google's Neural Machine Translation System", section 7.
    """
    check_counts(beam_size=beam_size, max_length=max_length, n_best=n_best)
    if n_best > beam_size:
        raise ValueError(f"n_best must be at most beam_size, {beam_size}, got {n_best}")
    check_number(length_penalty, "length_penalty")
    check_length_penalty("length_penalty", length_penalty)
    check_source(source)
    models = as_models(model)
    with evaluating(*models), torch.no_grad():
        return _search(Prefixes(models, source), beam_size, max_length, length_penalty, n_best)


def check_length_penalty(name: str, value: float) -> None:
    """Raises for a length penalty with which the score of a long hypothesis could overflow or be zero.

    Raises:
        ValueError: If ``value`` is outside [-10, 10].
    """
    if not -STRONGEST_PENALTY <= value <= STRONGEST_PENALTY:
        raise ValueError(f"{name} must be a number from {-STRONGEST_PENALTY} to {STRONGEST_PENALTY}, got {value}")


def _search(
    prefixes: Prefixes, beam_size: int, max_length: int, length_penalty: float, n_best: int
) -> list[list[Hypothesis]]:
    words, device = len(prefixes.padding), prefixes.padding.device
    found: list[list[tuple[float, Hypothesis]]] = [[] for _ in range(words)]
    to_beat = torch.full((words, n_best), -math.inf, dtype=torch.float64, device=device)  # scores of the n best so far

    def penalty(length: int) -> float:
        return ((5 + length) / 6) ** length_penalty

    # One row for each open prefix: its word, log-probability and tokens.
    word = torch.arange(words, device=device)
    total = torch.zeros(words, dtype=torch.float64, device=device)
    tokens = torch.empty(words, 0, dtype=torch.long, device=device)
    last = torch.full((words,), BOS, device=device)
    for length in range(max_length + 1):
        after = prefixes.step(last)
        if length == max_length:  # a prefix can only end
            after = torch.where(torch.arange(after.shape[1], device=device) == EOS, after, -math.inf)
        row, token, new_total = _best_extensions(word, total, after, words, beam_size)
        ends = token == EOS
        scores = new_total[ends] / penalty(length + 1)
        _note(found, word[row[ends]], scores, new_total[ends], tokens[row[ends]])
        to_beat = _merge(to_beat, word[row[ends]], scores)
        if length == max_length:
            _note_cut(found, word, total, tokens)
            break
        # No extension is more probable than its prefix, so this is the best score that a prefix can reach.
        farthest = max_length + 1 if length_penalty > 0 else length + 2
        can_win = new_total / penalty(farthest) > to_beat[word[row], -1]
        keep = ~ends & can_win
        row, last, total = row[keep], token[keep], new_total[keep]
        if len(row) == 0:
            break
        word, tokens = word[row], torch.cat([tokens[row], last[:, None]], 1)
        prefixes.select(row)
    ranked = (sorted(of_word, key=lambda scored: -scored[0])[:n_best] for of_word in found)
    return [[hypothesis for _, hypothesis in of_word] for of_word in ranked]


def _best_extensions(
    word: Tensor, total: Tensor, after: Tensor, words: int, beam_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token and log-probability of the best possible extensions of every word, at most ``beam_size``."""
    best, token = after.topk(min(beam_size, after.shape[1]), -1)
    candidates = total[:, None] + best
    # Rows of a word are consecutive. The position of a row within its word is its column in a table with words as rows.
    first = torch.searchsorted(word, word)
    slot = torch.arange(len(word), device=word.device) - first
    table = total.new_full((words, beam_size, best.shape[1]), -math.inf)
    table[word, slot] = candidates
    row_of = word.new_zeros(words, beam_size)
    row_of[word, slot] = torch.arange(len(word), device=word.device)
    chosen, place = table.flatten(1).topk(min(beam_size, table[0].numel()), -1)
    of_word, rank = (chosen > -math.inf).nonzero(as_tuple=True)
    place = place[of_word, rank]
    row = row_of[of_word, place // best.shape[1]]
    return row, token[row, place % best.shape[1]], chosen[of_word, rank]


def _merge(to_beat: Tensor, word: Tensor, scores: Tensor) -> Tensor:
    """The ``n_best`` highest scores of every word, after new scores were added."""
    if len(word) == 0:
        return to_beat
    slot = torch.arange(len(word), device=word.device) - torch.searchsorted(word, word)
    new = to_beat.new_full((len(to_beat), int(slot.max()) + 1), -math.inf)
    new[word, slot] = scores
    return torch.cat([to_beat, new], 1).topk(to_beat.shape[1], -1).values


def _note(
    found: list[list[tuple[float, Hypothesis]]], word: Tensor, scores: Tensor, totals: Tensor, tokens: Tensor
) -> None:
    columns = (word.tolist(), scores.tolist(), totals.tolist(), tokens.tolist())
    for index, score, log_probability, ids in zip(*columns, strict=True):
        found[index].append((score, Hypothesis(ids, log_probability)))


def _note_cut(found: list[list[tuple[float, Hypothesis]]], word: Tensor, total: Tensor, tokens: Tensor) -> None:
    """Adds prefixes of ``max_length`` tokens as hypotheses, for words in which no hypothesis has ended."""
    empty = {index for index in word.tolist() if not found[index]}
    for index, log_probability, ids in zip(word.tolist(), total.tolist(), tokens.tolist(), strict=True):
        if index in empty:
            found[index].append((log_probability, Hypothesis(ids, log_probability, finished=False)))
