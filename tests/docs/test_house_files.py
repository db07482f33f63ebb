"""Files that people and programs expect at the top of a repository."""

from __future__ import annotations

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
