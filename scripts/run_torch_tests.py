"""Run our functions and layers at α = 1 with torch's test samples and tests, and print the differences.

    python scripts/run_torch_tests.py                            the samples (OpInfo), which come with torch
    python scripts/run_torch_tests.py FILE ... [-k EXPRESSION]   files of tests, from a checkout of torch

Both commands need the package expecttest. For samples, outputs and gradients are compared with those of torch's
function, in float64. Samples with dropout cannot agree, because our functions draw other random numbers: these samples
are counted separately. Every other difference gives the exit status 1.

FILE is a test file of the installed version of torch, for example ``test/nn/test_multihead_attention.py``,
``test/test_transformers.py``, and ``test/test_nn.py`` with ``-k "softmax or cross_entropy"``, which selects tests as in
pytest. Each file runs twice: with torch's functions, and with our functions under torch's names. Tests that fail only
with ours are printed. They do not change the exit status, because our functions may raise other exceptions and lack
the fast path of torch's layers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, entmax, entmax_attention, entmax_loss

_DROPOUT = "dropout draws other random numbers"


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Our function in place of ``torch.softmax``. With ``dtype``, the scores are converted first."""
    return entmax(x if dtype is None else x.to(dtype), 1.0, dim)


def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Our function in place of ``scaled_dot_product_attention``."""
    return entmax_attention(query, key, value, 1.0, *args, **kwargs)


def cross_entropy(x: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    """Our function in place of ``torch.nn.functional.cross_entropy``."""
    return entmax_loss(x, target, 1.0, **kwargs)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "nn.functional.scaled_dot_product_attention": (F.scaled_dot_product_attention, attention),
    "nn.functional.cross_entropy": (F.cross_entropy, cross_entropy),
    "softmax": (torch.softmax, softmax),
}


def results(function: Callable[..., Tensor], sample: Any) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input, with the random numbers of one seed."""
    torch.manual_seed(0)
    x = sample.input.detach().requires_grad_()
    output = function(x, *sample.args, **sample.kwargs)
    return output.detach(), torch.autograd.grad(output, x, torch.ones_like(output))[0]


def difference(torchs: Callable[..., Tensor], ours: Callable[..., Tensor], sample: Any) -> str | None:
    """A short description of a difference between our result and torch's; None if they agree."""
    expected = results(torchs, sample)
    try:
        torch.testing.assert_close(results(ours, sample), expected, equal_nan=True)
    except AssertionError:
        dropout = sample.kwargs.get("dropout_p", 0.0) > 0
        return _DROPOUT if dropout else "another result"
    except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def compare_samples() -> bool:
    """Whether all samples agree; prints one line per function, followed by one line per kind of difference."""
    from torch.testing._internal.common_methods_invocations import op_db

    agree = True
    for info in op_db:
        if info.name not in FUNCTIONS:
            continue
        samples = list(info.sample_inputs("cpu", torch.float64, requires_grad=False))
        kinds = Counter(difference(*FUNCTIONS[info.name], sample) for sample in samples)
        print(f"{info.full_name}: {kinds.pop(None, 0)} of {len(samples)} samples agree")
        for kind, count in kinds.most_common():
            print(f"    {count:3}  {kind}")
        agree &= not kinds.keys() - {_DROPOUT}
    return agree


class MultiheadAttention(AdaptiveSparseMultiheadAttention):
    """Our layer in place of ``nn.MultiheadAttention``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, alpha_init=1.0, learn_alpha=False, **kwargs)


def softmax_of_nn(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """Our function in place of ``torch.nn.functional.softmax``."""
    return softmax(x, F._get_softmax_dim("softmax", x.dim(), _stacklevel) if dim is None else dim, dtype)


def replace_names() -> None:
    """Replace torch's functions and layer by ours, under the names that torch's tests and modules use."""
    for module in (nn, nn.modules, nn.modules.activation, nn.modules.transformer):
        module.MultiheadAttention = MultiheadAttention  # type: ignore[misc, attr-defined]
    F.scaled_dot_product_attention = attention
    F.softmax = softmax_of_nn
    F.cross_entropy = cross_entropy


class Outcomes:
    """A plugin for pytest that stores the outcome of every test."""

    def __init__(self) -> None:
        self.failures: dict[str, str | None] = {}  # test -> its message if it failed, None if it passed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Stores the outcome of a phase of a test."""
        if report.failed:
            self.failures[report.nodeid] = message_of(report)
        elif report.passed and report.when == "call":
            self.failures.setdefault(report.nodeid, None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Stores an error while a file or class was read."""
        if report.failed:
            self.failures[report.nodeid] = message_of(report)


def message_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error of a failed test or file in one line, without the advice that torch's tests add."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr).rpartition("\n")[2]
    return " ".join(text.partition("To execute this test")[0].split())[:150]


def run_file(file: Path, keywords: str, ours: bool) -> dict[str, str | None]:
    """The failures of the tests in a file, with our functions or with torch's."""
    if ours:
        replace_names()
    outcomes = Outcomes()
    options = [
        "-p",
        "no:terminal",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-c",
        os.devnull,
        f"--rootdir={file.parent}",
    ]
    pytest.main([*options, "-k", keywords, str(file)], plugins=[outcomes])
    return outcomes.failures


def compare_file(file: Path, keywords: str) -> None:
    """Print how many of the tests that pass with torch's functions pass with ours, and list the failures."""

    def run(ours: bool) -> dict[str, str | None]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(run_file, file, keywords, ours).result()

    theirs, ours = run(ours=False), run(ours=True)
    passed = [name for name, failure in theirs.items() if failure is None]
    if not passed:
        reason = next(iter(theirs.values()), "no test is selected")
        sys.exit(f"{file} must have a test that passes with torch {torch.__version__}: {reason}")
    failed = {name: ours.get(name, "not run") for name in passed if ours.get(name, "") is not None}
    print(
        f"{file.name}: {len(passed) - len(failed)} of {len(passed)} tests that pass with torch's names pass with ours"
    )
    for name, failure in failed.items():
        print(f"    {name.rpartition('::')[2]}: {failure}")


def main() -> int:
    """Compare samples or files; the exit status is 1 if a sample differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("-k", dest="keywords", default="", metavar="EXPRESSION")
    arguments = parser.parse_args()
    for file in arguments.files:
        if not file.is_file():
            parser.error(f"FILE must be a file of torch's tests, got {file}")
    for file in arguments.files:
        compare_file(file.resolve(), arguments.keywords)
    return 0 if arguments.files or compare_samples() else 1


if __name__ == "__main__":
    sys.exit(main())
