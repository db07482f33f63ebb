"""The decoding methods that a configuration can choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..tokenizer import check_choice
from .beam import beam_search, check_length_penalty
from .exact import exact_search
from .greedy import greedy_decode
from .prefixes import Hypothesis, Models

#: Names of the decoding methods.
DECODINGS = ("greedy", "beam", "exact")


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding, beam search or exact search with their settings.

    Args:
        name: "greedy", "beam" or "exact".
        beam_size: Beam size of "beam", and of the beam search with which "exact" is compared.
        length_penalty: Length penalty of "beam", within [-10, 10].
        n_best: Hypotheses per input, for "beam".
        budget: Maximum number of expansions per input, for "exact".

    Raises:
        ValueError: A setting is outside its range.
    """

    name: str = "greedy"
    beam_size: int = 5
    length_penalty: float = 0.0
    n_best: int = 1
    budget: int = 10_000

    def __post_init__(self) -> None:
        check_choice("decoding.name", self.name, DECODINGS)
        for key in ("beam_size", "n_best", "budget"):
            if getattr(self, key) < 1:
                raise ValueError(f"decoding.{key} must be at least 1, got {getattr(self, key)}")
        check_length_penalty("decoding.length_penalty", self.length_penalty)
        if self.n_best > 1 and self.name != "beam":
            raise ValueError(
                f"n_best must be 1 with decoding={self.name}, which gives one hypothesis, got {self.n_best}; "
                "decoding=beam gives several"
            )
        if self.name == "beam" and self.n_best > self.beam_size:
            raise ValueError(f"n_best must be at most decoding.beam_size, {self.beam_size}, got {self.n_best}")

    def hypotheses(self, model: Models, source: Tensor, *, max_length: int) -> Sequence[Sequence[Hypothesis]]:
        """The hypotheses of every row (N, S) of source ids, best first."""
        if self.name == "exact":
            return [[found] for found in exact_search(model, source, budget=self.budget, max_length=max_length)]
        return beam_search(
            model,
            source,
            beam_size=1 if self.name == "greedy" else self.beam_size,
            max_length=max_length,
            length_penalty=self.length_penalty,
            n_best=self.n_best,
        )

    def best(self, model: Models, source: Tensor, *, max_length: int) -> list[list[int]]:
        """The tokens of every row's best hypothesis."""
        if self.name == "greedy":
            return greedy_decode(model, source, max_length=max_length)
        return [found[0].tokens for found in self.hypotheses(model, source, max_length=max_length)]
