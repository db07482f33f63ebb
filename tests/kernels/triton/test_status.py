"""Devices that cannot run the kernels are refused with a reason. If a kernel fails, plain torch computes instead.

Also tested: tiles for less shared memory, and a large α in float16.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from sparse_attn import entmax, entmax_attention
from sparse_attn.kernels import dispatch, triton
from sparse_attn.kernels.triton import launch, rows
from sparse_attn.kernels.triton.attention import backward, forward, plan


def status_of(monkeypatch, capability=(9, 0), hip=None):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(torch.version, "hip", hip)
    triton._of_this_machine.cache_clear()
    try:
        return triton.status()
    finally:
        triton._of_this_machine.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_devices_for_which_the_kernels_compile(capability, monkeypatch):
    assert status_of(monkeypatch, capability) == (True, "CUDA tensors: a device")


def test_other_devices_are_refused_with_a_reason(monkeypatch):
    assert status_of(monkeypatch, (7, 5)) == (False, "compute capability 8.0 or newer is needed, got 7.5")
    available, why = status_of(monkeypatch, hip="6.4")
    assert not available and why.endswith("got ROCm")
    for major in triton.REFUSED:
        available, why = status_of(monkeypatch, (major, 3))
        assert not available and why.endswith(f"for compute capability {major}.3")


@pytest.fixture
def failing(monkeypatch):
    """Kernels whose names are in the set fail as if Triton could not compile them; the backend is not forced."""
    names: set[str] = set()
    monkeypatch.setattr(triton, "_failure", None)
    monkeypatch.setattr(dispatch, "_triton_computes", lambda device: triton.status()[0])
    monkeypatch.setattr(dispatch, "c_computes", lambda device: False)
    dispatch._warn_once.cache_clear()

    def start(kernel, *arguments, **options):
        if kernel.__name__ in names:
            raise triton.KernelError(f"the kernel {kernel.__name__} failed: RuntimeError: PassManager::run failed")
        return launch.launch(kernel, *arguments, **options)

    for module in (rows, forward, backward):
        monkeypatch.setattr(module, "launch", start)
    token = dispatch._forced.set(None)
    yield names
    dispatch._forced.reset(token)


def results(device, function):
    inputs = [torch.randn(1, 2, 5, 7, device=device, requires_grad=True) for _ in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = function(*inputs)
        upstream = torch.randn_like(output)
        got = (output, *torch.autograd.grad(output, inputs, upstream, allow_unused=True))
        function(*inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = function(*wide)
    for x, y in zip(
        got, (wanted, *torch.autograd.grad(wanted, wide, upstream.double(), allow_unused=True)), strict=True
    ):
        if y is not None:
            torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)
    return [str(warning.message) for warning in caught if "plain torch" in str(warning.message)]


@pytest.mark.parametrize("name", ["forward_short", "backward_queries", "backward_keys"])
def test_if_a_kernel_fails_attention_is_computed_by_torch_with_one_warning(name, device, failing):
    failing.add(name)
    said = results(device, lambda *x: entmax_attention(*x, 1.3))
    assert len(said) == 1 and f"the kernel {name} failed" in said[0]
    assert triton.status() == (False, f"the kernel {name} failed: RuntimeError: PassManager::run failed")


@pytest.mark.parametrize("name", ["forward_on_chip", "backward_on_chip"])
def test_if_a_kernel_fails_operators_are_computed_by_torch_with_one_warning(name, device, failing):
    failing.add(name)
    said = results(device, lambda x, *rest: entmax(x, 1.3))
    assert len(said) == 1 and f"the kernel {name} failed" in said[0]


def test_a_forced_backend_raises_the_error_of_a_kernel(device, failing):
    failing.add("forward_short")
    token = dispatch._forced.set("triton")
    try:
        with pytest.raises(triton.KernelError, match="forward_short failed"):
            entmax_attention(*(torch.randn(1, 2, 5, 7, device=device) for _ in range(3)))
    finally:
        dispatch._forced.reset(token)
    assert triton.status()[0]


def test_errors_of_triton_become_a_kernel_error_and_errors_of_cuda_are_raised_unchanged(monkeypatch):
    def failing_with(error):
        def start(*arguments, **options):
            raise error

        monkeypatch.setattr(launch, "interpreted", lambda: False)
        return type("Kernel", (), {"__name__": "forward_long", "__getitem__": lambda self, grid: start})()

    x = torch.zeros(1)
    with pytest.raises(triton.KernelError, match=r"the kernel forward_long failed: IndexError: map::at$"):
        launch.launch(failing_with(IndexError("map::at\nand more")), 1, x)
    with pytest.raises(RuntimeError, match=r"^Triton Error \[CUDA\]: an illegal memory access"):
        launch.launch(failing_with(RuntimeError("Triton Error [CUDA]: an illegal memory access")), 1, x)
    with pytest.raises(torch.OutOfMemoryError):
        launch.launch(failing_with(torch.OutOfMemoryError("no memory")), 1, x)


def test_plans_have_smaller_tiles_for_devices_with_less_shared_memory(monkeypatch):
    x = torch.zeros(1, 1, 1, 256, dtype=torch.bfloat16)
    plans = []
    for size in (99, 163, 227):
        monkeypatch.setattr(plan, "shared_memory", lambda device, size=size: size * 1024)
        plans.append(plan.Plan.of(x, x))
    assert plans[0].block_m * plans[0].block_n < plans[1].block_m * plans[1].block_n and plans[1] == plans[2]


def test_a_large_alpha_in_float16_is_computed_in_float32(device):
    inputs = [torch.randn(1, 2, 13, 19, device=device).half().requires_grad_() for _ in range(3)]
    output = entmax_attention(*inputs, 9.0)
    upstream = torch.randn_like(output)
    got = (output, *torch.autograd.grad(output, inputs, upstream))
    wide = [x.detach().float().requires_grad_() for x in inputs]
    wanted = entmax_attention(*wide, 9.0)
    for x, y in zip(got, (wanted, *torch.autograd.grad(wanted, wide, upstream.float())), strict=True):
        assert x.dtype == torch.float16
        torch.testing.assert_close(x, y.half(), atol=0, rtol=1e-3)
