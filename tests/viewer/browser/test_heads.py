"""The view of all heads in a browser: maps, sorting, filters, table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from browser import HEADS, Page, weights_of

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import AttentionView, attention_view


def test_all_heads_are_sorted_and_filtered(page: Page, encoder_record: Callable[..., AttentionRecord]) -> None:
    record = encoder_record(11, layers=3)
    page.open(attention_view(record))
    assert len(page.texts(".card")) == 9 and page.text("#count") == "9 heads"
    density = torch.cat([heads.density for heads in record.values()])
    page.choose("#sort", "density")
    order = page.ask("[...document.querySelectorAll('.card')].map(e => e.hash)")
    expected = [f"#layer={int(at) // 3}&head={int(at) % 3}" for at in density.argsort()]
    assert order == expected and page.address()["sort"] == "density"
    page.click("#order")
    order = page.ask("[...document.querySelectorAll('.card')].map(e => e.hash)")
    numbers = page.ask("[...document.querySelectorAll('.card')].map(e => e.title.match(/density ([\\d.]+)/)[1])")
    assert sorted(map(float, numbers), reverse=True) == list(map(float, numbers)) and set(order) == set(expected)
    assert page.ask("document.querySelector('#low').disabled")
    page.choose("#bounded", "density")
    middle = float(density.sort().values[4])
    page.choose("#low", str(middle - 1e-4))
    assert page.text("#count") == f"{int((density >= middle - 1e-4).sum())} of 9 heads"
    page.choose("#high", str(middle + 1e-4))
    assert page.text("#count") == f"{int(((density - middle).abs() <= 1e-4).sum())} of 9 heads"
    page.choose("#low", "2")
    assert page.text("#count") == "0 of 9 heads" and "No head matches" in page.text("#cards")
    page.choose("#bounded", "")
    assert page.text("#count") == "9 heads"
    role = page.ask("document.querySelector('#role').options[1].value")
    page.choose("#role", role)
    assert set(page.texts(".card-role")) == {role}


def test_kinds_of_attention_are_filtered(page: Page, view: AttentionView) -> None:
    page.open(view)
    page.choose("#kind", "cross")
    assert page.text("#count") == "6 of 15 heads"
    assert all("multihead_attn" in name for name in page.texts(".layer h2"))


def test_the_table_sorts_by_its_headers(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view)
    page.click("#as-table")
    assert not page.shown("#cards") and len(page.texts("#heads-table tbody tr")) == 15
    titles = page.texts("#heads-table thead th")
    column = titles.index("entropy")
    button = f"#heads-table thead th:nth-child({column + 1}) button"
    page.click(button)
    read = [float(cell) for cell in page.texts(f"#heads-table tbody td:nth-child({column + 1})")]
    entropies = torch.cat([heads.entropy for heads in translation.values()]).sort().values
    torch.testing.assert_close(torch.tensor(read), entropies, rtol=0, atol=5.1e-4)
    page.click(button)
    assert [float(cell) for cell in page.texts(f"#heads-table tbody td:nth-child({column + 1})")] == read[::-1]


def test_small_maps_are_drawn(page: Page, encoder_record: Callable[..., AttentionRecord]) -> None:
    record = encoder_record(11, layers=1)
    page.open(attention_view(record))
    for head in range(HEADS):
        pixels = page.ask(
            "(c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]])"
            "(document.querySelectorAll('.card canvas')[arguments[0]])",
            head,
        )
        assert pixels[:2] == [11, 11]
        colours = torch.tensor(pixels[2]).view(11, 11, 4)[..., :3]
        assert torch.equal((colours == 255).all(-1), weights_of(record, 0, head) == 0)


def test_a_card_opens_its_head_and_back_returns(page: Page, view: AttentionView) -> None:
    page.open(view)
    page.click(".card[href='#layer=2&head=1']")
    assert page.address() == {"layer": "2", "head": "1"}
    assert page.shown("#view-head") and page.ask("document.querySelector('#layer').value") == "2"
    page.driver.back()
    page.settle()
    assert page.shown("#view-heads") and not page.shown("#view-head")
