"""CITATION.cff, the issue forms, README.md and ARCHITECTURE.md: required fields, length, and names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import sparse_attn

ROOT = Path(__file__).parents[2]


def test_the_citation_has_the_version_and_the_required_fields():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == sparse_attn.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_the_required_fields(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text("utf-8"))
    assert {"name", "description", "body"} <= set(form)
    identities = [part["id"] for part in form["body"]]
    assert len(set(identities)) == len(identities) >= 3
    assert all(part["attributes"].get("label") for part in form["body"])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 250


def test_the_architecture_names_every_kernel_file_and_only_files_that_exist():
    folders = (ROOT / "ARCHITECTURE.md").read_text("utf-8").partition("## How data flows")[0]
    named = {*re.findall(r"\b[a-z_]+\.(?:py|c|h)\b", folders)}
    kernels = (ROOT / "sparse_attn" / "kernels").rglob("*.*")
    assert {file.name for file in kernels if file.suffix in (".py", ".c", ".h")} - {"__init__.py"} <= named
    parts = ("sparse_attn", "recipes", "scripts", "docs", "tests")
    assert named <= {file.name for part in parts for file in (ROOT / part).rglob("*.*")}


def test_the_functions_on_the_path_of_the_query_exist():
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8").partition("*The path of `query`*")[2]
    lines = [
        line.split(maxsplit=1) for line in page.partition("*The path of")[0].splitlines() if line.startswith("    ")
    ]
    assert len(lines) == 5
    for place, functions in lines:
        files = [ROOT / "sparse_attn" / place] if place.endswith(".py") else (ROOT / "sparse_attn" / place).glob("*.py")
        code = "".join(file.read_text("utf-8") for file in files)
        for name in re.findall(r"\w+\b(?!\.)", functions.partition("(")[0]):
            assert f"def {name}(" in code or f"import {name}\n" in code, f"{place}: {name}"
