"""The build hook of hatchling: compiles the kernels in C into the wheel, or goes on without them.

A wheel with the library is tagged ``py3-none-<platform>``, since the library knows nothing of Python; on Linux the
platform is the manylinux that the library's symbols allow. Without a compiler the wheel is pure, and the operators run
in torch alone.
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
    """An editable installation finds the library beside its sources; a wheel carries it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell hatchling where the library is."""
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
            print(f"sparse-attn: no compiled kernels, torch will do: {reason.splitlines()[0]}", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag(compiler.target(), library)}"
        if not editable:
            build_data["force_include"][str(library)] = f"{_KERNELS}/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled library, which the wheel holds by now."""
        if self.target_name == "wheel":
            self._folder.cleanup()


def _module(path: Path) -> ModuleType:
    """A module by its path: the package itself needs torch, which a build does not have."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform_tag(target: str, library: Path) -> str:
    """The platform of a wheel.

    Args:
        target: What the compiler says it compiles for, such as ``x86_64-linux-gnu``.
        library: The compiled library.
    """
    versions = {tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    if "linux" in target and versions:
        # 2.17 is the oldest glibc with a manylinux name on every machine.
        return "manylinux_{}_{}_{}".format(*max(versions | {(2, 17)}), target.partition("-")[0])
    # Python may be built for two kinds of Mac at once; the compiler is asked for the one it runs on.
    tag = sysconfig.get_platform().replace("universal2", platform.machine())
    return tag.replace("-", "_").replace(".", "_")
