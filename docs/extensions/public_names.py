"""Checks that every public name has an entry in the reference.

A name is public if a package of ``PACKAGES`` lists it in ``__all__``, or if it is the function of a command.
``sparse_attn.compat.zeta`` has no ``__all__``: there, every function is public.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests import this module where Sphinx is not installed
    from sphinx.application import Sphinx

PACKAGES = [
    "sparse_attn",
    "sparse_attn.nn",
    "sparse_attn.ops",
    "sparse_attn.optim",
    "sparse_attn.analysis",
    "sparse_attn.observe",
    "sparse_attn.viewer",
    "sparse_attn.integrations.huggingface",
    "sparse_attn.compat.entmax",
    "sparse_attn.compat.zeta",
    "sparse_attn.recipes.seq2seq.data",
    "sparse_attn.recipes.seq2seq.decode",
    "sparse_attn.recipes.report",
]
_ENTRY = re.compile(r"^\.\. auto(?:function|class|exception|data|attribute|module):: ([\w.]+)", re.MULTILINE)


def public_names() -> Iterator[tuple[str, object]]:
    """Every public name with its object."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", None) or _own_functions(module):
            yield f"{package}.{name}", getattr(module, name)
    from sparse_attn.recipes.cli import COMMANDS

    for command in COMMANDS:
        module = importlib.import_module(f"sparse_attn.recipes.{command}")
        yield f"{module.__name__}.{command}", getattr(module, command)


def _own_functions(module: object) -> list[str]:
    """The public functions and classes of a module without ``__all__``, and the names that it imports as ``x as x``."""
    source = inspect.getsource(module)  # type: ignore[arg-type]
    exported = re.findall(r"import (\w+) as \1$", source, re.MULTILINE)
    defined = re.findall(r"^(?:def|class) ([a-z]\w*|[A-Z]\w*)", source, re.MULTILINE)
    return [*exported, *(name for name in defined if not name.startswith("_"))]


def entries(folder: Path) -> list[str]:
    """The names that the pages of a folder describe."""
    return [name for page in sorted(folder.rglob("*.md")) for name in _ENTRY.findall(page.read_text("utf-8"))]


def resolve(name: str) -> object:
    """The object of a dotted name.

    Raises:
        AttributeError: There is no such name.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package, _, rest = name.rpartition(".")
        return getattr(resolve(package), rest)


def missing(folder: Path) -> list[str]:
    """Public names without an entry. An entry under another name of the same object counts."""
    described = {id(resolve(name)) for name in entries(folder)}
    names = set(entries(folder))
    return [name for name, value in public_names() if id(value) not in described and name not in names]


def linked(app: Any, env: Any, node: Any, content: Any) -> Any:
    """The link for a name whose object has its entry under another name, such as the name in the parent package."""
    from sphinx.util.nodes import make_refnode

    target = str(node.get("reftarget", ""))
    domain = env.get_domain("py")
    same = [name for name in domain.objects if name.endswith(f".{target}")]
    if not same:
        try:
            wanted = resolve(target)
        except (ImportError, AttributeError, ValueError):
            return None
        alike = (name for name in domain.objects if name.rpartition(".")[2] == target.rpartition(".")[2])
        same = [name for name in alike if resolve(name) is wanted]
    if node.get("refdomain") != "py" or not same:
        return None
    entry = domain.objects[min(same, key=len)]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content)


def setup(app: Sphinx) -> dict[str, bool]:
    """Checks the reference before the pages are written."""
    from sphinx.util import logging

    def check(app: Sphinx, *_: object) -> None:
        for name in missing(Path(app.srcdir) / "reference"):
            logging.getLogger(__name__).warning("%s is public and has no entry in docs/reference", name)

    app.connect("env-check-consistency", check)
    app.connect("missing-reference", linked)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
