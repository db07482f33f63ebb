"""The build hook of hatchling: compiles the C kernels and adds them to the wheel, or builds a wheel without them.

A wheel with the library is tagged ``py3-none-<platform>``, since the library works with every Python version. On Linux
the platform is the oldest manylinux tag that has the glibc symbols of the library. Without a compiler the wheel is
pure Python, and plain torch computes CPU tensors.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_KERNELS = "sparse_attn/kernels/cpu"


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the compiled library beside its sources in an editable installation, and into the wheel otherwise."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library, and tells hatchling where it is."""
        if self.target_name != "wheel":
            return
        sources = Path(self.root, _KERNELS)
        self._folder = tempfile.TemporaryDirectory()
        editable = version == "editable"
        compiler = _module(sources / "build.py")
        try:
            library = compiler.build(sources if editable else self._folder.name)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip() or type(error).__name__
            message = (
                f"sparse-attn: the C kernels were not compiled, plain torch is used instead: {reason.splitlines()[0]}"
            )
            print(message, file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag(compiler.target(), library)}"
        if not editable:
            build_data["force_include"][str(library)] = f"{_KERNELS}/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the temporary folder, whose library the wheel now contains."""
        if self.target_name == "wheel":
            self._folder.cleanup()


def _module(path: Path) -> ModuleType:
    """Import a module from its path. The package cannot be imported in a build, where torch is not installed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform_tag(target: str, library: Path) -> str:
    """The platform of a wheel.

    Args:
        target: The target triplet of the compiler, such as ``x86_64-linux-gnu``.
        library: The compiled library.
    """
    versions = {tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    if "linux" in target and versions:
        # 2.17 is the oldest glibc version with a manylinux tag for every architecture.
        return "manylinux_{}_{}_{}".format(*max(versions | {(2, 17)}), target.partition("-")[0])
    # A universal2 Python supports two processor types, but the library is compiled only for this machine's type.
    tag = sysconfig.get_platform().replace("universal2", platform.machine())
    return tag.replace("-", "_").replace(".", "_")
