"""Hostile tokens and long inputs in a browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from browser import HALF, Page, close, weights_of

from sparse_attn import entmax
from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import attention_view
from sparse_attn.viewer import page as page_module


def test_hostile_tokens_are_shown_as_text(
    page: Page, encoder_record: Callable[..., AttentionRecord], hostile: list[str]
) -> None:
    record = encoder_record(len(hostile))
    page.open(attention_view(record, hostile, title=hostile[0]), "#layer=0&head=0&pins=0,1")
    assert page.text("h1") == hostile[0] and page.ask("document.images.length") == 0
    close(page.matrix(), weights_of(record, 0, 0))
    shown = [
        "</script><img␣src=x␣onerror=alert(1)>",
        "<!--<script>",
        "␀",
        "‹U+202E›abc‹U+200F›",
        "‹U+D800›",
        "a‹U+DFFF›b",
        "]]>&amp;&lt;\"'`",
        "␊␉␣‹U+2028›‹U+2029›",
        "𝔘𝔫𝔦",
        "∅",
    ]
    page.driver.execute_script("document.getElementById('matrix').focus()")
    for _ in hostile:
        page.press("ArrowUp")
    for row, token in enumerate(shown):
        assert f"query {row} “{token}”" in page.text("#readout")
        page.press("ArrowDown")


def test_weights_of_2048_tokens_can_be_read(page: Page) -> None:
    length = 2048
    torch.manual_seed(0)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    record = AttentionRecord(keep_weights=True)
    scores = (3 * torch.randn(1, 2, length, length)).masked_fill(~visible, -torch.inf)
    record.add("layer", entmax(scores, 1.5), visible, 1.5)
    page.open(attention_view(record, [f"t{i}" for i in range(length)]), "#layer=0&head=1")
    assert page.ask("document.querySelector('#matrix canvas').width") < 1280  # only the visible part is drawn
    weights = weights_of(record, 0, 1)
    page.choose("#scale", "row")
    page.driver.execute_script("document.getElementById('matrix').scrollIntoView()")
    page.driver.execute_script("location.hash = '#layer=0&head=1&zoom=20'")
    page.settle()
    for row in (0, 977, 2047):
        column = int(weights[row].argmax())
        script = "document.getElementById('matrix').scrollTo(20 * arguments[0], 20 * arguments[1])"
        page.driver.execute_script(script, max(0, column - 3), max(0, row - 3))
        page.settle()
        left, top, scrolled, down, wide, high = page.ask(
            "(m => { const b = m.getBoundingClientRect(), s = m.firstElementChild;"
            "return [b.left, b.top, m.scrollLeft, m.scrollTop, s.offsetWidth, s.offsetHeight]; })"
            "(document.getElementById('matrix'))"
        )
        x = left + (wide - 20 * length - 1) + 20 * column + 10 - scrolled
        y = top + (high - 20 * length - 1) + 20 * row + 10 - down
        page.point(x, y)
        page.settle()
        assert f"query {row} “t{row}” → key {column} “t{column}”" in page.text("#readout")
        read = float(page.ask("document.getElementById('readout').dataset.weight"))
        assert read == pytest.approx(float(weights[row, column]), rel=HALF)


def test_a_notice_reports_that_weights_were_left_out(
    page: Page, encoder_record: Callable[..., AttentionRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "MOST_ENTRIES", 50)
    page.open(attention_view(encoder_record(11)))
    assert page.shown("#notice") and "largest; those below" in page.text("#notice")
