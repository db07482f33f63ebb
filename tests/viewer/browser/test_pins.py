"""Rows of one head that are pinned and compared, in a browser."""

from __future__ import annotations

import pytest
from browser import Page, weights_of

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import AttentionView


def test_rows_are_pinned_and_compared(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view, "#layer=4&head=1")
    page.driver.execute_script("document.getElementById('matrix').focus()")
    page.press("ArrowDown")
    page.press("Enter")
    for _ in range(3):
        page.press("ArrowDown")
    page.press("Enter")
    page.settle()
    assert page.address()["pins"] == "0,3"
    weights = weights_of(translation, 4, 1)[[0, 3]]
    keys = [int(text.split(" ")[0]) for text in page.texts(".compare tbody th")]
    assert keys == weights.any(0).nonzero().flatten().tolist()
    for index, key in enumerate(keys):
        cells = page.texts(f".compare tbody tr:nth-child({index + 1}) td")
        for cell, weight in zip(cells, weights[:, key].tolist(), strict=True):
            assert float(cell.split(" ")[0]) == pytest.approx(weight, rel=1e-3)
    shared = int((weights != 0).all(0).sum())
    counted = "1 key has" if shared == 1 else f"{shared} keys have"
    assert f"{counted} weight in all of them" in page.text("#pins h3")
    page.click(".pin")
    assert page.address()["pins"] == "3"
    page.driver.execute_script("document.activeElement.blur()")
    page.press("Escape")
    page.settle()
    assert "pins" not in page.address() and not page.shown("#pins")


def test_clicks_pin_rows_in_both_pictures(page: Page, view: AttentionView) -> None:
    page.open(view, "#layer=4&head=1&zoom=20")
    box = page.ask("(({left, bottom}) => [left, bottom])(document.querySelector('#matrix').getBoundingClientRect())")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.point(box[0] + 5, box[1] - 30, kind)
    page.settle()
    assert page.address()["pins"] == "3"
    box = page.ask("(({left, top}) => [left, top])(document.querySelector('#lines').getBoundingClientRect())")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.point(box[0] + 20, box[1] + 4 + 20 * 1 + 10, kind)
    page.settle()
    assert page.address()["pins"] == "3,1"
