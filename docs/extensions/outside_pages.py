"""Pages of the site whose text is outside ``docs/``, such as the changelog.

The page in ``docs/`` is a stub. Links between all pages are written as paths in the repository, where people also read
these files; this extension converts them to links between pages of the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests import this module where Sphinx is not installed
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
# Page of the site -> file in the repository.
PAGES = {
    "architecture": "ARCHITECTURE.md",
    "benchmarks/accuracy": "benchmarks/accuracy.md",
    "benchmarks/cpu": "benchmarks/cpu.md",
    "benchmarks/gpu_predictions": "benchmarks/gpu_predictions.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "experiments": "recipes/seq2seq/README.md",
    "results": "RESULTS.md",
}
_LINK = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]\((?!\w+:|#)([^()\s#]+)(#[^()\s]*)?\)")


def with_site_links(text: str, file: Path, docs: Path) -> str:
    """The text of a file with its links converted to links of the site.

    A link to a page becomes a link to this page of the site. Other files of the repository are not part of the site:
    only their name is kept, without a link. A link to a missing file is not changed, and the build reports it.

    Args:
        text: The Markdown text.
        file: The path of the file in the repository.
        docs: The folder of the site's sources.

    Example:
        >>> with_site_links("[Results](../RESULTS.md#g2p)", ROOT / "docs/alpha.md", ROOT / "docs")
        '[Results](/results.md#g2p)'
    """
    pages = {(ROOT / source).resolve(): name for name, source in PAGES.items()}

    def replaced(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = (file.parent / target).resolve()
        if path in pages:
            return f"[{label}](/{pages[path]}.md{anchor})"
        if path == (ROOT / "README.md"):
            return f"[{label}](/index.md)"
        if path.is_relative_to(docs) and path.is_file():
            return f"[{label}](/{path.relative_to(docs).as_posix()}{anchor})"
        return label if path.exists() else found[0]

    return _LINK.sub(replaced, text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the conversion for every page that is read."""

    def read(app: Sphinx, page: str, source: list[str]) -> None:
        docs = Path(app.srcdir).resolve()
        file = ROOT / PAGES[page] if page in PAGES else docs / f"{page}.md"
        if page in PAGES:
            app.env.note_dependency(str(file))
            source[0] = file.read_text(encoding="utf-8")
        source[0] = with_site_links(source[0], file, docs)

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
