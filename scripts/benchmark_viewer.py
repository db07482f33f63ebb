"""Measure the size of attention pages, and how fast a browser opens and scrolls them.

    python scripts/benchmark_viewer.py

The times to open and to scroll need chromium, chromedriver and selenium; without them, only sizes and the time to make
a page are printed. Weights are α-entmax of random scores. α and the standard deviation of the scores determine
the density.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sparse_attn import entmax
from sparse_attn.analysis import AttentionRecord
from sparse_attn.viewer import AttentionView, attention_view

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Layers, heads, tokens, α, standard deviation of the scores.
CASES = ((12, 12, 256, 1.5, 1.0), (12, 12, 256, 1.5, 0.5), (12, 12, 256, 1.0, 1.0), (4, 8, 2048, 1.5, 2.0))
# Resolves when the visible small maps are drawn.
DRAWN = """
const done = arguments[0];
const check = () => [...document.querySelectorAll(".card canvas")].slice(0, 8).every((c) => c.width > 1)
    ? done(performance.now()) : requestAnimationFrame(check);
check();
"""
# The longest frame while a matrix is scrolled from end to end in 60 steps.
SCROLLED = """
const done = arguments[0];
const box = document.getElementById("matrix");
let step = 0, last = performance.now(), longest = 0;
const frame = (now) => {
  if (step > 2) longest = Math.max(longest, now - last);
  last = now;
  if (step === 60) return done(longest);
  step += 1;
  box.scrollTo((box.scrollWidth * step) / 60, (box.scrollHeight * step) / 60);
  requestAnimationFrame(frame);
};
requestAnimationFrame(frame);
"""


def made_up(layers: int, heads: int, length: int, alpha: float, spread: float) -> AttentionRecord:
    """Causal attention of random scores."""
    torch.manual_seed(0)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    record = AttentionRecord(keep_weights=True)
    for layer in range(layers):
        scores = (spread * torch.randn(1, heads, length, length)).masked_fill(~visible, -torch.inf)
        record.add(f"layers.{layer}.self_attn", entmax(scores, alpha), visible, alpha)
    return record


def browser() -> Any:
    """A headless browser, or None."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    try:
        from selenium import webdriver
    except ModuleNotFoundError:
        return None
    if driver is None or chromium is None:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tempfile.mkdtemp()}", "--window-size=1280,900"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def measure(view: AttentionView, driver: Any, folder: Path) -> str:
    """Size of a page in MB, seconds to make and to open it, milliseconds of the longest frame while scrolling."""
    started = time.perf_counter()
    file = view.save(folder / "page.html")
    made = time.perf_counter() - started
    size = f"{file.stat().st_size / 1e6:.2f} | {made:.1f}"
    if driver is None:
        return f"{size} | - | -"
    driver.get("about:blank")
    driver.get(file.as_uri())
    opened = driver.execute_async_script(DRAWN) / 1000
    driver.get("about:blank")
    driver.get(f"{file.as_uri()}#layer=0&head=0&zoom=16")
    time.sleep(1)
    return f"{size} | {opened:.2f} | {driver.execute_async_script(SCROLLED):.0f}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    driver = browser()
    try:
        print("| layers × heads × tokens | α | density | MB | s to make | s to open | ms, longest frame |")
        print("|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            for layers, heads, length, alpha, spread in CASES:
                record = made_up(layers, heads, length, alpha, spread)
                density = sum(float(each.density.mean()) for each in record.values()) / layers
                view = attention_view(record, [f"token{place}" for place in range(length)])
                numbers = measure(view, driver, Path(folder))
                print(f"| {layers} × {heads} × {length} | {alpha} | {density:.1%} | {numbers} |", flush=True)
    finally:
        if driver is not None:
            driver.quit()


if __name__ == "__main__":
    main()
