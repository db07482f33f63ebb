"""The arguments for BertViz and CircuitsVis."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import attention_view, bertviz_arguments, circuitsvis_arguments

Records = Callable[..., AttentionRecord]
QUERIES, KEYS = [f"q{i}" for i in range(5)], [f"k{i}" for i in range(7)]


def weights_of(record: AttentionRecord, name: str) -> torch.Tensor:
    kept = record[name].weights
    assert kept is not None
    return kept


def test_arguments_for_a_text_and_its_layers(encoder_record: Records) -> None:
    record = encoder_record(5)
    arguments = bertviz_arguments(attention_view(record, QUERIES))
    assert arguments.keys() == {"attention", "tokens"} and arguments["tokens"] == QUERIES
    for given, name in zip(arguments["attention"], record, strict=True):
        assert torch.equal(given, weights_of(record, name))
    arguments = circuitsvis_arguments(attention_view(record, QUERIES), "layers.1.self_attn")
    assert arguments["tokens"] == QUERIES
    assert torch.equal(arguments["attention"], weights_of(record, "layers.1.self_attn")[0])


def test_arguments_for_an_encoder_and_a_decoder(translation: AttentionRecord) -> None:
    view = attention_view(translation, QUERIES, KEYS, example=1)
    arguments = bertviz_arguments(view)
    sizes = {name: [tuple(layer.shape) for layer in arguments[name]] for name in arguments if "attention" in name}
    assert sizes == {
        "encoder_attention": [(1, 3, 7, 7)],
        "decoder_attention": [(1, 3, 5, 5)] * 2,
        "cross_attention": [(1, 3, 5, 7)] * 2,
    }
    assert (arguments["decoder_tokens"], arguments["encoder_tokens"]) == (QUERIES, KEYS)
    with pytest.raises(ValueError, match=r"a text to itself, got layer 'decoder\.layers\.0\.multihead_attn' whose"):
        circuitsvis_arguments(view, "decoder.layers.0.multihead_attn")
    with pytest.raises(ValueError, match="layer must be from 0 to 4, got 9"):
        circuitsvis_arguments(view, 9)


def test_shapes_that_differ_are_refused() -> None:
    record = AttentionRecord(keep_weights=True)
    for length in (3, 5):
        record.add(f"layer{length}", torch.rand(1, 2, length, length).softmax(-1))
    with pytest.raises(ValueError, match=r"layers of one shape \(H, L, S\), got \[\(2, 3, 3\), \(2, 5, 5\)\]"):
        bertviz_arguments(attention_view(record))


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.filterwarnings("ignore")
def test_bertviz_accepts_the_arguments(encoder_record: Records, translation: AttentionRecord) -> None:
    bertviz = imported("bertviz")
    for view in (attention_view(encoder_record(5), QUERIES), attention_view(translation, QUERIES, KEYS)):
        for show in (bertviz.head_view, bertviz.model_view):
            assert "k0" in (page := show(**bertviz_arguments(view), html_action="return").data) or "q0" in page


def test_circuitsvis_accepts_the_arguments(encoder_record: Records) -> None:
    attention = imported("circuitsvis").attention
    arguments = circuitsvis_arguments(attention_view(encoder_record(5), QUERIES), 0)
    assert "q0" in str(attention.attention_heads(**arguments))


def test_a_layer_that_bertviz_cannot_show_is_refused() -> None:
    record = AttentionRecord(keep_weights=True)
    for name in ("encoder.0.self_attn", "decoder.0.self_attn", "head.attn"):
        record.add(name, torch.rand(1, 2, 5, 5).softmax(-1))
    record.add("decoder.0.cross_attn", torch.rand(1, 2, 5, 5).softmax(-1))
    with pytest.raises(ValueError, match=r"one encoder and one decoder, got also 'head\.attn'"):
        bertviz_arguments(attention_view(record, QUERIES, QUERIES))
