from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_attn
from sparse_attn import versions


def imported(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A finished process that has run ``code``, with ``path`` first on its search path."""
    places = [str(path)] if path else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*places, str(Path(sparse_attn.__file__).parents[1])])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def last_line(code: str, *, path: Path | None = None) -> str:
    run = imported(code, path=path)
    assert run.returncode, run.stdout
    return run.stderr.splitlines()[-1]


def test_an_old_torch_gives_a_one_line_error(tmp_path):
    (tmp_path / "torch.py").write_text('__version__ = "2.5.1+cu124"\n')
    line = last_line("import sparse_attn", path=tmp_path)
    assert line == "ImportError: sparse_attn needs torch 2.6 or newer, got 2.5.1+cu124"


def test_an_old_python_gives_a_one_line_error():
    line = last_line("import sys; sys.version_info, sys.version = (3, 9, 18), '3.9.18 (main)'; import sparse_attn")
    assert line == "ImportError: sparse_attn needs Python 3.10 or newer, got 3.9.18"


@pytest.mark.parametrize(
    ("found", "problem"), [("3.3.1", "Triton 3.4 or newer is needed, got 3.3.1"), ("3.11.0", None)]
)
def test_an_old_triton_gives_a_warning_and_a_new_one_none(tmp_path, found, problem):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    (tmp_path / f"triton-{found}.dist-info").mkdir()
    (tmp_path / f"triton-{found}.dist-info" / "METADATA").write_text(f"Name: triton\nVersion: {found}\n")
    code = "import torch; torch.cuda.device_count = lambda: 1; from sparse_attn import versions; "
    run = imported(code + "print(versions.triton_problem())", path=tmp_path)
    assert run.stdout == f"{problem}\n", run.stderr
    assert (f"UserWarning: the GPU kernels of sparse_attn are not used: {problem}" in run.stderr) == (
        problem is not None
    )


def test_an_old_transformers_gives_a_one_line_error(monkeypatch):
    monkeypatch.setattr("sparse_attn.versions.metadata.version", lambda name: "5.15.1")
    with pytest.raises(ImportError, match=r"^sparse_attn needs transformers 5\.16 or newer, got 5\.15\.1$"):
        versions.check_transformers()


def test_only_one_file_of_the_package_checks_versions():
    package = Path(sparse_attn.__file__).parent
    asking = re.compile(r"(torch|triton|sys)\.(__version__|version_info|torch_version)|parse_version")
    found = {file.name for file in package.rglob("*.py") if asking.search(file.read_text(encoding="utf-8"))}
    assert found == {"versions.py"}


class Exporting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if versions.is_exporting() else x - 1


def test_compiling_does_not_count_as_exporting():
    torch._dynamo.reset()
    assert torch.compile(Exporting(), backend="eager", fullgraph=True)(torch.zeros(2)).tolist() == [-1, -1]
    assert Exporting()(torch.zeros(2)).tolist() == [-1, -1]


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_counts_as_exporting(strict):
    program = torch.export.export(Exporting(), (torch.zeros(2),), strict=strict)
    assert program.module()(torch.zeros(2)).tolist() == [1, 1]


def test_a_device_without_autocast_has_none_enabled():
    assert not versions.autocast_enabled(torch.device("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert versions.autocast_enabled(torch.device("cpu"))


def test_compiled_code_finds_out_whether_autocast_is_enabled():
    torch._dynamo.reset()
    ask = torch.compile(lambda x: x + versions.autocast_enabled(x.device), backend="eager", fullgraph=True)
    assert ask(torch.zeros(1)).item() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ask(torch.zeros(1)).item() == 1
