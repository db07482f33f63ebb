"""The compiled library: threads, fork and variants, and the errors if memory or the library is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from c_rows import forward, needs_library

from sparse_attn.kernels.cpu import rows

pytestmark = needs_library


def test_results_do_not_depend_on_threads():
    x, grad = torch.randn(37, 8, 1021), torch.randn(37, 8, 1021)
    a = torch.linspace(0, 1, 8).view(8, 1)
    alone = forward(x, a), *rows.entmax_backward(forward(x, a), a, grad, True)
    try:
        torch.set_num_threads(3)
        assert "3 threads" in rows.status()[1]
        together = forward(x, a), *rows.entmax_backward(forward(x, a), a, grad, True)
        with ThreadPoolExecutor(4) as pool:  # ctypes releases the interpreter lock
            others = list(pool.map(lambda _: forward(x, a), range(8)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert all(torch.equal(other, alone[0]) for other in others)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_kernels_work_in_a_fork_after_a_call_with_threads():
    script = """
        import os, torch
        from sparse_attn.kernels.cpu import rows
        torch.set_num_threads(2)
        x = torch.randn(512, 512)
        p = rows.entmax_forward(x, 0.5, -3e38)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(rows.entmax_forward(x, 0.5, -3e38), p) else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, timeout=120)


def test_variants_and_status():
    names = rows.variants()
    assert names[0] == "baseline" and rows.status() == (True, f"{names[-1]}, 1 thread")
    with pytest.raises(KeyError):
        forward(torch.randn(3), 1.0, variant="mmx")


def test_not_enough_memory_raises_an_error(monkeypatch):
    out_of_memory = rows.library()._replace(forward=lambda *_: 1, backward=lambda *_: 1)
    monkeypatch.setattr(rows, "_load", lambda: out_of_memory)
    with pytest.raises(MemoryError):
        forward(torch.randn(3), 1.0)
    with pytest.raises(MemoryError):
        rows.entmax_backward(torch.ones(1), 1.0, torch.ones(1))


def test_a_missing_or_broken_library_is_reported_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "rows.py"))
    assert "no compiled library" in rows._load.__wrapped__()
    (tmp_path / rows.LIBRARY).write_bytes(b"not a library")
    assert "cannot be loaded" in rows._load.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(rows, "_INTERFACE", -1)
    assert "another version" in rows._load.__wrapped__()
    monkeypatch.setattr(rows, "_load", lambda: "there is none")
    assert rows.status() == (False, "there is none") and rows.variants() == []
    with pytest.raises(RuntimeError, match="there is none"):
        forward(torch.randn(3), 1.0)
