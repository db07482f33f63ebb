"""Packages import only packages below them; the contracts of import-linter in pyproject.toml define the order."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_packages_import_only_lower_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cli = pytest.importorskip("importlinter.cli")
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    failed = cli.lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True)
    assert failed == 0, capsys.readouterr().out
