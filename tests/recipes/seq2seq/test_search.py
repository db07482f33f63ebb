"""Beam and exact search, compared with an enumeration of all hypotheses and with loops over words without a cache."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.seq2seq.decode import Decoding, Hypothesis, beam_search, exact_search, greedy_decode
from recipes.seq2seq.model import Seq2SeqTransformer
from recipes.seq2seq.output import OUTPUT_KINDS, next_token_log_probabilities
from recipes.seq2seq.tokenizer import BOS, EOS, PAD

N, S, SOURCE, LETTERS, MAX_LENGTH = 5, 6, 11, 3, 4
EVERY = [ids for length in range(MAX_LENGTH + 1) for ids in itertools.product(range(4, 4 + LETTERS), repeat=length)]
Scored = dict[tuple[int, ...], float]


def model_of(output: str = "entmax15", *, seed: int = 0, letters: int = LETTERS, scale: float = 2.0, **kwargs: Any):
    """An untrained model in float64 whose large weights make words differ."""
    torch.manual_seed(seed)
    sizes = {"dim": 22, "num_heads": 2, "ff_dim": 19, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.5}
    model = Seq2SeqTransformer(SOURCE, 4 + letters, output=output, output_alpha=1.25, **{**sizes, **kwargs}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale if parameter.dim() > 1 else 1
        model.output.weight *= 2
    return model


def words(seed: int = 0) -> Tensor:
    source = torch.randint(4, SOURCE, (N, S), generator=torch.Generator().manual_seed(seed))
    source[1, 3:] = source[4, 1:] = PAD
    return source


Steps = Callable[[tuple[int, ...]], list[float]]


def steps_of(models: list[Seq2SeqTransformer], row: Tensor) -> Steps:
    """A function from a prefix to log-probabilities of the next token, for one word and without a cache."""

    @functools.cache
    def of_length(length: int) -> dict[tuple[int, ...], list[float]]:
        letters = range(4, models[0].output.out_features)
        prefixes = list(itertools.product(letters, repeat=length))
        target = torch.tensor([[BOS, *prefix] for prefix in prefixes])
        source = row[row != PAD].expand(len(prefixes), -1)
        mean = torch.zeros(())
        for model in models:
            logits = model.eval()(source, target)[:, -1]
            mean = mean + next_token_log_probabilities(logits, model.output_alpha).exp() / len(models)
        return dict(zip(prefixes, mean.log().tolist(), strict=True))

    def after(prefix: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            return of_length(len(prefix))[prefix]

    return after


def enumerated(models: list[Seq2SeqTransformer], row: Tensor) -> Scored:
    """Log-probability of every hypothesis of at most ``MAX_LENGTH`` tokens whose probability is above zero."""
    after = steps_of(models, row)
    totals = {ids: total_of(after, [*ids, EOS]) for ids in EVERY}
    return {ids: total for ids, total in totals.items() if total > -math.inf}


def total_of(after: Steps, tokens: Sequence[int]) -> float:
    return sum(after(tuple(tokens[:i]))[token] for i, token in enumerate(tokens))


def penalised(log_probability: float, ids: tuple[int, ...], penalty: float) -> float:
    return log_probability / ((5 + len(ids) + 1) / 6) ** penalty


def plain_beam(
    models: list[Seq2SeqTransformer], row: Tensor, beam_size: int, penalty: float, n_best: int
) -> list[tuple[tuple[int, ...], float]]:
    """Beam search of one word by its definition, until no prefix is left, without early stopping."""
    after, beam, ended = steps_of(models, row), [((), 0.0)], []
    for length in range(MAX_LENGTH + 1):
        extended = []
        for ids, total in beam:
            for token, more in enumerate(after(ids)):
                if more > -math.inf and (token == EOS or length < MAX_LENGTH):
                    extended.append(((*ids, token), total + more))
        best = sorted(extended, key=lambda one: -one[1])[:beam_size]
        ended += [(ids[:-1], total) for ids, total in best if ids[-1] == EOS]
        beam = [(ids, total) for ids, total in best if ids[-1] != EOS]
    return sorted(ended, key=lambda one: -penalised(one[1], one[0], penalty))[:n_best]


def pairs(hypotheses: list[Hypothesis]) -> list[tuple[tuple[int, ...], float]]:
    assert all(hypothesis.finished for hypothesis in hypotheses)
    return [(tuple(hypothesis.tokens), hypothesis.log_probability) for hypothesis in hypotheses]


def assert_same(actual: list[tuple[tuple[int, ...], float]], expected: list[tuple[tuple[int, ...], float]]) -> None:
    assert [ids for ids, _ in actual] == [ids for ids, _ in expected]
    assert [total for _, total in actual] == pytest.approx([total for _, total in expected], abs=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 0.8, -0.6])
@pytest.mark.parametrize("output", OUTPUT_KINDS)
def test_a_beam_as_large_as_the_search_space_ranks_every_hypothesis(output: str, penalty: float) -> None:
    model, source = model_of(output), words()
    size = len(EVERY)
    found = beam_search(model, source, beam_size=size, max_length=MAX_LENGTH, n_best=size, length_penalty=penalty)
    counts = set()
    for row, hypotheses in zip(source, found, strict=True):
        possible = enumerated([model], row)
        ranked = sorted(possible.items(), key=lambda one: -penalised(one[1], one[0], penalty))
        assert_same(pairs(hypotheses), ranked)
        counts.add(len(ranked))
    assert counts == {size} if output == "softmax" else max(counts) < size


@pytest.mark.parametrize(("beam_size", "n_best"), [(1, 1), (2, 1), (3, 3), (7, 5)])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.6])
@pytest.mark.parametrize("output", ["softmax", "entmax15"])
def test_beam_search_equals_a_loop_without_cache_batch_or_early_stop(
    output: str, penalty: float, beam_size: int, n_best: int
) -> None:
    settings: Any = {"beam_size": beam_size, "max_length": MAX_LENGTH, "n_best": n_best, "length_penalty": penalty}
    for seed in range(2):
        model, source = model_of(output, seed=seed), words(seed)
        together = beam_search(model, source, **settings)
        for row, hypotheses in zip(source, together, strict=True):
            expected = plain_beam([model], row, beam_size, penalty, n_best)
            if expected:
                assert_same(pairs(hypotheses), expected)
            alone = beam_search(model, row[row != PAD][None], **settings)[0]
            assert [one.tokens for one in alone] == [one.tokens for one in hypotheses]


@pytest.mark.parametrize("output", OUTPUT_KINDS)
def test_a_beam_of_size_one_equals_greedy_decoding(output: str) -> None:
    finished = set()
    for seed in range(5):
        model, source = model_of(output, seed=seed), words(seed)
        greedy = greedy_decode(model, source, max_length=MAX_LENGTH)
        found = beam_search(model, source, beam_size=1, max_length=MAX_LENGTH)
        assert [hypotheses[0].tokens for hypotheses in found] == greedy
        finished |= {hypotheses[0].finished for hypotheses in found}
        for row, [hypothesis] in zip(source, found, strict=True):
            tokens = [*hypothesis.tokens, *([EOS] if hypothesis.finished else [])]
            assert hypothesis.log_probability == pytest.approx(total_of(steps_of([model], row), tokens), abs=1e-6)
    # Some models with sparse output give probability zero to the end of the output.
    assert finished == ({True} if output == "softmax" else {True, False})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("output", OUTPUT_KINDS)
def test_exact_search_finds_the_best_of_all_and_proves_it(output: str, seed: int) -> None:
    model, source = model_of(output, seed=seed), words(seed)
    for row, found in zip(source, exact_search(model, source, budget=1000, max_length=MAX_LENGTH), strict=True):
        possible = enumerated([model], row)
        if not possible:
            assert not found.finished and not found.proved and found.mass == 0
            continue
        ids, total = max(possible.items(), key=lambda one: one[1])
        assert (tuple(found.tokens), found.proved, found.finished) == (ids, True, True)
        assert found.log_probability == pytest.approx(total, abs=1e-6)
        assert math.exp(total) - 1e-6 <= found.mass <= sum(map(math.exp, possible.values())) + 1e-6
        assert 1 <= found.expansions <= len(EVERY)
        assert found.empty_log_probability == pytest.approx(possible.get((), -math.inf), abs=1e-6)
        assert found.single == (len(possible) == 1 and total == pytest.approx(0, abs=1e-6))
        empty = possible.get((), -math.inf)
        assert 1 <= found.empty_rank <= 1 + sum(other > empty + 1e-9 for other in possible.values())
        if ids == ():
            assert found.empty_rank == 1


def test_exact_search_prunes_prefixes_that_cannot_win() -> None:
    model, source = model_of("softmax", letters=4), words()
    found = exact_search(model, source, budget=10**6, max_length=5)
    assert all(one.proved for one in found)
    for row, one in zip(source, found, strict=True):
        # The search expands the prefixes that are more probable than the best hypothesis, and the prefixes of greedy
        # decoding. It expands several prefixes at once, which adds at most one expansion in 16.
        after, needed, level = steps_of([model], row), 0, [((), 0.0)]
        while level:
            needed += len(level)
            level = [
                ((*ids, token), total + more)
                for ids, total in level
                for token, more in enumerate(after(ids))
                if token != EOS and total + more > one.log_probability and len(ids) < 5
            ]
        assert needed <= one.expansions <= needed * 17 / 16 + 5 + 1


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_exact_search_stops_at_the_budget_and_reports_it(budget: int) -> None:
    model, source = model_of("softmax", letters=9, scale=1.0), words()
    for row, found in zip(source, exact_search(model, source, budget=budget, max_length=9), strict=True):
        assert (found.expansions, found.proved) == (budget, False)
        assert found.finished and found.log_probability > -math.inf
        total = total_of(steps_of([model], row), [*found.tokens, EOS])
        assert found.log_probability == pytest.approx(total, abs=1e-6)


def test_more_budget_never_gives_a_worse_hypothesis() -> None:
    model, source = model_of("entmax", letters=7, scale=1.5), words()
    runs = [exact_search(model, source, budget=budget, max_length=8) for budget in (3, 30, 300, 3000)]
    for by_budget in zip(*runs, strict=True):
        totals = [found.log_probability for found in by_budget if found.finished]
        assert totals == sorted(totals)
        masses = [found.mass for found in by_budget]
        assert masses == sorted(masses) and masses[-1] <= 1 + 1e-9


def test_exact_search_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = model_of("softmax", letters=5), words()
    together = exact_search(model, source, budget=50, max_length=6)
    for row, found in zip(source, together, strict=True):
        alone = exact_search(model, row[row != PAD][None], budget=50, max_length=6)[0]
        assert (alone.tokens, alone.proved, alone.expansions, alone.empty_rank) == (
            found.tokens,
            found.proved,
            found.expansions,
            found.empty_rank,
        )
        assert alone.mass == pytest.approx(found.mass, abs=1e-6)
    monkeypatch.setattr("recipes.seq2seq.decode.exact.WORDS", 2)
    monkeypatch.setattr("recipes.seq2seq.decode.exact.POSITIONS", 5)
    parts = exact_search(model, source, budget=50, max_length=6)
    assert [(one.tokens, one.expansions) for one in parts] == [(one.tokens, one.expansions) for one in together]


def test_a_beam_is_never_better_than_the_proved_best() -> None:
    errors = 0
    for seed in range(4):
        model, source = model_of("softmax", seed=seed, letters=4), words(seed)
        best = exact_search(model, source, budget=10**5, max_length=5)
        for beam_size in (1, 3):
            beams = beam_search(model, source, beam_size=beam_size, max_length=5)
            for exact, [beam] in zip(best, beams, strict=True):
                assert exact.proved and beam.log_probability <= exact.log_probability + 1e-6
                errors += beam.tokens != exact.tokens
    assert errors > 0


def test_an_ensemble_averages_probabilities() -> None:
    models = [model_of("softmax", seed=0), model_of("entmax15", seed=1), model_of("sparsemax", seed=2)]
    source = words()
    beams = beam_search(models, source, beam_size=2, max_length=MAX_LENGTH)
    best = exact_search(models, source, budget=1000, max_length=MAX_LENGTH)
    greedy = greedy_decode(models, source, max_length=MAX_LENGTH)
    for row, beam, exact, one in zip(source, beams, best, greedy, strict=True):
        assert_same(pairs(beam), plain_beam(models, row, 2, 0.0, 1))
        ids, total = max(enumerated(models, row).items(), key=lambda scored: scored[1])
        assert_same(pairs([exact]), [(ids, total)])
        if len(one) < MAX_LENGTH:
            assert [(tuple(one))] == [ids for ids, _ in plain_beam(models, row, 1, 0.0, 1)]


def test_an_empty_ensemble_and_different_vocabularies_are_refused() -> None:
    models = [model_of(), model_of(letters=5)]
    with pytest.raises(ValueError, match="models of an ensemble must have the same target vocabulary, got sizes 7, 9"):
        greedy_decode(models, words(), max_length=3)
    with pytest.raises(ValueError, match="model must be a Seq2SeqTransformer or several, got none"):
        beam_search([], words(), beam_size=2, max_length=3)


@pytest.mark.parametrize("training", [True, False])
def test_search_restores_the_mode_of_the_model(training: bool) -> None:
    model, source = model_of().train(training), words()
    first, second = (exact_search(model, source, budget=20, max_length=3) for _ in range(2))
    assert first == second  # no dropout
    assert beam_search(model, source, beam_size=3, max_length=3) == beam_search(
        model, source, beam_size=3, max_length=3
    )
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"n_best": 0}, "n_best must be at least 1, got 0"),
        ({"n_best": 4}, "n_best must be at most beam_size, 3, got 4"),
        ({"length_penalty": math.inf}, "length_penalty must be a number from -10 to 10, got inf"),
    ],
)
def test_an_invalid_argument_of_beam_search_raises_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(model_of(), words(), **{"beam_size": 3, "max_length": 3, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": nn.Linear(3, 5)}, "model must be a Seq2SeqTransformer or several, got Linear"),
        ({"model": ["x"]}, "model must be a Seq2SeqTransformer or several, got str"),
        ({"source": [[4, 5]]}, "source must be a tensor of int32 or int64 token ids, got list"),
        ({"source": torch.ones(3, 5)}, "source must be a tensor of int32 or int64 token ids, got torch.float32"),
        ({"beam_size": 2.5}, "beam_size must be an int, got 2.5"),
        ({"max_length": None}, "max_length must be an int, got None"),
        ({"length_penalty": "1"}, "length_penalty must be a number, got '1'"),
    ],
)
def test_an_argument_of_a_wrong_type_raises_an_error(settings: dict[str, Any], message: str) -> None:
    arguments = {"model": model_of(), "source": words(), "beam_size": 3, "max_length": 3, **settings}
    with pytest.raises(TypeError, match=message):
        beam_search(**arguments)


def test_one_source_without_a_batch_raises_an_error() -> None:
    for decode, settings in ((greedy_decode, {}), (beam_search, {"beam_size": 2}), (exact_search, {"budget": 2})):
        with pytest.raises(ValueError, match=r"source must be \(N, S\), got shape \(2,\)"):
            decode(model_of(), torch.tensor([4, 5]), max_length=3, **settings)


def test_an_invalid_argument_of_exact_search_raises_an_error() -> None:
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        exact_search(model_of(), words(), budget=0, max_length=3)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        exact_search(model_of(), words(), budget=1, max_length=0)


@pytest.mark.parametrize("name", ["greedy", "beam", "exact"])
def test_a_decoding_calls_its_search(name: str) -> None:
    model, source = model_of("softmax"), words()
    decoding = Decoding(name, beam_size=3, budget=100, n_best=2 if name == "beam" else 1)
    found = decoding.hypotheses(model, source, max_length=MAX_LENGTH)
    best = {
        "greedy": [[one] for one in greedy_decode(model, source, max_length=MAX_LENGTH)],
        "beam": [
            [one.tokens for one in row]
            for row in beam_search(model, source, beam_size=3, n_best=2, max_length=MAX_LENGTH)
        ],
        "exact": [[one.tokens] for one in exact_search(model, source, budget=100, max_length=MAX_LENGTH)],
    }[name]
    assert [[one.tokens for one in row] for row in found] == best
    assert decoding.best(model, source, max_length=MAX_LENGTH) == [row[0] for row in best]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sampling"}, "decoding.name must be one of greedy, beam, exact, got 'sampling'"),
        ({"name": "beam", "beam_size": 0}, "decoding.beam_size must be at least 1, got 0"),
        ({"name": "exact", "budget": 0}, "decoding.budget must be at least 1, got 0"),
        ({"name": "beam", "n_best": 6}, "n_best must be at most decoding.beam_size, 5, got 6"),
        ({"name": "exact", "n_best": 2}, "n_best must be 1 with decoding=exact, .* got 2; decoding=beam gives several"),
        ({"name": "beam", "length_penalty": math.nan}, "length_penalty must be a number from -10 to 10, got nan"),
    ],
)
def test_an_invalid_decoding_raises_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)
