"""The modules that an import or a command loads, the requirements of the package, and what its C library needs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import recipes
import sparse_attn
from recipes.cli import COMMANDS

# Imports every module of the given packages, then prints the top-level names of all loaded modules.
LOAD = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), name + "."):
        importlib.import_module(found.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded_by(*names: str) -> set[str]:
    command = [sys.executable, "-c", LOAD, *names]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_core_loads_no_package_of_the_extras():
    loaded = loaded_by("sparse_attn")
    assert {"sparse_attn", "torch"} <= loaded
    assert not loaded & {"lightning", "hydra", "omegaconf", "transformers", "matplotlib", "rich", "recipes"}


def modules_after(code: str, *arguments: str) -> set[str]:
    """Names of all modules that are loaded after the code has run in a separate process."""
    code += "\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-c", code, *arguments]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1].split())


def test_import_loads_neither_dynamo_nor_sympy_nor_triton():
    loaded = modules_after("import sparse_attn; sparse_attn.sparsemax")
    assert "sparse_attn.ops.entmax" in loaded
    assert not loaded & {"torch._dynamo", "sympy", "triton"}


def test_import_loads_nothing_but_torch_and_einops():
    added = modules_after("import sparse_attn") - modules_after("import torch")
    outside = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert outside == {"sparse_attn", "einops"}


HELP = """
import sys
sys.argv = ["sparse-attn", *sys.argv[1:]]
from sparse_attn.recipes.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize("command", [["-h"], ["--version"], *([name, "-h"] for name in COMMANDS)], ids=" ".join)
def test_help_and_version_load_no_torch(command):
    assert not modules_after(HELP, *command) & {"torch", "lightning", "numpy", "matplotlib"}


def test_public_names_are_available_inside_the_command():
    code = 'import sys; sys.argv = ["/bin/sparse-attn"]; import sparse_attn; assert "torch" not in sys.modules'
    loaded = modules_after(f"{code}; from sparse_attn import alpha_per_head, nn; assert not hasattr(sparse_attn, 'x')")
    assert "torch" in loaded


def test_recipes_are_imported_from_the_package_despite_other_packages_of_that_name(tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("raise ImportError('the recipes of another project')")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from sparse_attn.recipes import build, callbacks
from sparse_attn.recipes.callbacks.alpha_schedule import AlphaSchedule
assert build.get_class(build.located("recipes.callbacks.alpha_schedule.AlphaSchedule")) is AlphaSchedule
"""
    assert "recipes" not in modules_after(code, str(tmp_path))


def test_transformer_and_decoding_load_no_package_of_the_extras():
    loaded = loaded_by("recipes.seq2seq.model", "recipes.seq2seq.decode")
    assert not loaded & {"lightning", "hydra", "omegaconf", "matplotlib", "rich"}


def test_core_requires_torch_and_einops_only():
    requirements = metadata.requires("sparse-attn") or []
    core = {line.partition(">=")[0] for line in requirements if "extra ==" not in line}
    assert core == {"torch", "einops"}


@pytest.mark.parametrize("package", [sparse_attn, recipes])
def test_packages_are_typed(package):
    assert package.__file__ is not None
    assert Path(package.__file__).with_name("py.typed").is_file()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="symbols have versions only on Linux")
def test_kernels_need_no_symbol_newer_than_glibc_2_17():
    library = Path(sparse_attn.__file__).parent / "kernels" / "cpu" / "rows.shared"
    if not library.is_file():
        pytest.skip("no compiled kernels")
    versions = {tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    assert max(versions, default=(0, 0)) <= (2, 17)
