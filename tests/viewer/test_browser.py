"""The page in a real browser: every control is used, and what is read from it equals the tensors."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn import entmax
from sparse_attn.analysis import AttentionRecord, merge_pieces, word_groups
from sparse_attn.viewer import AttentionView, attention_view
from sparse_attn.viewer import page as page_module

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver (Debian: chromium chromium-driver)"
)

HEADS, QUERIES, KEYS = 3, 5, 7
HALF = 2**-11
TOKENS = ["▁un", "believ", "ably", "▁old", "▁cats"]
MEMORY = ["▁vi", "eux", "▁cha", "ts", "▁in", "croy", "ables"]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
ARROWS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27}


class Page:
    """One window of a browser, and the questions that tests ask of it."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, view: AttentionView, address: str = "", *, width: int = 1280, height: int = 900) -> None:
        self.size(width, height)
        self.file = view.save(self.folder / "page.html")
        self.go(address)

    def go(self, address: str) -> None:
        """Load the page anew."""
        self.driver.get("about:blank")
        self.driver.get(self.file.as_uri() + address)
        self.settle()

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def settle(self) -> None:
        """Wait until weights are read and drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; const frame = () => new Promise(requestAnimationFrame);"
            "(async () => { for (let i = 0; i < 4; i++) await frame(); await new Promise(r => setTimeout(r, 60));"
            "await frame(); await frame(); })().then(done)"
        )

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def text(self, selector: str) -> str:
        return self.ask("document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.ask("[...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def shown(self, selector: str) -> bool:
        return self.ask("document.querySelector(arguments[0]).checkVisibility()", selector)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()
        self.settle()

    def choose(self, selector: str, value: str) -> None:
        script = (
            "const [selector, value] = arguments; const e = document.querySelector(selector);"
            "e.value = value; if (e.value !== value) throw new Error(`no ${value}`);"
            "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, { bubbles: true }))"
        )
        self.driver.execute_script(script, selector, value)
        self.settle()

    def press(self, key: str) -> None:
        event = {"key": key, "windowsVirtualKeyCode": ARROWS.get(key, 0), **({"text": key} if len(key) == 1 else {})}
        self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", **event})
        self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def point(self, x: float, y: float, kind: str = "mouseMoved") -> None:
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **button})

    def address(self) -> dict[str, str]:
        pairs = self.ask("[...new URLSearchParams(location.hash.slice(1))]")
        return dict(pairs)

    def matrix(self) -> Tensor:
        """Walk over all cells by keyboard and read their weights."""
        self.driver.execute_script("document.getElementById('matrix').focus()")
        queries, keys = (int(number.replace(",", "")) for number in self.texts(".fact")[-1][5:].split(" × "))
        rows = []
        for row in range(queries):
            cells = []
            for column in range(keys):
                self.press("ArrowRight" if row + column == 0 or column else "ArrowDown")
                cells.append(float(self.ask("document.getElementById('readout').dataset.weight")))
            rows.append(cells)
            for _ in range(keys - 1):
                self.press("ArrowLeft")
        return torch.tensor(rows)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("chromium")
    for flag in [*FLAGS, f"--user-data-dir={folder}", "--window-size=1280,900"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture
def page(driver: Any, tmp_path: Path) -> Iterator[Page]:
    """A window; afterwards no error may have been logged and no request have been sent."""
    driver.get_log("browser"), driver.get_log("performance")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    yield Page(driver, tmp_path)
    driver.get("about:blank")
    messages = [entry["message"] for entry in driver.get_log("browser")]
    # Tests read pixels, which the browser calls slow.
    assert [message for message in messages if "willReadFrequently" not in message] == []
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:", "chrome"))] == []


@pytest.fixture
def view(translation: AttentionRecord) -> AttentionView:
    return attention_view(translation, TOKENS, MEMORY, title="A translation")


def weights_of(record: AttentionRecord, layer: int, head: int, example: int = 0) -> Tensor:
    kept = list(record.values())[layer].weights
    assert kept is not None
    return kept[example, head].float()


def close(read: Tensor, weights: Tensor) -> None:
    assert torch.equal(read != 0, weights != 0)
    torch.testing.assert_close(read, weights, rtol=HALF, atol=2**-25)


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


def test_pairs_that_a_mask_hides_are_called_so(page: Page, view: AttentionView) -> None:
    page.open(view, "#layer=1&head=0")
    page.driver.execute_script("document.getElementById('matrix').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert "key 1" in page.text("#readout") and "not visible" in page.text("#readout")
    assert "never visible" in page.text("#legend")


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
    assert page.text("#count") == "0 of 9 heads" and "No head is left" in page.text("#cards")
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


def test_heads_and_layers_are_chosen_by_every_control(page: Page, view: AttentionView) -> None:
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


def test_the_threshold_hides_what_is_lighter(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
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


def test_pieces_are_merged_into_words(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view, "#layer=4&head=1")
    page.click("#merge")
    assert page.address()["merge"] == "1"
    merged = merge_pieces(weights_of(translation, 4, 1), word_groups(TOKENS), word_groups(MEMORY))
    read = page.matrix()
    assert read.shape == (3, 3)
    torch.testing.assert_close(read, merged, rtol=4 * HALF, atol=1e-6)
    assert "“▁old” → key 0 “▁vieux”" in page.text("#readout") or "key" in page.text("#readout")
    page.press("m")
    assert "merge" not in page.address()


def test_words_cannot_be_merged_where_no_token_is_a_piece(
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
    assert f"{shared} keys have weight in all of them" in page.text("#pins h3")
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


def test_a_token_under_the_pointer_is_described(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
    page.open(view, "#layer=4&head=1")
    box = page.ask("(({right, top}) => [right, top])(document.querySelector('#lines').getBoundingClientRect())")
    page.point(box[0] - 25, box[1] + 4 + 20 * 2 + 10)
    column = weights_of(translation, 4, 1)[:, 2]
    expected = f"key 2 “▁cha”{int((column != 0).sum())} of 5 queries look at it"
    assert expected in page.text("#tip")
    page.point(box[0] - page.ask("document.querySelector('#lines').clientWidth") + 25, box[1] + 4 + 20 * 2 + 10)
    assert "query 2 “ably”" in page.text("#tip")


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


def test_an_address_shows_what_was_seen(page: Page, view: AttentionView) -> None:
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
def test_addresses_that_mean_nothing_do_no_harm(page: Page, view: AttentionView, address: str) -> None:
    page.open(view, address)
    assert page.shown("#view-heads") or page.shown("#view-head")
    page.press("2")
    page.settle()
    assert "of" in page.text("#facts")


def test_a_file_opens_with_the_head_it_was_saved_for(page: Page, view: AttentionView) -> None:
    page.open(view)
    page.file = view.save(page.folder / "head.html", layer=3, head=1)
    page.go("")
    assert page.shown("#view-head") and page.ask("document.querySelector('#layer').value") == "3"
    page.go("#view=heads")
    assert page.shown("#view-heads")


def test_examples_of_a_batch(page: Page, translation: AttentionRecord) -> None:
    tokens = [[f"{n}{token}" for token in TOKENS] for n in range(2)]
    memory = [[f"{n}{token}" for token in MEMORY] for n in range(2)]
    page.open(attention_view(translation, tokens, memory), "#layer=4&head=1")
    page.choose("#example", "1")
    assert page.address()["example"] == "1"
    close(page.matrix(), weights_of(translation, 4, 1, example=1))
    assert "1▁" in page.text("#readout")


def test_alpha_of_every_head_and_its_course(page: Page, view: AttentionView, translation: AttentionRecord) -> None:
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


def test_a_model_without_alpha_says_so(page: Page) -> None:
    record = AttentionRecord(keep_weights=True)
    record.add("layer", torch.rand(1, 2, 3, 3).softmax(-1))
    page.open(attention_view(record), "#view=alpha")
    assert "No head of this model has an α." in page.text("#alphas")


def test_tabs_keys_theme_and_help(page: Page, view: AttentionView) -> None:
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


@pytest.mark.parametrize("address", ["", "#layer=4&head=1&pins=0,2", "#view=alpha", "#table=1"])
def test_a_narrow_screen_is_not_scrolled_sideways(page: Page, translation: AttentionRecord, address: str) -> None:
    view = attention_view(translation, [TOKENS, TOKENS], [MEMORY, MEMORY], title="A translation of two texts")
    page.open(view, address, width=360, height=780)
    assert page.ask("document.querySelector('.top').offsetHeight") < 200
    assert page.ask("document.documentElement.scrollWidth") <= 360
    page.click("#help-open")
    assert page.ask("document.querySelector('#help').getBoundingClientRect().right") <= 360
    page.press("Escape")


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


def test_a_page_of_2048_tokens(page: Page) -> None:
    length = 2048
    torch.manual_seed(0)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    record = AttentionRecord(keep_weights=True)
    scores = (3 * torch.randn(1, 2, length, length)).masked_fill(~visible, -torch.inf)
    record.add("layer", entmax(scores, 1.5), visible, 1.5)
    page.open(attention_view(record, [f"t{i}" for i in range(length)]), "#layer=0&head=1")
    assert page.ask("document.querySelector('#matrix canvas').width") < 1280  # only what is in sight
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


def test_a_page_that_left_weights_out_says_so(
    page: Page, encoder_record: Callable[..., AttentionRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "MOST_ENTRIES", 50)
    page.open(attention_view(encoder_record(11)))
    assert page.shown("#notice") and "largest; those below" in page.text("#notice")


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
