"""Corrections of the HTML that Sphinx writes, for readers who use a screen reader or a keyboard."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests import this module where Sphinx is not installed
    from sphinx.application import Sphinx

_PARAMETERS = re.compile(r"<dl>\s*((?:<dd><em class=\"sig-param\">.*?</dd>\s*)+)</dl>", re.DOTALL)


def corrected(html: str) -> str:
    """The HTML with a heading level for captions and keyboard focus for scrolling parts; no signature is a list."""
    html = html.replace('role="heading"><span class="caption', 'role="heading" aria-level="2"><span class="caption')
    html = html.replace("<pre", '<pre tabindex="0"')
    html = html.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')
    return _PARAMETERS.sub(
        lambda found: found[1].replace("<dd>", '<span class="parameter">').replace("</dd>", "</span>"), html
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Corrects each page after the theme has rendered its parts."""

    def correct(app: Sphinx, page: str, template: str, context: dict[str, Any], *_: Any) -> None:
        for part in ("body", "furo_navigation_tree"):
            if part in context:
                context[part] = corrected(context[part])

    app.connect("html-page-context", correct, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
