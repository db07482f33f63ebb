"""Greedy decoding, compared with a loop without cache or batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recipes.seq2seq.attention import ATTENTION_KINDS
from recipes.seq2seq.decode import greedy_decode
from recipes.seq2seq.model import Seq2SeqTransformer
from recipes.seq2seq.tokenizer import BOS, EOS, PAD, UNK

N, S, SOURCE, TARGET, MAX_LENGTH = 7, 5, 11, 13, 9


def model_of(kind: str = "adaptive", *, end_bias: float = 0.0) -> Seq2SeqTransformer:
    """An untrained model with large weights, so that outputs differ; a larger ``end_bias`` makes outputs shorter."""
    kinds = dict.fromkeys(("encoder_attention", "decoder_attention", "cross_attention"), kind)
    sizes = {"dim": 22, "num_heads": 2, "ff_dim": 19, "alpha": 1.25, "k": 2}
    model = Seq2SeqTransformer(SOURCE, TARGET, dropout=0.5, **sizes, **kinds).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.dim() > 1 else 1
        model.output.bias[EOS] += end_bias
    return model


def words() -> Tensor:
    source = torch.randint(4, SOURCE, (N, S))
    source[1, 3:] = source[4, 1:] = PAD
    return source


def naive(model: Seq2SeqTransformer, source: Tensor, max_length: int) -> list[int]:
    """Decode one word; every step computes the whole target again."""
    model.eval()
    target = [BOS]
    while len(target) <= max_length:
        logits = model(source[source != PAD][None], torch.tensor([target]))[0, -1]
        logits[[PAD, BOS, UNK]] = -math.inf
        token = int(logits.argmax())
        if token == EOS:
            break
        target.append(token)
    return target[1:]


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_batched_decoding_with_a_cache_equals_single_words_without_a_cache(kind: str) -> None:
    torch.manual_seed(1)  # with this seed, the outputs have many lengths
    model, source = model_of(kind), words()
    lengths = set()
    for _ in range(5):
        with torch.no_grad():
            model.output.bias[EOS] += 0.7  # each time, outputs become shorter
            output = greedy_decode(model, source, max_length=MAX_LENGTH)
            assert output == [naive(model, row, MAX_LENGTH) for row in source]
        assert output == [greedy_decode(model, row[None], max_length=MAX_LENGTH)[0] for row in source]
        assert not {PAD, BOS, EOS, UNK} & {token for row in output for token in row}
        lengths.add(len({len(row) for row in output}))
    assert max(lengths) > 2  # rows finished at different steps


@pytest.mark.parametrize("max_length", [1, 2, MAX_LENGTH])
def test_a_word_that_does_not_end_stops_at_max_length(max_length: int) -> None:
    model, source = model_of(end_bias=-1e3), words()
    steps = []
    model.decoder.register_forward_pre_hook(lambda module, args: steps.append(args[0].shape))
    output = greedy_decode(model, source, max_length=max_length)
    assert [len(row) for row in output] == [max_length] * N
    assert steps == [(N, 1, 22)] * max_length  # one new position per step


def test_decoding_ends_when_all_words_have_ended() -> None:
    model, source = model_of(end_bias=1e3), words()
    steps = []
    model.decoder.register_forward_pre_hook(lambda module, args: steps.append(len(args[0])))
    assert greedy_decode(model, source, max_length=MAX_LENGTH) == [[]] * N
    assert steps == [N]


def test_special_tokens_except_the_end_are_not_generated() -> None:
    model = model_of(end_bias=-1e3)
    with torch.no_grad():
        model.output.bias[[PAD, BOS, UNK]] = 1e3
    output = greedy_decode(model, words(), max_length=MAX_LENGTH)
    assert not {PAD, BOS, UNK} & {token for row in output for token in row}


@pytest.mark.parametrize("training", [True, False])
def test_decoding_restores_the_mode_and_uses_no_dropout_or_gradient(training: bool) -> None:
    model, source = model_of(end_bias=2).train(training), words()
    modes: list[tuple[bool, bool]] = []
    model.encoder.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
    )
    first, second = (greedy_decode(model, source, max_length=MAX_LENGTH) for _ in range(2))
    assert first == second
    assert modes == [(False, False)] * 2
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled()


def test_the_mode_is_restored_after_an_error() -> None:
    model = model_of().train()
    with pytest.raises(IndexError):
        greedy_decode(model, torch.full((N, S), SOURCE), max_length=MAX_LENGTH)
    assert model.training


def test_no_words_give_no_output() -> None:
    assert greedy_decode(model_of(), torch.zeros(0, S, dtype=torch.long), max_length=MAX_LENGTH) == []


@pytest.mark.parametrize("max_length", [0, -1])
def test_an_invalid_max_length_raises_an_error(max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length must be at least 1, got {max_length}"):
        greedy_decode(model_of(), words(), max_length=max_length)


def test_each_module_keeps_its_own_mode() -> None:
    model = Seq2SeqTransformer(11, 13, dim=16, num_heads=2, ff_dim=32).train()
    model.encoder.eval()
    greedy_decode(model, torch.randint(4, 11, (2, 3)), max_length=2)
    assert model.training and model.decoder.training and not model.encoder.norm.training
