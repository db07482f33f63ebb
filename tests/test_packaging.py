"""What the package promises to whoever installs or imports it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import recipes
import sparse_attn

# Imports every module of a package, then prints the top-level names of all that was loaded by it.
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


def test_core_loads_no_framework():
    loaded = loaded_by("sparse_attn")
    assert {"sparse_attn", "torch"} <= loaded
    assert not loaded & {"lightning", "hydra", "omegaconf", "transformers", "matplotlib", "rich", "recipes"}


def test_transformer_is_plain_torch():
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
