"""Draw the pictures of docs/ that show a run: α over training, and screenshots of the page that inspect writes.

    sparse-attn train hydra.run.dir=RUN
    sparse-attn inspect run=RUN worth=true worth_words=300 words=[phoneme,attention]
    python scripts/plot_run.py RUN [FOLDER]

Every picture is made in light and in dark colours: NAME.png and NAME_dark.png. The screenshots need chromium,
chromedriver and selenium.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from benchmark_viewer import browser  # Python puts the folder of a script on its path
from plot_mappings import DARK

from recipes.report.plots import alpha_course, drawn
from recipes.report.write import FOLDER, read_course
from recipes.run import ALPHA

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Name, address within the page, width and height in pixels.
SHOTS = (
    ("viewer_heads", "#example=1", 1180, 760),
    ("viewer_head", "#layer=5&head=2&example=1&pins=3,6", 1180, 900),
    ("viewer_alpha", "#view=alpha", 1180, 900),
    ("viewer_narrow", "#layer=5&head=2&example=1&pins=3", 360, 1180),
)


def draw_course(run: Path, folder: Path) -> None:
    """Draw α of every head over training."""
    rows = read_course(run / ALPHA)
    (folder / "alpha_course.png").write_bytes(drawn(alpha_course(rows)))
    with plt.style.context(["dark_background", DARK]):
        (folder / "alpha_course_dark.png").write_bytes(drawn(alpha_course(rows)))


def take_screenshots(page: str, driver: Any, folder: Path) -> None:
    """Save every view of the page, in both themes."""
    for theme, suffix in (("light", ""), ("dark", "_dark")):
        feature = {"name": "prefers-color-scheme", "value": theme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for name, address, width, height in SHOTS:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.get("about:blank")
            driver.get(page + address)
            time.sleep(1)
            driver.save_screenshot(str(folder / f"{name}{suffix}.png"))


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with the report of inspect")
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS, metavar="FOLDER", help="default: docs")
    given = parser.parse_args()
    page = given.run / FOLDER / "report.html"
    if not page.exists():
        sys.exit(f"{page} does not exist: sparse-attn inspect run={given.run} writes it")
    driver = browser()
    if driver is None:
        sys.exit("the screenshots need chromium, chromedriver and selenium")
    given.folder.mkdir(parents=True, exist_ok=True)
    draw_course(given.run, given.folder)
    try:
        take_screenshots(page.resolve().as_uri(), driver, given.folder)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
