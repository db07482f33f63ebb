"""The Python code of README, three pages and the how-to guides runs; shown values, commands and links are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/alpha.md", "docs/migrating.md", "docs/operators.md"]
HOW_TO = sorted(f"docs/howto/{file.name}" for file in (ROOT / "docs" / "howto").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


# Warnings of torch itself, when it compiles or exports.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("page", [*PAGES, *HOW_TO])
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some blocks write files
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4 or page not in PAGES
    for block in blocks:
        exec(compile(block, page, "exec"), names)
        for call, count in re.findall(r"^(.*\S)  # tensor\((\d+)\)$", block, re.MULTILINE):
            assert eval(call, names) == int(count), call


def test_values_in_the_readme_are_those_of_the_operators():
    import sparse_attn

    names: dict[str, object] = {**vars(sparse_attn), "x": torch.tensor([-2.0, 0.0, 0.5])}
    lines = re.findall(r"^(\w+\(x.*?\))\s+# tensor\((\[.*?\])\)", README, re.MULTILINE)
    assert len(lines) >= 4
    for call, values in lines:
        torch.testing.assert_close(eval(call, names), torch.tensor(eval(values)), atol=5e-5, rtol=0)


def test_commands_that_install_train_and_test_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(BIN)/sparse-attn train" in makefile and ".venv/bin/sparse-attn train" in README
    assert "$(BIN)/python -m pytest -n 2" in makefile and ".venv/bin/python -m pytest -n 2" in README
    for extra in ("recipes", "dev"):
        assert f'--editable ".[{extra}]"' in makefile
        assert f'-m pip install --constraint constraints.txt --editable ".[{extra}]"' in README


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")), *HOW_TO]
)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target
