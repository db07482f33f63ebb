"""The view of one head in a browser: drawn and described weights, and the controls."""

from __future__ import annotations

import csv
from collections.abc import Callable

import pytest
import torch
from browser import HALF, KEYS, MEMORY, QUERIES, TOKENS, Page, close, weights_of

from sparse_attn.analysis import AttentionRecord, merge_pieces, word_groups
from sparse_attn.viewer import AttentionView, attention_view


@pytest.mark.parametrize(("layer", "head"), [(0, 2), (1, 0), (4, 1)])
def test_every_weight_can_be_read(
    page: Page, view: AttentionView, translation: AttentionRecord, layer: int, head: int
) -> None:
    page.open(view, f"#layer={layer}&head={head}")
    close(page.matrix(), weights_of(translation, layer, head))


def test_the_pointer_shows_weight_rank_and_both_tokens(
    page: Page, view: AttentionView, translation: AttentionRecord
) -> None:
    page.open(view, "#layer=4&head=1&zoom=20")
    weights = weights_of(translation, 4, 1)
    box = page.ask(
        "(({left, top, width, height}) => [left, top, width, height])"
        "(document.querySelector('#matrix').getBoundingClientRect())"
    )
    spacer = page.ask(
        "[document.querySelector('#matrix .spacer').offsetWidth, "
        "document.querySelector('#matrix .spacer').offsetHeight]"
    )
    left, top = spacer[0] - 20 * KEYS - 1, spacer[1] - 20 * QUERIES - 1
    empty = page.ask("getComputedStyle(document.documentElement).getPropertyValue('--cell').trim()")
    for row in range(QUERIES):
        order = weights[row].sort(descending=True).values.tolist()
        for column in range(KEYS):
            x, y = left + 20 * (column + 0.4), top + 20 * (row + 0.4)
            page.point(box[0] + x, box[1] + y)
            page.settle()
            tip, weight = page.text("#tip"), float(weights[row, column])
            assert f"query {row} “{TOKENS[row]}” → key {column} “{MEMORY[column]}”" in tip
            if weight:
                rank = order.index(weight) + 1
                assert f"rank {rank} of {int((weights[row] != 0).sum())} keys with weight" in tip
                assert float(tip.split("weight ")[1].split(" ")[0]) == pytest.approx(weight, rel=1e-3)
            else:
                assert "exactly 0" in tip
            pixel = page.ask(
                "[...document.querySelector('#matrix canvas').getContext('2d')"
                ".getImageData(arguments[0], arguments[1], 1, 1).data]",
                int(x),
                int(y),
            )
            blank = pixel[:3] == [int(empty[i : i + 2], 16) for i in (1, 3, 5)]
            assert blank == (weight == 0)
    page.point(2, 2)
    assert not page.shown("#tip")


