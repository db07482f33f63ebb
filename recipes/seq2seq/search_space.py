"""The search space of a model: greedy decoding and beam search compared with exact search on the same inputs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .decode import ExactHypothesis, Hypothesis, Models, beam_search, exact_search

# Log-probabilities of the same hypothesis in two searches may differ by the rounding of float32 logits.
ROUNDING = 1e-4


@dataclass
class SearchSpace:
    """The best hypotheses of three searches, input by input.

    Args:
        beam_size: Size of the beam search.
        budget: Maximum number of expansions per input in the exact search.
    """

    beam_size: int
    budget: int
    greedy: list[Hypothesis] = field(default_factory=list)
    beam: list[Hypothesis] = field(default_factory=list)
    exact: list[ExactHypothesis] = field(default_factory=list)

    def decode(self, model: Models, source: Tensor, *, max_length: int) -> list[list[int]]:
        """Runs the three searches on source ids (N, S), stores their results, and returns those of the exact search."""
        for hypotheses, size in ((self.greedy, 1), (self.beam, self.beam_size)):
            found = beam_search(model, source, beam_size=size, max_length=max_length)
            hypotheses += (best[0] for best in found)
        exact = exact_search(model, source, budget=self.budget, max_length=max_length)
        self.exact += exact
        return [one.tokens for one in exact]

    def summary(self) -> dict[str, float]:
        """Shares in percent of the inputs, and means or medians over them.

        Returns:
            Values of the three searches:

            - ``proved``: inputs whose best hypothesis is proved.
            - ``greedy_errors`` and ``beam_errors``: of these inputs, those for which greedy decoding or beam search
              found a less probable hypothesis, or no finished hypothesis.
            - ``single``: inputs with one possible hypothesis.
            - ``expansions`` and ``mass``: means of these attributes of ``ExactHypothesis``.

            Values of the empty hypothesis:

            - ``empty_impossible``: inputs for which its probability is zero.
            - ``empty_best``: inputs for which it is the best hypothesis that was found.
            - ``empty_log_probability`` and ``empty_rank``: medians over the inputs for which it is possible; missing if
              there are no such inputs. A rank counts only the hypotheses that were seen, so the true rank may be
              larger.
        """
        proved = [index for index, one in enumerate(self.exact) if one.proved]
        possible = [one for one in self.exact if one.empty_log_probability > -math.inf]
        found = {
            "proved": _percent(len(proved), len(self.exact)),
            "greedy_errors": self._errors(self.greedy, proved),
            "beam_errors": self._errors(self.beam, proved),
            "single": _percent(sum(one.single for one in self.exact), len(self.exact)),
            "expansions": statistics.fmean(one.expansions for one in self.exact),
            "mass": statistics.fmean(one.mass for one in self.exact),
            "empty_impossible": _percent(len(self.exact) - len(possible), len(self.exact)),
            "empty_best": _percent(sum(not one.tokens and one.finished for one in self.exact), len(self.exact)),
        }
        if possible:
            found["empty_log_probability"] = statistics.median(one.empty_log_probability for one in possible)
            found["empty_rank"] = statistics.median(one.empty_rank for one in possible)
        return found

    def _errors(self, hypotheses: Sequence[Hypothesis], proved: Sequence[int]) -> float:
        worse = 0
        for index in proved:
            best, other = self.exact[index], hypotheses[index]
            behind = not other.finished or other.log_probability < best.log_probability - ROUNDING
            worse += behind and other.tokens != best.tokens
        return _percent(worse, len(proved))


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
