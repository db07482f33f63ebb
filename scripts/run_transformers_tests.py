"""Run transformers' own model tests with "entmax" at α = 1 and with "sdpa", and print what fails with ours alone.

    python scripts/run_transformers_tests.py CHECKOUT                       eight families of models
    python scripts/run_transformers_tests.py CHECKOUT llama t5 -k generate  some of them, selected as in pytest

CHECKOUT is a checkout of transformers at the tag of the installed version: neither its wheel nor its source
distribution contains the tests of the models (`tests/models`), so this script cannot fetch them. Without CHECKOUT it
prints the tag. The tests need the extra hf, and datasets, parameterized, Pillow and timeout-decorator.

Every model whose class supports `scaled_dot_product_attention` gets the tested implementation in place of "sdpa" and
"eager". Tests with "eager" in their names compare with "eager": in these tests, models that ask for "eager" keep it. A
test that checks that the name is "sdpa" fails with ours, because the name is then "entmax".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers

FAMILIES = ("bert", "gpt2", "llama", "mistral", "t5", "bart", "vit", "gemma3")
_NAME, _RESULTS = "SPARSE_ATTN_TESTED", "SPARSE_ATTN_RESULTS"


class Replaced:
    """The plugin of pytest in a run: it gives models the tested implementation, and notes the outcome of each test."""

    def __init__(self, name: str, file: Path) -> None:
        from sparse_attn.integrations.huggingface import register

        register("entmax", alpha=1.0)
        self.name, self.file, self.outcomes = name, file, dict[str, str]()
        self.keeps_eager = False
        original = transformers.PreTrainedModel.get_correct_attn_implementation

        def replaced(model: Any, requested: str | None, is_init_check: bool = False) -> str:
            chosen: str = original(model, requested, is_init_check)
            if chosen == "sdpa" or (chosen == "eager" and model._supports_sdpa and not self.keeps_eager):
                return self.name
            return chosen

        transformers.PreTrainedModel.get_correct_attn_implementation = replaced

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Notes whether the test compares with the implementation "eager", which models then keep."""
        self.keeps_eager = "eager" in item.name

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the worst outcome of the phases of a test."""
        counts = report.when == "call" or report.outcome != "passed"
        if counts and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        """Writes the outcomes for the process that has started this one."""
        self.file.write_text(json.dumps(self.outcomes), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Begins a run, in which pytest imports this file as a plugin."""
    if _NAME in os.environ:
        config.pluginmanager.register(Replaced(os.environ[_NAME], Path(os.environ[_RESULTS])))


def outcomes(checkout: Path, family: str, name: str, options: list[str]) -> dict[str, str]:
    """The outcome of every test of a family of models, run with the implementation ``name``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "outcomes.json")
        paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {_NAME: name, _RESULTS: str(file), "PYTHONPATH": os.pathsep.join(paths)}
        test = f"tests/models/{family}/test_modeling_{family}.py"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            Path(__file__).stem,
            "-p",
            "no:cacheprovider",
            "--disable-warnings",
        ]
        done = subprocess.run(
            [*command, "--rootdir=.", "-c", os.devnull, test, *options],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        if not file.exists():
            raise RuntimeError(f"pytest did not run {test}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest stopped in {test}:\n{done.stdout[-3000:]}")
        return found


def checked(checkout: Path | None, families: list[str]) -> Path:
    """The checkout, if it has the tests of the installed version; otherwise ends with a message on what is missing."""
    version = transformers.__version__
    how = f"clone github.com/huggingface/transformers at the tag v{version} and give its folder"
    if checkout is None:
        sys.exit(f"the distributions of transformers {version} contain no tests of models: {how}")
    missing = [name for name in families if not (checkout / "tests" / "models" / name).is_dir()]
    if missing:
        sys.exit(f"{checkout} must have tests/models/{missing[0]}: {how}")
    setup = checkout / "setup.py"
    if setup.is_file() and f'version="{version}"' not in setup.read_text(encoding="utf-8"):
        sys.exit(f"{checkout} must be transformers {version}, which is installed: {how}")
    return checkout


def main() -> int:
    """Runs every family twice and prints a line for each; the exit status is 1 if a test fails with ours alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("-k", dest="expression", help="selects tests, as in pytest")
    given = parser.parse_args()
    checkout = checked(given.checkout, given.families)
    options = [] if given.expression is None else ["-k", given.expression]
    ours_alone: list[str] = []
    for family in given.families:
        runs = {name: outcomes(checkout, family, name, options) for name in ("entmax", "sdpa")}
        counts = {name: list(run.values()) for name, run in runs.items()}
        line = "; ".join(f"{name} {c.count('passed')} passed, {c.count('failed')} failed" for name, c in counts.items())
        print(f"{family:<10} {line}", flush=True)
        ours_alone += [
            test for test, how in runs["entmax"].items() if how == "failed" and runs["sdpa"].get(test) != "failed"
        ]
    print(f"\n{len(ours_alone)} fail with ours alone", *ours_alone, sep="\n  ")
    return 1 if ours_alone else 0


if __name__ == "__main__":
    sys.exit(main())
