"""Parts of the site's build (links between pages, pictures, HTML), and the check of a built site."""

from __future__ import annotations

import sys
from pathlib import Path

import accessible
import outside_pages
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))

import check_site  # noqa: E402


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](../RESULTS.md#g2p)", "[a](/results.md#g2p)"),
        ("[a](../benchmarks/cpu.md)", "[a](/benchmarks/cpu.md)"),
        ("[a](alpha.md#lora)", "[a](/alpha.md#lora)"),
        ("[a](../README.md)", "[a](/index.md)"),
        ("[the script](../scripts/gpu_check.py)", "the script"),
        ("[a](nothing.md)", "[a](nothing.md)"),
        ("[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("[a](#section)", "[a](#section)"),
    ],
)
def test_links_in_the_repository_become_links_in_the_site(written, shown):
    assert outside_pages.with_site_links(written, DOCS / "gpu.md", DOCS) == shown


def test_links_of_a_page_at_the_top_level():
    text = outside_pages.with_site_links("[a](docs/alpha.md) ![b](docs/mappings.png)", ROOT / "ARCHITECTURE.md", DOCS)
    assert text == "[a](/alpha.md) ![b](/mappings.png)"


def test_every_page_from_outside_docs_has_its_file_and_its_stub():
    for page, file in outside_pages.PAGES.items():
        assert (DOCS / f"{page}.md").exists() and (ROOT / file).exists()


def test_html_is_corrected():
    assert accessible.corrected('<p class="caption" role="heading"><span class="caption-text">') == (
        '<p class="caption" role="heading" aria-level="2"><span class="caption-text">'
    )
    signature = '<dl>\n<dd><em class="sig-param">x</em>,</dd>\n</dl>'
    assert accessible.corrected(signature).strip() == '<span class="parameter"><em class="sig-param">x</em>,</span>'


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://example.org/x.js"></script>',
        '<link rel="stylesheet" href="//example.org/x.css">',
        "<img alt='' src='http://example.org/x.png'>",
        "<style>@import url(https://example.org/x.css)</style>",
        "<style>@font-face { src: url('https://example.org/x.woff2') }</style>",
    ],
)
def test_a_tag_that_loads_a_foreign_file_is_found(tag, tmp_path):
    (tmp_path / "page.html").write_text(f"<html>{tag}</html>", "utf-8")
    assert [line.startswith("page.html: ") for line in check_site.foreign_sources(tmp_path)] == [True]


def test_links_and_own_files_are_not_foreign_sources(tmp_path):
    page = '<a href="https://example.org">x</a><script src="_static/x.js"></script><img src="data:image/png;base64,x">'
    (tmp_path / "page.html").write_text(page, "utf-8")
    assert list(check_site.foreign_sources(tmp_path)) == []


def test_error_for_a_missing_site_contains_the_command_that_builds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_site.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="make docs builds it"):
        check_site.main()


@pytest.mark.parametrize("folder", ["tutorials", "howto"])
def test_every_page_of_a_folder_is_listed_in_its_index(folder):
    index = (DOCS / folder / "index.md").read_text("utf-8")
    for page in (DOCS / folder).glob("*.md"):
        assert page.stem == "index" or (f"]({page.name})" in index and f"\n{page.stem}\n" in index), page.name


def test_every_picture_has_a_dark_copy(tmp_path):
    dark_pictures = pytest.importorskip("dark_pictures", reason="Sphinx is not installed")
    rc = (DOCS / "tutorials" / "matplotlibrc").read_text("utf-8")
    assert rc.count(dark_pictures.INK) == 5
    drawn = [picture for picture in DOCS.rglob("*.png") if "_build" not in picture.parts]
    light = [picture for picture in drawn if not picture.stem.endswith("_dark")]
    assert len(light) >= 13 and all(picture.with_stem(f"{picture.stem}_dark").exists() for picture in light)