def test_pairs_hidden_by_a_mask_are_described_as_not_visible(page: Page, view: AttentionView) -> None:
    page.open(view, "#layer=1&head=0")
    page.driver.execute_script("document.getElementById('matrix').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert "key 1" in page.text("#readout") and "not visible" in page.text("#readout")
    assert "never visible" in page.text("#legend")


def test_a_token_under_the_pointer_is_described(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view, "#layer=4&head=1")
    box = page.ask("(({right, top}) => [right, top])(document.querySelector('#lines').getBoundingClientRect())")
    page.point(box[0] - 25, box[1] + 4 + 20 * 2 + 10)
    column = weights_of(translation, 4, 1)[:, 2]
    expected = f"key 2 “▁cha”{int((column != 0).sum())} of 5 queries give it weight"
    assert expected in page.text("#tip")
    page.point(box[0] - page.ask("document.querySelector('#lines').clientWidth") + 25, box[1] + 4 + 20 * 2 + 10)
    assert "query 2 “ably”" in page.text("#tip")


def test_the_threshold_hides_smaller_weights(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view, "#layer=4&head=1&zoom=20")
    count = lambda: page.ask(  # noqa: E731
        "(() => { const c = document.querySelector('#matrix canvas'), b = document.querySelector('#matrix .spacer');"
        "let n = 0; const left = b.offsetWidth - 141, top = b.offsetHeight - 101;"
        "for (let r = 0; r < 5; r++) for (let k = 0; k < 7; k++) {"
        "const p = c.getContext('2d').getImageData(left + 20 * k + 8, top + 20 * r + 8, 1, 1).data;"
        "if (p[0] !== 255 || p[1] !== 255 || p[2] !== 255) n++; } return n; })()"
    )
    weights = weights_of(translation, 4, 1)
    assert count() == int((weights != 0).sum())
    page.choose("#threshold", "80")
    threshold = float(page.address()["threshold"])
    assert 0.05 < threshold < 0.5 and page.text("#threshold-value") == str(threshold)
    assert count() == int((weights >= threshold).sum()) < int((weights != 0).sum())
    page.choose("#threshold", "0")
    assert "threshold" not in page.address() and count() == int((weights != 0).sum())
    page.choose("#scale", "row")
    assert page.address()["scale"] == "row" and count() == int((weights != 0).sum())


def test_subwords_are_merged_into_words(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view, "#layer=4&head=1")
    page.click("#merge")
    assert page.address()["merge"] == "1"
    merged = merge_pieces(weights_of(translation, 4, 1), word_groups(TOKENS), word_groups(MEMORY))
    read = page.matrix()
    assert read.shape == (3, 3)
    torch.testing.assert_close(read, merged, rtol=4 * HALF, atol=1e-6)
    assert "query 2 “▁cats” → key 0 “▁vieux”" in page.text("#readout")
    page.press("m")
    assert "merge" not in page.address()


def test_merging_is_disabled_if_no_token_is_a_subword(
    page: Page, encoder_record: Callable[..., AttentionRecord]
) -> None:
    page.open(attention_view(encoder_record(4), list("abcd")), "#layer=0&head=0")
    assert page.ask("document.querySelector('#merge').disabled")


def test_cells_grow_and_shrink(page: Page, view: AttentionView) -> None:
    page.open(view, "#layer=4&head=1")
    width = lambda: page.ask("document.querySelector('#matrix .spacer').offsetWidth")  # noqa: E731
    fitting = width()
    page.click("#larger")
    assert width() > fitting and page.address()["zoom"]
    page.click("#fit")
    assert width() == fitting and "zoom" not in page.address()
    page.click("#smaller")
    assert width() < fitting
    page.driver.execute_script("document.activeElement.blur()")
    page.press("0")
    page.settle()
    assert width() == fitting
    page.press("+")
    page.settle()
    assert width() > fitting


def test_another_example_of_a_batch_is_shown(page: Page, translation: AttentionRecord) -> None:
    tokens = [[f"{n}{token}" for token in TOKENS] for n in range(2)]
    memory = [[f"{n}{token}" for token in MEMORY] for n in range(2)]
    page.open(attention_view(translation, tokens, memory), "#layer=4&head=1")
    page.choose("#example", "1")
    assert page.address()["example"] == "1"
    close(page.matrix(), weights_of(translation, 4, 1, example=1))
    assert "1▁" in page.text("#readout")


def test_weights_are_saved_as_csv(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view, "#layer=4&head=1")
    behaviour = {"behavior": "allow", "downloadPath": str(page.folder)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    page.click("#csv")
    file = page.folder / "layer4-head1.csv"
    for _ in range(50):
        if file.is_file():
            break
        page.settle()
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    read = torch.zeros(QUERIES, KEYS)
    for row in rows:
        assert (row["query_token"], row["key_token"]) == (TOKENS[int(row["query"])], MEMORY[int(row["key"])])
        read[int(row["query"]), int(row["key"])] = float(row["weight"])
    close(read, weights_of(translation, 4, 1))
