"""The content of the page, read without a browser."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import entmax, record_attention
from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import attention_view
from sparse_attn.viewer import page as page_module

Records = Callable[..., AttentionRecord]
Reader = Callable[[str], Any]
HEADS, QUERIES, KEYS = 3, 5, 7  # sizes used by the fixtures that record a model
HALF = 2**-11  # the largest relative error of float16 for numbers of at least 6.1e-5


def recorded(weights: Tensor, visible: Tensor | None = None, name: str = "layer") -> AttentionRecord:
    record = AttentionRecord(keep_weights=True)
    record.add(name, weights, visible, 1.5)
    return record


def same(page_weights: Tensor, weights: Tensor) -> None:
    assert torch.equal(page_weights != 0, weights != 0)
    torch.testing.assert_close(page_weights, weights.float(), rtol=HALF, atol=2**-25)


def test_a_page_contains_the_weights_of_every_layer(encoder_record: Records, read_page: Reader) -> None:
    record = encoder_record(13)
    page = read_page(attention_view(record, [f"t{i}" for i in range(13)]).html())
    for index, heads in enumerate(record.values()):
        assert heads.weights is not None
        same(page.weights(index), heads.weights[0])
        assert page.data["layers"][index]["numbers"]["density"] == pytest.approx(heads.density.tolist(), rel=1e-5)
        assert page.data["layers"][index]["numbers"]["alpha"] == [1.5] * HEADS


def test_a_page_holds_weights_in_columns_far_apart_and_in_dense_rows(read_page: Reader) -> None:
    weights = torch.zeros(2, 3, 1201)
    weights[0, 0, [0, 254, 255, 256, 766, 1200]] = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.1])
    weights[1, 1] = 1 / 1201
    weights[1, 2, 1200] = 1.0
    same(read_page(attention_view(recorded(weights)).html()).weights(0), weights)


def test_no_weight_becomes_zero(read_page: Reader) -> None:
    weights = torch.tensor([[[1.0 - 1e-9, 1e-9, 0.0, -1e-30, 1e-4]]])
    held = read_page(attention_view(recorded(weights)).html()).weights(0)
    assert torch.equal(held != 0, weights != 0)


def test_small_weights_of_a_large_page_have_fewer_bits(read_page: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = entmax(torch.randn(1, 2, 17, 61), 1.25)
    weights[0, 0, 0, 0] = 1e-7
    monkeypatch.setattr(page_module, "MANY_ENTRIES", 100)
    page = read_page(attention_view(recorded(weights)).html())
    held = page.weights(0)
    assert page.data["coarse"] and torch.equal(held != 0, weights[0] != 0)
    error = (held - weights[0]).abs()
    large = weights[0] >= 0.125
    assert (error[large] <= HALF * weights[0][large]).all()
    assert (error[~large] <= 5 * HALF * weights[0][~large] + 2**-22).all() and (error > HALF * weights[0]).any()


def test_a_page_contains_the_masks(read_page: Reader) -> None:
    visible = torch.ones(11, 11, dtype=torch.bool).tril()
    scores = torch.randn(1, 2, 11, 11).masked_fill(~visible, -torch.inf)
    page = read_page(attention_view(recorded(entmax(scores, 1.5), visible)).html())
    held = page.visible(0)
    assert held is not None and torch.equal(held, visible)
    everywhere = torch.ones(11, 11, dtype=torch.bool)
    assert read_page(attention_view(recorded(entmax(scores, 1.5), everywhere)).html()).visible(0) is None
    scattered = torch.rand(11, 11) < 0.5
    page = read_page(attention_view(recorded(entmax(scores, 1.5) * scattered, scattered)).html())
    held = page.visible(0)
    assert held is not None and torch.equal(held, scattered)


def test_a_page_of_twelve_layers_of_twelve_heads_is_small() -> None:
    torch.manual_seed(0)
    record = AttentionRecord(keep_weights=True)
    for layer in range(12):
        record.add(f"layer.{layer}", entmax(torch.randn(1, 12, 256, 256), 1.5), None, 1.5)
    assert len(attention_view(record, [f"token{i}" for i in range(256)]).html()) < 3e6


def test_only_the_largest_weights_are_kept_on_a_large_page(read_page: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.rand(1, 2, 17, 19).softmax(-1)
    monkeypatch.setattr(page_module, "MOST_ENTRIES", 100)
    page = read_page(attention_view(recorded(weights)).html())
    held, left_out = page.weights(0), page.data["leftOut"]
    assert 0 < int((held != 0).sum()) <= 100
    assert left_out["total"] == 2 * 17 * 19 and left_out["entries"] == left_out["total"] - int((held != 0).sum())
    assert held[held != 0].min() >= left_out["below"] * (1 - HALF)
    assert weights[0][held == 0].max() <= left_out["below"] * (1 + HALF)


class Scripts(HTMLParser):
    """Collects the tags of a page, and the values of `src` and `href`."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [(key, value) for key, value in attrs if key in ("src", "href") and value]


def test_hostile_tokens_add_no_tag_to_the_page(encoder_record: Records, read_page: Reader, hostile: list[str]) -> None:
    record = encoder_record(len(hostile))
    view = attention_view(record, hostile, title=hostile[0] + "\ud800")
    html = view.html()
    assert html.isascii() and "<img" not in html
    plain = Scripts()
    plain.feed(html)
    calm = Scripts()
    calm.feed(attention_view(record, ["a"] * len(hostile), title="b").html())
    assert plain.tags == calm.tags
    assert read_page(html).data["texts"][0]["tokens"] == hostile
    assert "<img" not in view._repr_html_() and "<script" not in view._repr_html_()


