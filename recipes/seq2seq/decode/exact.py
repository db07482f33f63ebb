"""Exact search: the most probable hypothesis of a model, with a proof if the budget allows one."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.evaluation import evaluating

from ..tokenizer import EOS
from .prefixes import Hypothesis, Models, Sources, as_models, check_counts, check_source

# Limits of memory: words that are searched at the same time, and positions (prefixes × tokens) of one model call.
WORDS, POSITIONS = 64, 8192
# The number of prefixes that a word expands at once grows by one after every GROWTH expansions, up to WIDEST. A search
# that expands one prefix at a time may need fewer expansions.
GROWTH, WIDEST = 16, 64


@dataclass(frozen=True)
class ExactHypothesis(Hypothesis):
    """The best hypothesis that an exact search has seen.

    Attributes:
        proved: Whether the search has shown that no hypothesis of at most ``max_length`` tokens is more probable. False
            if the budget was reached first, or no hypothesis can end within ``max_length`` tokens.
        expansions: Prefixes whose next tokens were computed.
        mass: Probability of all finished hypotheses that were seen.
        single: Whether no other hypothesis is possible.
        empty_log_probability: Log-probability of the empty hypothesis; ``-inf`` if it is impossible.
        empty_rank: 1 plus the number of seen hypotheses that are more probable than the empty one.
    """

    proved: bool = False
    expansions: int = 0
    mass: float = 0.0
    single: bool = False
    empty_log_probability: float = -math.inf
    empty_rank: int = 1


def exact_search(model: Models, source: Tensor, *, budget: int, max_length: int) -> list[ExactHypothesis]:
    """The most probable hypothesis of every row.

    Greedy decoding gives a first hypothesis; then the search expands the most probable open prefixes. It expands only
    prefixes that are more probable than the best finished hypothesis, since no continuation can be more probable than
    its prefix (Stahlberg & Byrne 2019, with depth-first search). If no such prefix is left, the hypothesis is proved,
    and the search ends. The search also ends when the budget is reached.

    Args:
        model: One model, or several whose probabilities are averaged. The mode of each module is not changed.
        source: (N, S) token ids, 0 = padding.
        budget: Maximum number of expansions per row, at least 1.
        max_length: Maximum number of tokens of a hypothesis, without the end-of-sequence token; at least 1.

    Returns:
        One hypothesis per row, with a probability above zero; an unfinished prefix if no finished hypothesis was seen.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: ``budget`` or ``max_length`` is below 1, or ``source`` has another number of dimensions.

    Example:
        >>> import torch
        >>> from recipes.seq2seq.model import Seq2SeqTransformer
        >>> model = Seq2SeqTransformer(11, 7, dim=16, num_heads=2, ff_dim=32, output="sparsemax")
        >>> best = exact_search(model, torch.randint(4, 11, (1, 7)), budget=1000, max_length=4)[0]
        >>> best.proved, math.exp(best.log_probability) <= best.mass <= 1.0 + 1e-6
        (True, True)

    Reference:
        Stahlberg & Byrne 2019 (EMNLP), "On NMT Search Errors and Model Errors: Cat Got Your Tongue?".
    """
    check_counts(budget=budget, max_length=max_length)
    check_source(source)
    models = as_models(model)
    with evaluating(*models), torch.no_grad():
        sources = Sources(models, source)
        searches = [_Search(budget, max_length) for _ in range(len(source))]
        waiting = deque(range(len(source)))
        active: list[int] = []
        while active or waiting:
            while waiting and len(active) < WORDS:
                active.append(waiting.popleft())
            asked = [(row, prefix) for row in active for prefix in searches[row].next_prefixes()]
            for part in _parts(asked):
                rows, prefixes = zip(*part, strict=True)
                after = sources.next_tokens(rows, [prefix.tokens for prefix in prefixes])
                for row, prefix, log_probabilities in zip(rows, prefixes, after.double().cpu(), strict=True):
                    searches[row].expand(prefix, log_probabilities)
            active = [row for row in active if not searches[row].over()]
    return [search.result() for search in searches]


@dataclass(frozen=True, order=True)
class _Prefix:
    """Tokens and their negated log-probability ``cost``; the prefix with the lowest cost is the first in a heap."""

    cost: float
    tokens: tuple[int, ...]


class _Search:
    """The search of one row."""

    def __init__(self, budget: int, max_length: int) -> None:
        self.budget = budget
        self.max_length = max_length
        self.open: list[_Prefix] = []
        self.dive: _Prefix | None = _Prefix(0.0, ())  # the next prefix of the greedy part; None after this part
        self.best: _Prefix | None = None
        self.cut: _Prefix = _Prefix(0.0, ())  # end of the greedy part, the result if no hypothesis has finished
        self.expansions = 0
        self.finished: list[float] = []  # log-probabilities
        self.empty_log_probability = -math.inf
        self.single = True

    def next_prefixes(self) -> list[_Prefix]:
        """The prefixes to expand next, within the budget."""
        if self.dive is not None:
            return [self.dive]
        count = min(1 + self.expansions // GROWTH, WIDEST, self.budget - self.expansions)
        chosen: list[_Prefix] = []
        while len(chosen) < count and self._can_win():
            chosen.append(heapq.heappop(self.open))
        return chosen

    def expand(self, prefix: _Prefix, after: Tensor) -> None:
        """Adds the continuations of a prefix, from the log-probabilities (V,) of the next token."""
        self.expansions += 1
        self.single &= int((after > -math.inf).sum()) == 1
        if (ending := float(after[EOS])) > -math.inf:
            whole = _Prefix(prefix.cost - ending, prefix.tokens)
            self.finished.append(-whole.cost)
            if not prefix.tokens:
                self.empty_log_probability = -whole.cost
            if self.best is None or whole.cost < self.best.cost:
                self.best = whole
        diving, self.dive = self.dive is not None, None
        if len(prefix.tokens) == self.max_length:
            return
        least = -math.inf if self.best is None else prefix.cost - self.best.cost
        after[EOS] = -math.inf
        following = int(after.argmax()) if diving else -1
        for token in (after > least).nonzero()[:, 0].tolist():
            child = _Prefix(prefix.cost - float(after[token]), (*prefix.tokens, token))
            if diving and token == following and float(after[token]) > ending:
                self.dive = self.cut = child
            else:
                heapq.heappush(self.open, child)
        left = self.budget - self.expansions
        if len(self.open) > 2 * left + 64:  # more than can ever be expanded
            self.open = heapq.nsmallest(left + 1, self.open)

    def over(self) -> bool:
        """Whether the result is proved or the budget reached."""
        return self.expansions >= self.budget or (self.dive is None and not self._can_win())

    def result(self) -> ExactHypothesis:
        """The best hypothesis so far."""
        found = self.cut if self.best is None else self.best
        return ExactHypothesis(
            tokens=list(found.tokens),
            log_probability=0.0 - found.cost,
            finished=self.best is not None,
            proved=self.best is not None and self.dive is None and not self._can_win(),
            expansions=self.expansions,
            mass=math.fsum(map(math.exp, self.finished)),
            single=self.single and self.best is not None,
            empty_log_probability=self.empty_log_probability,
            empty_rank=1 + sum(other > self.empty_log_probability for other in self.finished),
        )

    def _can_win(self) -> bool:
        """Whether an open prefix is more probable than the best finished hypothesis."""
        return bool(self.open) and (self.best is None or self.open[0].cost < self.best.cost)


def _parts(asked: Sequence[tuple[int, _Prefix]]) -> Iterator[list[tuple[int, _Prefix]]]:
    """Groups of prefixes of similar length, each as large as the model may compute at once."""
    part: list[tuple[int, _Prefix]] = []
    for row, prefix in sorted(asked, key=lambda one: len(one[1].tokens)):
        if part and (len(part) + 1) * (len(prefix.tokens) + 1) > POSITIONS:
            yield part
            part = []
        part.append((row, prefix))
    if part:
        yield part
