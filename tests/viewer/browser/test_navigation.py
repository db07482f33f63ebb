"""Navigation in the page: controls, shortcuts, URLs, a narrow screen, a notebook."""

from __future__ import annotations

import pytest
from browser import MEMORY, TOKENS, Page

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import AttentionView, attention_view


def test_heads_and_layers_are_chosen_by_menus_buttons_and_keys(page: Page, view: AttentionView) -> None:
    page.open(view, "#layer=0&head=0")
    here = lambda: (page.address()["layer"], page.address()["head"])  # noqa: E731
    page.choose("#layer", "3")
    assert here() == ("3", "0")
    page.choose("#head", "2")
    assert here() == ("3", "2")
    page.click("#next")
    assert here() == ("4", "0")
    page.click("#previous")
    assert here() == ("3", "2")
    page.driver.execute_script("document.activeElement.blur()")
    for key, expected in [("ArrowRight", ("4", "0")), ("ArrowLeft", ("3", "2")), ("j", ("4", "2")), ("k", ("3", "2"))]:
        page.press(key)
        assert here() == expected
    assert "head 2" in page.text("#facts")


def test_tabs_shortcuts_theme_and_help(page: Page, view: AttentionView) -> None:
    page.open(view)
    for tab, name in [("#tab-head", "head"), ("#tab-alpha", "alpha"), ("#tab-heads", "heads")]:
        page.click(tab)
        assert page.shown(f"#view-{name}") and page.ask(f"document.querySelector('{tab}').ariaSelected") == "true"
    page.press("ArrowRight")
    assert page.shown("#view-head")
    page.driver.execute_script("document.activeElement.blur()")
    for key, name in [("3", "alpha"), ("1", "heads"), ("2", "head")]:
        page.press(key)
        assert page.shown(f"#view-{name}")
    assert not page.shown("#tab-report")
    background = lambda: page.ask("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    light = background()
    page.click("#theme")
    assert background() != light
    page.click("#theme")
    assert background() == light
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    page.click("#theme")
    assert background() != light
    page.press("?")
    assert page.shown("#help") and "exactly zero" in page.text("#help")
    page.click("#help button")
    assert not page.shown("#help")
    page.click("#help-open")
    assert page.shown("#help")
    page.press("Escape")


def test_a_url_restores_the_state_of_the_page(page: Page, view: AttentionView) -> None:
    address = "#layer=4&head=2&threshold=0.05&scale=row&zoom=16&merge=1&pins=1"
    page.open(view, address)
    expected = dict(part.split("=") for part in address[1:].split("&"))
    page.click("#next")
    page.click("#previous")
    assert page.address() == expected
    page.driver.execute_script("location.hash = '#layer=1&head=1'")
    page.settle()
    assert page.ask("document.querySelector('#layer').value") == "1" and not page.shown("#pins")


@pytest.mark.parametrize(
    "address",
    [
        "#layer=99&head=-1",
        "#layer=1.5&head=x",
        "#view=nothing&sort=<img>",
        "#layer=1&pins=900,x,,1&zoom=1e9&threshold=7",
        "#example=77&role=%00&low=abc",
        "#%E0%A4%A",
    ],
)
def test_an_invalid_url_shows_a_view(page: Page, view: AttentionView, address: str) -> None:
    page.open(view, address)
    assert page.shown("#view-heads") or page.shown("#view-head")
    page.press("2")
    page.settle()
    assert "of" in page.text("#facts")


def test_a_saved_file_opens_with_its_head(page: Page, view: AttentionView) -> None:
    page.open(view)
    page.file = view.save(page.folder / "head.html", layer=3, head=1)
    page.go("")
    assert page.shown("#view-head") and page.ask("document.querySelector('#layer').value") == "3"
    page.go("#view=heads")
    assert page.shown("#view-heads")


@pytest.mark.parametrize("address", ["", "#layer=4&head=1&pins=0,2", "#view=alpha", "#table=1"])
def test_a_narrow_screen_is_not_scrolled_sideways(page: Page, translation: AttentionRecord, address: str) -> None:
    view = attention_view(translation, [TOKENS, TOKENS], [MEMORY, MEMORY], title="A translation of two texts")
    page.open(view, address, width=360, height=780)
    assert page.ask("document.querySelector('.top').offsetHeight") < 200
    assert page.ask("document.documentElement.scrollWidth") <= 360
    page.click("#help-open")
    assert page.ask("document.querySelector('#help').getBoundingClientRect().right") <= 360
    page.press("Escape")


def test_a_notebook_frame_works(page: Page, view: AttentionView) -> None:
    page.size(1280, 900)
    page.file = page.folder / "notebook.html"
    page.file.write_text(f"<!DOCTYPE html><title>n</title><body>{view._repr_html_()}", encoding="utf-8")
    page.go("")
    page.driver.switch_to.frame(0)
    assert len(page.texts(".card")) == 15
    page.click(".card[href='#layer=2&head=1']")
    assert page.shown("#view-head") and "head 1" in page.text("#facts")
    page.driver.switch_to.default_content()
