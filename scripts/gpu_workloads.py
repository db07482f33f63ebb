"""How `gpu_check.py` runs each of its workloads: the tensors, the call, the other packages, and the stopwatch.

Without a device (a dry run) the same calls run in Triton's interpreter on tensors of a few rows. Their times mean
nothing, but an error in a call shows.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import entmax, entmax_attention, entmax_loss, topk_softmax
from sparse_attn.kernels import triton
from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import plan as plans
from sparse_attn.kernels.triton.attention.plan import Plan

Measured = dict[str, Any]
Run = Callable[[], object]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Planner = Callable[[Tensor, Tensor], Plan]

FORWARD, BACKWARD, BOTH, REPLAY = "forward", "backward", "forward + backward", "forward + backward, graph replay"
FIXED, LEARNT, FLASH, V2 = "ours, α 1.5", "ours, α learnt", "flash attention", "adasplash_v2"
# How strongly a vector depends on its position. With these numbers about 49, 36 and 25 % of the tiles under the causal
# mask have weight at a length of 4k, 16k and 64k, as in the figure that AdaSplash-2 publishes. With LOCAL, 7, 3 and
# 1.5 % have weight.
PUBLISHED = {4096: 1.56, 16384: 1.42, 65536: 1.3}
LOCAL = 2.5
# For each autotuner of another package. One configuration compiles in 13 s at 4k keys, 30 s at 16k and 210 s at 64k.
_PEER_CONFIGURATIONS = 2


def sized(length: int, smallest: int = 16) -> int:
    """A length, or in a dry run a short one, so that the interpreter takes seconds."""
    return max(length // 2048, smallest) if triton.interpreted() else length


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(run: Run) -> Measured:
    """The median time of a call, between device events, after a warm-up, and the memory it needs."""
    result = run()
    if isinstance(result, dict):  # the call has measured its own parts
        return result
    run()
    if not torch.cuda.is_available():
        return {"seconds": elapsed(run), "bytes": 1}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = elapsed(run)
    peak = torch.cuda.max_memory_allocated() - before
    times = [elapsed(run) for _ in range(min(max(int(0.3 / first), 5), 30))]
    return {"seconds": statistics.median(times), "bytes": peak}


def elapsed(run: Run) -> float:
    """Seconds of one call."""
    with stopwatch() as seconds:
        run()
    return seconds()


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Time of a block on the device, between two events; in a dry run, its wall-clock time."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        yield lambda: time.perf_counter() - began
        return
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()

    def seconds() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    yield seconds
    end.record()


def row_operator(size: int, dtype: torch.dtype, what: str, step: str, device: torch.device) -> Run:
    """One pass of one operator."""
    entries, size = (2**26, size) if not triton.interpreted() else (2**8, sized(size))
    x = torch.randn(entries // size, size, device=device, dtype=dtype, requires_grad=step == BACKWARD)
    alpha = 1 + torch.rand(len(x), 1, device=device)
    inputs = [x]
    if what == "α per row":
        inputs.append(alpha.requires_grad_(step == BACKWARD))

    def apply() -> Tensor:
        if what == "copy":
            return x.clone()
        if what == "entmax package, 1.5":
            import entmax as peer

            return peer.entmax15(x, -1)
        if what == "top-32 softmax":
            return topk_softmax(x, min(32, size))
        if what == "softmax":
            return x.softmax(-1)
        return entmax(x, {"sparsemax": 2.0, "1.5-entmax": 1.5, "α per row": alpha}[what])

    if step == FORWARD:
        return apply
    output, upstream = apply(), torch.randn_like(x)
    return partial(torch.autograd.grad, output, inputs, upstream, retain_graph=True)


def loss(size: int, what: str, device: torch.device) -> Run:
    """A loss and its gradient, in bfloat16."""
    tokens, size = sized(4096, 2), sized(size)
    x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(size, (tokens,), device=device)
    function = F.cross_entropy if what == "cross-entropy" else entmax_loss
    return lambda: torch.autograd.grad(function(x, target), x)


def local_heads(length: int, device: torch.device, local: float = LOCAL) -> list[Tensor]:
    """Query, key and value in bfloat16 whose scores fall off with the distance: blocks far away have no weight."""
    batch, heads = max(1, 16384 // length), 16 if length <= 16384 else 4
    if triton.interpreted():
        batch, heads, length = 1, 1, sized(length)
    base = torch.randn(2, batch, heads, length, 64, device=device) * 0.5
    angle = torch.arange(length, device=device)[:, None] / 2.0 ** torch.arange(5, 13, device=device)
    base[..., :16] += local * torch.cat([angle.cos(), angle.sin()], -1)
    query, key = base.bfloat16().unbind()
    return [query, key, torch.randn_like(key)]


def attend(queries: int, keys: int, causal: bool, what: str, step: str, local: float, device: torch.device) -> Run:
    """The forward, or forward and backward, of one attention function."""
    query, key, value = local_heads(keys, device, local)
    inputs = [query[:, :, :: keys // queries].contiguous(), key, value]
    learnt = torch.full((query.shape[1],), 1.5, device=device)
    function = attending(what, causal, learnt)
    if step == FORWARD:
        return partial(torch.no_grad()(function), *inputs)
    for x in (*inputs, learnt):
        x.requires_grad_()
    wanted = [*inputs, learnt] if what == LEARNT else inputs
    upstream = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(function(*inputs), wanted, upstream)


def replayed(length: int, what: str, device: torch.device) -> Run:
    """A training step captured as a CUDA graph: for few keys, launches by the host take longer than the kernels."""
    run = attend(length, length, True, what, BOTH, LOCAL, device)
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def plan_of(tile: tuple[int, int, int], stages: int = 2) -> Planner:
    """A plan for heads of 64 in place of ``Plan.of``."""
    return lambda query, value: Plan(tile[0], tile[1], 64, 64, tile[2], stages)


@contextlib.contextmanager
def planned(planner: Planner) -> Iterator[None]:
    """Within the context, attention uses the tiles of a planner."""
    of, Plan.of = Plan.of, staticmethod(planner)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Plan.of = staticmethod(of)  # type: ignore[method-assign, assignment]


def with_short(length: int, what: str, keys: int, device: torch.device) -> Run:
    """Causal attention with the kernel that keeps all scores on the chip for up to ``keys`` keys."""
    run = attend(length, length, True, what, BOTH, LOCAL, device)

    def limited() -> object:
        before = plans.SHORT
        plans.SHORT = keys
        try:
            return run()
        finally:
            plans.SHORT = before

    return limited


def profiled(length: int, what: str, planner: Planner, device: torch.device) -> Run:
    """The median time and the resources of every kernel of a training step, and the sweeps of Newton's method."""
    from sparse_attn.kernels.triton.attention import backward, forward

    step = attend(length, length, True, what, BOTH, LOCAL, device)
    kernels: dict[str, list[tuple[Callable[[], float], Any]]] = {}
    sweeps: list[Tensor] = []
    start = forward.launch

    def timed(kernel: Any, *arguments: Any, **options: Any) -> Any:
        if kernel.__name__ == "forward_long":
            programs, inputs, lengths, results, *rest = arguments
            sweeps.append(torch.zeros(programs, dtype=torch.int32, device=device))
            arguments = (programs, inputs, lengths, results._replace(sweeps=sweeps[-1]), *rest)
        with stopwatch() as seconds:
            compiled = start(kernel, *arguments, **options)
        kernels.setdefault(kernel.__name__, []).append((seconds, compiled))
        return compiled

    def run() -> Measured:
        with planned(planner):
            step()
            forward.launch = backward.launch = timed
            try:
                for _ in range(1 if triton.interpreted() else 7):
                    step()
            finally:
                forward.launch = backward.launch = start
        synchronize()
        found = {name: resources(calls) for name, calls in kernels.items()}
        if sweeps:
            found["forward_long"] |= {"sweeps": float(sweeps[-1].float().mean()), "most sweeps": int(sweeps[-1].max())}
        return {"kernels": found}

    return run


