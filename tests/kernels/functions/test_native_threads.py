"""Attention in C with several threads, called from several threads, and called after a fork."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from c_rows import needs_library
from native_attention import run, tensors
from torch import Tensor

from sparse_attn import entmax_attention

pytestmark = needs_library


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = [x.requires_grad_() for x in tensors(torch.float32, 301, 307, heads=2, kv_heads=1)]
    bias = torch.randn(307, requires_grad=True)
    alpha = torch.tensor([1.5, 1.2], requires_grad=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for mask in (None, bias):
            attend = lambda q, k, v, a, *m: entmax_attention(q, k, v, a, *m, enable_gqa=True)  # noqa: E731
            results.append(run(attend, [*inputs, alpha, *([] if mask is None else [mask])]))
    torch.set_num_threads(before)
    for one, three in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))


def test_calls_from_several_threads():
    inputs = tensors(torch.float32, 129, 131)
    expected = entmax_attention(*inputs)
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(entmax_attention(*inputs))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and all(torch.equal(x, expected) for x in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_attention_works_after_a_fork():
    inputs = tensors(torch.float32)
    expected = entmax_attention(*inputs)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(entmax_attention(*inputs), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