def test_a_page_refers_to_no_other_file(encoder_record: Records) -> None:
    html = attention_view(encoder_record(3)).html()
    found = Scripts()
    found.feed(html)
    assert found.outside == [("href", "data:,")]
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )


def test_cross_attention_of_a_batch(read_page: Reader, translation: AttentionRecord) -> None:
    tokens = [[f"q{n}{i}" for i in range(QUERIES)] for n in range(2)]
    memory = [[f"k{n}{i}" for i in range(KEYS)] for n in range(2)]
    page = read_page(attention_view(translation, tokens, memory, example=1).html())
    assert page.data["examples"] == [0, 1] and page.data["first"] == 1
    kinds = {layer["name"]: layer["kind"] for layer in page.data["layers"]}
    assert kinds["encoder.layers.0.self_attn"] == "encoder" and kinds["decoder.layers.1.multihead_attn"] == "cross"
    sides = {"encoder": (memory, memory), "decoder": (tokens, tokens), "cross": (tokens, memory)}
    for index, (name, heads) in enumerate(translation.items()):
        assert heads.weights is not None
        for n in range(2):
            same(page.weights(index, n), heads.weights[n])
            shown = page.data["layers"][index]["maps"][n]
            texts = [page.data["texts"][shown[side]]["tokens"] for side in ("queries", "keys")]
            assert texts == [side[n] for side in sides[kinds[name]]]


def test_one_example_of_a_batch_has_one_list_of_tokens(read_page: Reader, translation: AttentionRecord) -> None:
    tokens, memory = ["q"] * QUERIES, ["k"] * KEYS
    page = read_page(attention_view(translation, tokens, memory, example=1).html())
    assert page.data["examples"] == [1]
    heads = next(iter(translation.values()))
    assert heads.weights is not None
    same(page.weights(0), heads.weights[1])


def test_a_shorter_text_of_a_padded_batch_is_cut_out(encoder_record: Records, read_page: Reader) -> None:
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    record = encoder_record(5, 2, src_key_padding_mask=padding)
    page = read_page(attention_view(record, [list("abcde"), list("xyz")]).html())
    heads = next(iter(record.values()))
    assert heads.weights is not None
    same(page.weights(0, 1), heads.weights[1, :, :3, :3])
    with pytest.raises(
        ValueError, match=r"tokens must cover every key with non-zero weight: layer .* has 5 keys, got 3"
    ):
        attention_view(encoder_record(5, 2), [list("abcde"), list("xyz")])


def test_keys_that_a_layer_adds_are_labelled(read_page: Reader) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True).eval()
    x = torch.randn(1, 3, 6)
    with record_attention(layer, weights=True) as record:
        layer(x, x, x)
    page = read_page(attention_view(record, list("abc")).html())
    keys = page.data["texts"][page.data["layers"][0]["maps"][0]["keys"]]["tokens"]
    assert keys == ["a", "b", "c", "[added 1]", "[added 2]"]


def test_a_step_of_decoding_with_a_cache_has_the_last_token_as_its_query(read_page: Reader) -> None:
    weights = torch.rand(1, 2, 1, 7).softmax(-1)
    page = read_page(attention_view(recorded(weights), list("abcdefg")).html())
    shown = page.data["layers"][0]["maps"][0]
    assert page.data["texts"][shown["queries"]]["tokens"] == ["g"]
    assert page.data["texts"][shown["keys"]]["tokens"] == list("abcdefg")


def test_courses_and_further_statistics(encoder_record: Records, read_page: Reader) -> None:
    record = encoder_record(4, layers=1)
    name = next(iter(record))
    rows = [(step, name, head, 1.5 + 0.01 * step) for step in (5, 0) for head in range(HEADS)]
    worth = torch.tensor([0.5, float("nan"), -1.0])
    view = attention_view(record, courses={"a": rows, "b": rows[:1]}, numbers={"worth": {name: worth}})
    data = read_page(view.html()).data
    assert data["courses"]["a"][name]["2"] == [[0, 1.5], [5, 1.55]]
    assert data["layers"][0]["numbers"]["worth"] == [0.5, None, -1.0]


def test_the_weight_on_subwords_of_the_own_word_is_measured(encoder_record: Records, read_page: Reader) -> None:
    record = encoder_record(5)
    pieces = ["▁un", "believ", "ably", "▁old", "▁cats"]
    first = next(iter(record.values())).weights
    assert first is not None
    expected = sum(first[0, :, row, others].sum(-1) for row, others in {0: [1, 2], 1: [0, 2], 2: [0, 1]}.items()) / 3
    numbers = read_page(attention_view(record, pieces).html()).data["layers"][0]["numbers"]
    assert numbers["weight on own word"] == pytest.approx(expected.tolist(), rel=1e-4)
    numbers = read_page(attention_view(record, list("abcde")).html()).data["layers"][0]["numbers"]
    assert "weight on own word" not in numbers


@pytest.mark.parametrize("shape", [(1, 2, 0, 3), (1, 2, 3, 0)])
def test_a_record_without_queries_or_keys_has_an_empty_map(read_page: Reader, shape: tuple[int, ...]) -> None:
    record = AttentionRecord(keep_weights=True)
    record.add("cross", torch.zeros(shape), torch.zeros(shape[-2:], dtype=torch.bool))
    assert read_page(attention_view(record).html()).data["layers"][0]["maps"][0]["entries"] == 0