def resources(calls: list[tuple[Callable[[], float], Any]]) -> Measured:
    """Milliseconds of a kernel's calls, registers of a thread, bytes it spills, and bytes of shared memory."""
    compiled = calls[0][1]
    found = {"ms": 1e3 * statistics.median(seconds() for seconds, _ in calls)}
    if compiled is None:
        return found
    return found | {
        "registers": compiled.n_regs,
        "spilled": compiled.n_spills,
        "shared": compiled.metadata.shared,
    }


def active_share(length: int, local: float, device: torch.device) -> Run:
    """The share of the tiles left by a causal mask that have weight at α = 1.5."""
    from sparse_attn.kernels.triton.attention.forward import forward

    query, key, value = local_heads(length, device, local)
    length = query.shape[2]
    setting = Setting(0.5, 1 / math.sqrt(query.shape[-1]), 0.0, 0)

    def run() -> Measured:
        *_, flags = forward(query, key, value, None, None, None, None, setting, True)
        plan = Plan.of(query, value)
        last = torch.arange(1, flags.shape[1] + 1) * plan.block_m
        visible = int(((last.clamp(max=length) + plan.block_n - 1) // plan.block_n).sum()) * len(flags)
        return {"share": float(flags.sum()) / visible}

    return run


def decoding(keys: int, what: str, device: torch.device) -> Run:
    """One query against a cache, without gradients."""
    batch, heads, groups, keys = (8, 32, 8, keys) if not triton.interpreted() else (1, 2, 1, sized(keys))
    query = torch.randn(batch, heads, 1, 128, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, groups, keys, 128, device=device, dtype=torch.bfloat16)
    if what == LEARNT:
        alpha = torch.full((heads,), 1.5, device=device)
        return partial(entmax_attention, query, key, value, alpha, enable_gqa=True)
    return partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)


def attending(what: str, causal: bool, learnt: Tensor) -> Attend:
    """The attention function with this name. Other packages are imported here, when they are timed."""
    alphas = {FIXED: 1.5, "ours, α 2": 2.0, LEARNT: learnt}
    if what in alphas:
        return partial(entmax_attention, alpha=alphas[what], is_causal=causal)
    if what == FLASH:
        return partial(flash, causal)
    if what == "flex attention":
        return flex(causal)
    import adasplash

    few_configurations(adasplash)
    if what == V2:
        return adasplash.adasplash_v2
    return partial(adasplash.adasplash_v1, alpha=1.5, is_causal=causal)


def few_configurations(package: Any) -> None:
    """Keep only the first configurations of another package's autotuners: compiling all takes many minutes."""
    import sys

    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package.__name__:
            for tuner in vars(module).values():
                if isinstance(tuner, Autotuner):
                    tuner.configs = tuner.configs[:_PEER_CONFIGURATIONS]


def flash(causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's flash attention. On a GPU torch must not choose another implementation."""
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def flex(causal: bool) -> Attend:
    """Flex attention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=mask(query.shape[2]) if causal else None)

    masks: dict[int, Any] = {}

    def mask(length: int) -> Any:
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
        return masks[length]

    return run
