"""The pages on commands and configuration keys, made from the YAML files and from docstrings.

The meaning of a key is the description of the argument to which its value is passed, or else the comment after the
value. For ``trainer`` the comment comes first. A key without a meaning causes a warning, which ends ``make docs``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.utils import get_class

if TYPE_CHECKING:  # the tests import this module where Sphinx is not installed
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
_SKIPPED = ("defaults", "_target_", "hydra.help", "hydra.defaults")


@dataclass(frozen=True)
class Key:
    """A key of a config file: its dotted name, its default as YAML, and the comment after it."""

    name: str
    default: str
    comment: str


def files() -> list[Path]:
    """Every config file: commands first, then groups."""
    return sorted(CONFIGS.rglob("*.yaml"), key=lambda file: (len(file.relative_to(CONFIGS).parts), file))


def opening(file: Path) -> tuple[str, str]:
    """The command in the first comment line of a file, and the text of all other comment lines."""
    lines = [line[2:] for line in file.read_text("utf-8").splitlines() if line.startswith("# ")]
    first, *rest = [line for line in lines if not line.startswith("@package")] or [""]
    return first, " ".join(rest)


def keys(file: Path) -> Iterator[Key]:
    """The keys to which a file gives a value, in the order of the file."""
    text = file.read_text("utf-8")
    group = ".".join(file.relative_to(CONFIGS).parent.parts)
    prefix = f"{group}." if group and "@package _global_" not in text else ""
    root = yaml.compose(text)
    if root is not None:
        yield from _keys(root, prefix, text.splitlines())


def _keys(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Key]:
    for name, value in node.value:
        key = prefix + name.value
        if name.value in _SKIPPED or key in _SKIPPED:
            continue
        if isinstance(value, yaml.MappingNode):
            yield from _keys(value, f"{key}.", lines)
            continue
        line = lines[name.start_mark.line]
        comment = line[value.end_mark.column :].partition("#")[2].strip()
        start, end = value.start_mark.column, value.end_mark.column
        yield Key(key, line[start:end].strip(), comment)


@cache
def arguments(function: Callable[..., Any]) -> dict[str, str]:
    """The description of every argument in a docstring of Google's form."""
    doc = (inspect.getdoc(function) or "") + "\n" + (inspect.getdoc(getattr(function, "__init__", None)) or "")
    sections = re.findall(r"^Args:\n((?:[ \t]+.*\n|\n)*)", doc + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    for name, text in re.findall(r"^ {4}(\w+)[^:\n]*:[ \n]((?:.*\n)(?:(?: {5,}.*)?\n)*)", "".join(sections), re.M):
        found.setdefault(name, re.sub(r"\s+", " ", text).strip())
    return found


@cache
def _bound() -> dict[str, Callable[..., Any]]:
    """Sections of the configuration, and the functions that are called with their keys."""
    import lightning

    from recipes.seq2seq.data import Seq2SeqData, make_sequences
    from recipes.seq2seq.decode import Decoding
    from recipes.seq2seq.model import Seq2SeqTransformer
    from recipes.seq2seq.task import Seq2SeqTask

    return {
        "data": Seq2SeqData,
        "data.generate": make_sequences,
        "decoding": Decoding,
        "loss": Seq2SeqTask,
        "model": Seq2SeqTransformer,
        "optimizer": Seq2SeqTask,
        "schedule": Seq2SeqTask,
        "trainer": lightning.Trainer,
    }


def meaning(key: Key, file: Path) -> str:
    """The meaning of a key; empty if it is not described."""
    from recipes.launch import MANDATORY

    section, _, name = key.name.rpartition(".")
    function = _bound().get(section) or _target(section, file)
    described = arguments(function).get(name, "") if function else ""
    if key.name == "schedule.name":
        described = arguments(_bound()["schedule"])["schedule"]
    comment = _home_comments().get(key.name) or key.comment or MANDATORY.get(key.name, "")
    if section == "trainer":  # Lightning's descriptions are long and not specific to the recipes
        described = "" if comment else re.split(r"(?<=\.) ", described)[0]
    return described or comment


def _target(section: str, file: Path) -> Callable[..., Any] | None:
    """The class that a section of loggers or callbacks builds."""
    for part in (yaml.safe_load(file.read_text("utf-8")) or {}).items():
        if section.endswith(f".{part[0]}") and isinstance(part[1], dict) and "_target_" in part[1]:
            return get_class(part[1]["_target_"])  # type: ignore[no-any-return]
    return None


@cache
def _home_comments() -> dict[str, str]:
    """The comment after each key in the file of its group.

    Other files that set the key, such as experiments, show this comment.
    """
    found: dict[str, str] = {}
    for file in files():
        for key in keys(file):
            if key.comment and key.name.partition(".")[0] == file.relative_to(CONFIGS).parts[0]:
                found.setdefault(key.name, key.comment)
    return found


def unexplained() -> list[str]:
    """Files that do not begin with a command, and keys without a meaning."""
    nameless = [str(file.relative_to(ROOT)) for file in files() if not opening(file)[0].startswith("sparse-attn")]
    silent = [
        f"{file.relative_to(ROOT)}: {key.name}" for file in files() for key in keys(file) if not meaning(key, file)
    ]
    return [*nameless, *silent]


def configuration() -> str:
    """The Markdown of the page on keys."""
    pages = []
    group = None
    for file in files():
        path = file.relative_to(CONFIGS)
        if path.parent.as_posix() != group:
            group = path.parent.as_posix()
            pages.append("## Commands" if group == "." else f"## {group}")
        command, text = opening(file)
        pages.append(f"### {path}\n\n    {command}\n\n{_markdown(text)}".rstrip())
        rows = [_row(key, meaning(key, file)) for key in keys(file)]
        if rows:
            pages.append(_table(rows))
    return "\n\n".join(pages)


def commands() -> str:
    """The Markdown of the page on commands, with the help text of each command."""
    from recipes.cli import COMMANDS

    parts = []
    for name, purpose in COMMANDS.items():
        shown = yaml.safe_load((CONFIGS / "hydra" / f"{name}.yaml").read_text("utf-8"))["help"]["template"]
        shown = re.split(r"\n(?:groups \(GROUP|keys and their values)", shown)[0]
        parts.append(f"## sparse-attn {name}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n```text\n{shown.strip()}\n```")
    return "\n\n".join(parts)


def _row(key: Key, text: str) -> tuple[str, str, str, str]:
    note = "" if key.comment == text else key.comment
    return f"`{key.name}`", _default(key), _cell(text[:1].upper() + text[1:]), _cell(note)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    """A table of rows; the last column is left out if it is empty in all rows."""
    head = ("key", "default", "meaning", "note in the file")
    columns = 4 if any(row[3] for row in rows) else 3
    lines = [head, ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line[:columns])} |" for line in lines)


def _default(key: Key) -> str:
    return "*required*" if key.default == "???" else f"`{key.default}`" if key.default else "*empty*"


def _markdown(text: str) -> str:
    """A text of a docstring or comment as Markdown."""
    text = re.sub(r":\w+:`~?([^`<]*)(?:<[^>]*>)?`", r"`\1`", text)
    return re.sub(r"``([^`]*)``", r"`\1`", text).replace("*", r"\*").replace("<", "&lt;")


def _cell(text: str) -> str:
    return _markdown(text).replace("|", r"\|")


def setup(app: Sphinx) -> dict[str, bool]:
    """Completes the two pages when they are read, and reports files and keys without an explanation."""
    from sphinx.util import logging

    made = {"reference/commands": commands, "reference/configuration": configuration}

    def read(app: Sphinx, page: str, source: list[str]) -> None:
        if page in made:
            for file in files():
                app.env.note_dependency(str(file))
            source[0] += "\n" + made[page]()
            for line in unexplained() if page == "reference/configuration" else []:
                logging.getLogger(__name__).warning("no explanation: %s", line)

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
