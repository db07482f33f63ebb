"""A page in a headless browser, with functions that use the page and read its content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import AttentionView

HEADS, QUERIES, KEYS = 3, 5, 7
HALF = 2**-11  # relative rounding error of float16, in which a page stores weights
TOKENS = ["▁un", "believ", "ably", "▁old", "▁cats"]
MEMORY = ["▁vi", "eux", "▁cha", "ts", "▁in", "croy", "ables"]
ARROWS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27}


class Page:
    """A page in the window of a browser."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, view: AttentionView, address: str = "", *, width: int = 1280, height: int = 900) -> None:
        self.size(width, height)
        self.file = view.save(self.folder / "page.html")
        self.go(address)

    def go(self, address: str) -> None:
        """Load the saved file with the given fragment of its URL."""
        self.driver.get("about:blank")
        self.driver.get(self.file.as_uri() + address)
        self.settle()

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def settle(self) -> None:
        """Wait for six frames and 60 ms, which is enough for the page to read and draw the weights."""
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


def weights_of(record: AttentionRecord, layer: int, head: int, example: int = 0) -> Tensor:
    kept = list(record.values())[layer].weights
    assert kept is not None
    return kept[example, head].float()


def close(read: Tensor, weights: Tensor) -> None:
    assert torch.equal(read != 0, weights != 0)
    torch.testing.assert_close(read, weights, rtol=HALF, atol=2**-25)
