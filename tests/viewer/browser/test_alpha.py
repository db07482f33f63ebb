"""The view of α in a browser."""

from __future__ import annotations

import pytest
import torch
from browser import HEADS, MEMORY, TOKENS, Page

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import AttentionView, attention_view


def test_alpha_of_every_head_and_its_curve(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    rows = {
        run: [
            (step, name, head, start + 0.001 * step) for name in translation for head in range(HEADS) for step in (0, 9)
        ]
        for run, start in {"seed 0": 1.7, "seed 1": 1.2}.items()
    }
    page.open(attention_view(translation, TOKENS, MEMORY, courses=rows), "#view=alpha")
    alphas = [float(alpha) for alpha in page.ask("[...document.querySelectorAll('.dot')].map(d => d.dataset.alpha)")]
    assert alphas == pytest.approx([1.7] * 15)
    assert len(page.texts(".course")) == 10 and len(page.texts(".course path")) == 30
    assert len(page.texts(".other-dot")) == 15 and "seed 1" in page.text("#alphas")
    page.driver.execute_script("document.querySelectorAll('.dot')[4].focus()")
    assert "α 1.7000" in page.text("#tip") and "seed 1: α 1.2090" in page.text("#tip")
    page.press("Enter")
    page.settle()
    assert page.shown("#view-head")


def test_runs_whose_names_are_numbers_keep_their_order(page: Page, translation: AttentionRecord) -> None:
    rows = {run: [(0, name, 0, 1.5) for name in translation] for run in ("3", "0")}
    page.open(attention_view(translation, TOKENS, MEMORY, courses=rows), "#view=alpha")
    assert page.text(".alpha-panel p").split() == ["3", "0"]
    assert "3 and 0 side by side" in page.text("#alphas")


def test_a_curve_may_have_more_points_than_a_call_may_have_arguments(page: Page, translation: AttentionRecord) -> None:
    name = next(iter(translation))
    rows = [(step, name, head, 1.5) for head in range(2) for step in range(75_000)]
    page.open(attention_view(translation, TOKENS, MEMORY, courses={"a": rows}), "#view=alpha")
    assert len(page.texts(".course path")) == 2


def test_the_page_reports_that_a_model_has_no_alpha(page: Page) -> None:
    record = AttentionRecord(keep_weights=True)
    record.add("layer", torch.rand(1, 2, 3, 3).softmax(-1))
    page.open(attention_view(record), "#view=alpha")
    assert "No head of this model has an α." in page.text("#alphas")
