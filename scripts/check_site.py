"""Check the documentation site that `make docs` has built.

python scripts/check_site.py [FOLDER] [--axe FILE] [--pictures FOLDER]

- No page takes a script, a style, a font or a picture from another computer.
- From the file system, with the network off, no page sends a request or logs an error, and the search finds names.
- axe-core finds nothing serious on any page, in the light and in the dark scheme.

The last two checks need Chromium and chromedriver, and the last check also needs axe-core. Without these, a check is
skipped, and a line reports this.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
_TAG = re.compile(r"<(script|img|iframe|source|video|audio|embed|object|link)\b[^>]*>", re.IGNORECASE)
_SOURCE = re.compile(r"""\b(?:src|srcset|data|href)\s*=\s*["']?\s*(?:https?:)?//""", re.IGNORECASE)
_STYLE = re.compile(r"""(?:@import\s+(?:url\()?|url\()\s*["']?\s*(?:https?:)?//[^\s"')]*""", re.IGNORECASE)
_NO_SOURCE = re.compile(r"""\brel\s*=\s*["']?(?:canonical|license|author)\b""", re.IGNORECASE)
_SEARCHED = {"topk_softmax": "reference/operators", "label_smoothing": "reference/losses", "sparsemax": "operators"}
# A page of each kind: text, tutorial, reference, tables.
_PICTURES = ("index", "tutorials/ten_minutes", "reference/layers", "reference/configuration")

# The dark scheme changes colours and pictures; everything else has been checked in the light scheme.
_DARK_RULES = ["color-contrast", "link-in-text-block", "image-alt"]


def foreign_sources(site: Path) -> Iterator[str]:
    """Tags and styles that load a file from another computer."""
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        text = file.read_text(encoding="utf-8")
        found = [tag[0] for tag in _TAG.finditer(text) if _SOURCE.search(tag[0]) and not _NO_SOURCE.search(tag[0])]
        for part in [*found, *(style[0] for style in _STYLE.finditer(text))]:
            yield f"{file.relative_to(site)}: {part[:120]}"


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium without a network, which logs requests and errors; None if it is not installed."""
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        yield None
        return
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        for flag in [*flags, "--disable-component-update", "--window-size=1280,900", f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        started.set_script_timeout(180)
        started.execute_cdp_cmd("Network.enable", {})
        off = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        started.execute_cdp_cmd("Network.emulateNetworkConditions", off)
        try:
            yield started
        finally:
            started.quit()


def complaints(driver: Any) -> Iterator[str]:
    """Errors and warnings that the page logged, and requests that it sent, since the last call."""
    for entry in driver.get_log("browser"):
        if entry["level"] in ("SEVERE", "WARNING"):
            yield entry["message"]
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:", "about:", "chrome")):
                yield f"asks for {address}"


def search(driver: Any, site: Path, words: str, expected: str) -> str | None:
    """A message if the search for some words does not find the expected page."""
    driver.get((site / "search.html").as_uri() + f"?q={words}")
    results = driver.execute_async_script(
        "const done = arguments[0]; let calm = 0, before = -1; const look = () => {"
        "const links = [...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'));"
        "calm = links.length && links.length === before ? calm + 1 : 0; before = links.length;"
        "if (calm > 5 || performance.now() > 20000) done(links); else setTimeout(look, 100); }; look()"
    )
    return None if any(expected in result for result in results) else f"search for {words!r} gives {results[:5]}"


def serious(driver: Any, rules: list[str]) -> list[str]:
    """Serious and critical findings of axe-core on the open page, for the given rules, or for all rules if none."""
    found = driver.execute_async_script(
        "const [rules, done] = arguments; const only = rules.length ? {runOnly: rules} : {};"
        "axe.run(document, {preload: false, iframes: false, resultTypes: ['violations'], ...only})"
        ".then(result => done(result.violations))",
        rules,
    )
    return [
        f"{each['id']} ({each['impact']}): {each['help']}; {len(each['nodes'])} times, first {each['nodes'][0]['html']}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def in_browser(site: Path, axe: Path | None, pictures: Path | None) -> list[str]:
    """Messages about all errors that are found in a browser."""
    wrong: list[str] = []
    with browser() as driver:
        if driver is None:
            print("no chromium and chromedriver: requests, search and accessibility are not checked")
            return wrong
        code = axe.read_text(encoding="utf-8") if axe else None
        pages = sorted(site.rglob("*.html"))
        for file in pages:
            page = file.relative_to(site).with_suffix("").as_posix()
            for scheme in ("light", "dark"):
                feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
                driver.get(file.as_uri())
                wrong += [f"{page} ({scheme}): {line}" for line in complaints(driver)]
                if code:
                    driver.execute_script(code)
                    rules = _DARK_RULES if scheme == "dark" else []
                    wrong += [f"{page} ({scheme}): {line}" for line in serious(driver, rules)]
                if pictures and page in _PICTURES:
                    pictures.mkdir(parents=True, exist_ok=True)
                    driver.save_screenshot(str(pictures / f"{page.replace('/', '_')}_{scheme}.png"))
        results = [search(driver, site, words, expected) for words, expected in _SEARCHED.items()]
        wrong += [line for line in results if line]
        checked = "requests, errors, search" + (", accessibility" if code else "; axe-core is missing")
        print(f"{len(pages)} pages in two schemes: {checked}")
    return wrong


def packaged_axe() -> Path | None:
    """The axe-core file in the package axe-core-python."""
    try:
        import axe_core_python
    except ImportError:
        return None
    return Path(axe_core_python.__file__).parent / "axe.min.js"


def main() -> None:
    """Check, and end with status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=SITE)
    parser.add_argument("--axe", type=Path, help="an axe.min.js to use in place of the package axe-core-python")
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots of four pages")
    given = parser.parse_args()
    site = given.site.resolve()
    if not (site / "index.html").exists():
        sys.exit(f"there is no site in {site}: make docs builds it")
    wrong = list(foreign_sources(site)) + in_browser(site, given.axe or packaged_axe(), given.pictures)
    for line in dict.fromkeys(wrong):
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
