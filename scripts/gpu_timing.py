"""The timings of `gpu_check.py` in phases, the packages to compare with, and the derived figures.

In every phase the most important timings come first. Without a device (a dry run) the same calls run in Triton's
interpreter on tensors of a few rows: their times mean nothing, but every line of this file has run.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

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

FORWARD, BACKWARD, BOTH, REPLAY = "forward", "backward", "forward + backward", "forward + backward, graph replay"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROWS = (128, 1024, 4096, 16384, 32000, 131072)
VOCABULARIES = (32000, 128256, 256000)
# Queries, keys and warps of a tile; the first is what heads of 64 in half precision have.
TILES = ((64, 64, 4), (128, 64, 8), (64, 32, 4), (128, 128, 8), (128, 32, 8))
STAGES = (3, 4)  # of the software pipeline, beside the 2 in use
FIXED, LEARNT, FLASH, V2 = "ours, α 1.5", "ours, α learnt", "flash attention", "adasplash_v2"
# How far a vector depends on its position, by length: with these, about 49, 36 and 25 % of the tiles under the causal
# mask have weight, as in the figure that AdaSplash-2 publishes. With 2.5 ("local") it is 7, 3 and 1.5 %.
PUBLISHED = {4096: 1.56, 16384: 1.42, 65536: 1.3}
_LOCAL = 2.5
_PEER_CONFIGURATIONS = 2  # of a peer's autotuner: each costs 13 s at a length of 4k, 30 s at 16k and 210 s at 64k


class Timing(NamedTuple):
    """One timing: what is timed, by which package, and how to prepare it."""

    group: str
    length: int
    what: str
    step: str
    make: Callable[[torch.device], Run]

    def __call__(self, warm_up_only: bool = False) -> Measured:
        """A time, or the reason for its absence: a package may be missing, or not support a case."""
        device = torch.device("cpu" if triton.interpreted() else "cuda")
        try:
            run = self.make(device)
            if warm_up_only:
                run()
                synchronize()
                return {}
            result = self.named() | measured(run)
        except Exception as error:  # every error of another package is a line of the table
            result = self.named() | {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            result |= {"lost": True} if "CUDA error" in str(error) else {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result

    def named(self) -> Measured:
        """The key of the result."""
        key = {"group": self.group, "length": self.length, "who": self.what, "step": self.step}
        return key | {"case": f"{self.group}, {self.length}", "what": f"{self.what}, {self.step}"}


def key_timings() -> Iterator[Timing]:
    """The figures of the targets: causal attention up to 16k, short lengths, the peer at its own case."""
    for length in (4096, 16384, 1024, 8192, 2048):
        for what in (FIXED, LEARNT, FLASH):
            yield attention("causal attention", length, length, what, BOTH)
        yield share("causal attention", length)
    for length in (4096, 16384):
        for what in (FIXED, LEARNT, FLASH, V2):
            yield attention("causal attention, published share", length, length, what, BOTH)
        yield share("causal attention, published share", length)
    for length in (256, 512, 1024):
        for what in (FIXED, LEARNT, FLASH):
            yield Timing("causal attention", length, what, REPLAY, partial(replayed, length, what))
    for length in (256, 512):
        for what in (FIXED, LEARNT, FLASH):
            yield attention("causal attention", length, length, what, BOTH)
    for length in (4096, 16384, 1024, 8192, 2048):
        yield attention("causal attention", length, length, V2, BOTH)


def kernel_timings() -> Iterator[Timing]:
    """Each kernel of a training step by itself: time, registers, spilled bytes, shared memory."""
    for length in (4096, 16384):
        for what in (FIXED, LEARNT):
            yield Timing("kernels", length, what, BOTH, partial(profiled, length, what, Plan.of))


def tile_timings() -> Iterator[Timing]:
    """The same with other tiles, pipelines and the kernel for few keys: what `predict_gpu.py` predicts."""
    for what in (FIXED, LEARNT):
        for tile in TILES[1:]:
            group = f"kernels, tiles of {tile[0]} × {tile[1]}, {tile[2]} warps"
            yield Timing(group, 8192, what, BOTH, partial(profiled, 8192, what, plan_of(tile)))
        yield Timing("kernels", 8192, what, BOTH, partial(profiled, 8192, what, Plan.of))
        for stages in STAGES:
            group = f"kernels, {stages} stages"
            yield Timing(group, 8192, what, BOTH, partial(profiled, 8192, what, plan_of(TILES[0], stages)))
    for length in (256, 512, 1024):
        for what in (FIXED, LEARNT):
            for name, keys in (("on", 1024), ("off", 0)):
                make = partial(with_short, length, what, keys)
                yield Timing(f"causal attention, the kernel for few keys {name}", length, what, BOTH, make)


def row_timings() -> Iterator[Timing]:
    """Operators beside a copy, losses, decoding."""
    for size in ROWS:
        yield from rows(size, torch.float32)
    for size in (1024, 32000):
        yield from rows(size, torch.bfloat16)
    for size in VOCABULARIES:
        for what in ("1.5-entmax loss", "cross-entropy"):
            yield Timing("loss of 4096 tokens", size, what, BOTH, partial(loss, size, what))
    for keys in (4096, 32768, 131072):
        for what in (LEARNT, "scaled_dot_product_attention"):
            yield Timing("decoding", keys, what, FORWARD, partial(decoding, keys, what))


def long_timings() -> Iterator[Timing]:
    """Long lengths, without a causal mask, the forward alone, the other packages."""
    for length in (65536, 32768):
        for what in (FIXED, LEARNT, FLASH):
            yield attention("causal attention", length, length, what, BOTH)
        yield share("causal attention", length)
    for what in (FIXED, LEARNT, FLASH):
        yield attention("causal attention, published share", 65536, 65536, what, BOTH)
    yield share("causal attention, published share", 65536)
    for length in (4096, 16384):
        yield attention("full attention", length, length, FIXED, BOTH)
        yield attention("full attention", length, length, FLASH, BOTH)
    yield attention("cross-attention of 2048 queries", 2048, 16384, FIXED, BOTH)
    for length in LENGTHS:
        for what in (FIXED, LEARNT, FLASH):
            yield attention("causal attention", length, length, what, FORWARD)
        yield attention("causal attention", length, length, "ours, α 2", BOTH)
    for length in (4096, 16384):
        for what in (V2, "adasplash_v1", "flex attention"):
            yield attention("causal attention", length, length, what, FORWARD if what == V2 else BOTH)
        yield attention("full attention", length, length, "adasplash_v1", BOTH)


PHASES: dict[str, Callable[[], Iterator[Timing]]] = {
    "key": key_timings,
    "kernels": kernel_timings,
    "tiles": tile_timings,
    "rows": row_timings,
    "long": long_timings,
}


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
    if isinstance(result, dict):  # measured by itself
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
    """Time of a block on the device, between two events; of the processor in a dry run."""
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


def rows(size: int, dtype: torch.dtype) -> Iterator[Timing]:
    """Operators over 2²⁶ scores, beside a copy and softmax."""
    group = f"rows, {str(dtype)[6:]}"
    for what in ("copy", "softmax", "sparsemax", "1.5-entmax", "α per row", "top-32 softmax", "entmax package, 1.5"):
        yield Timing(group, size, what, FORWARD, partial(row_operator, size, dtype, what, FORWARD))
    for what in ("softmax", "1.5-entmax", "α per row"):
        yield Timing(group, size, what, BACKWARD, partial(row_operator, size, dtype, what, BACKWARD))


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


def local_heads(length: int, device: torch.device, local: float = _LOCAL) -> list[Tensor]:
    """Query, key and value in bfloat16 whose scores fall off with the distance: blocks far away have no weight."""
    batch, heads = max(1, 16384 // length), 16 if length <= 16384 else 4
    if triton.interpreted():
        batch, heads, length = 1, 1, sized(length)
    base = torch.randn(2, batch, heads, length, 64, device=device) * 0.5
    angle = torch.arange(length, device=device)[:, None] / 2.0 ** torch.arange(5, 13, device=device)
    base[..., :16] += local * torch.cat([angle.cos(), angle.sin()], -1)
    query, key = base.bfloat16().unbind()
    return [query, key, torch.randn_like(key)]


def attention(group: str, queries: int, keys: int, what: str, step: str) -> Timing:
    """Attention of one package, heads of 64 in bfloat16; all packages get the same tensors."""
    causal, local = group.startswith("causal"), PUBLISHED[keys] if "published" in group else _LOCAL
    return Timing(group, keys, what, step, partial(attend, queries, keys, causal, what, step, local))


def attend(queries: int, keys: int, causal: bool, what: str, step: str, local: float, device: torch.device) -> Run:
    """A call, or a training step, of the function alone."""
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
    """A training step captured as a CUDA graph: for few keys, the host's time for launches exceeds the device's."""
    run = attend(length, length, True, what, BOTH, _LOCAL, device)
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


Planner = Callable[[Tensor, Tensor], Plan]


def plan_of(tile: tuple[int, int, int], stages: int = 2) -> Planner:
    """A plan for heads of 64 in place of ``Plan.of``."""
    return lambda query, value: Plan(tile[0], tile[1], 64, 64, tile[2], stages)


@contextlib.contextmanager
def planned(planner: Planner) -> Iterator[None]:
    """Attention with the tiles of a planner, while the context lasts."""
    of, Plan.of = Plan.of, staticmethod(planner)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Plan.of = staticmethod(of)  # type: ignore[method-assign, assignment]


def with_short(length: int, what: str, keys: int, device: torch.device) -> Run:
    """Causal attention with the kernel that keeps all scores on the chip for up to ``keys`` keys."""
    run = attend(length, length, True, what, BOTH, _LOCAL, device)

    def limited() -> object:
        before = plans.SHORT
        plans.SHORT = keys
        try:
            return run()
        finally:
            plans.SHORT = before

    return limited


def profiled(length: int, what: str, planner: Planner, device: torch.device) -> Run:
    """The median time of every kernel of a training step, its resources, and the sweeps of Newton's method."""
    from sparse_attn.kernels.triton.attention import backward, forward

    step = attend(length, length, True, what, BOTH, _LOCAL, device)
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


def attending(what: str, causal: bool, learnt: Tensor) -> Attend:
    """The function of a name; a peer is imported here."""
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
    """Leave the autotuners of a peer their first configurations: all of them would compile for many minutes."""
    import sys

    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package.__name__:
            for tuner in vars(module).values():
                if isinstance(tuner, Autotuner):
                    tuner.configs = tuner.configs[:_PEER_CONFIGURATIONS]


def flash(causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's, and nothing else of torch's."""
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def flex(causal: bool) -> Attend:
    """Compiled."""
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


def share(group: str, length: int) -> Timing:
    """Of the tiles that a causal mask leaves, how many have weight at α = 1.5."""
    local = PUBLISHED[length] if "published" in group else _LOCAL
    return Timing(group, length, "tiles", "share with weight", partial(active_share, length, local))


def active_share(length: int, local: float, device: torch.device) -> Run:
    """As :func:`share`."""
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


class Figure(NamedTuple):
    """A target: its name, its bound, the measured values with the places they are from, and why others are missing."""

    name: str
    bound: str
    values: list[tuple[float, str]]
    missing: list[str]


def figures(timings: list[Measured]) -> Iterator[Figure]:
    """The targets and the measured figures."""
    found = {(x["group"], x["length"], x["who"], x["step"]): x for x in timings}
    reasons: list[str] = []

    def value(group: str, length: int, what: str, step: str = BOTH, of: str = "seconds") -> float:
        result = found.get((group, length, what, step), {"skipped": "not in this run"})
        if of not in result:
            reasons.append(f"{what} at {length}: {result.get('skipped', 'no such figure')}")
        return float(result.get(of, math.nan))

    def figure(name: str, bound: str, values: Iterator[tuple[float, str]]) -> Figure:
        reasons.clear()
        known = [pair for pair in values if not math.isnan(pair[0])]
        return Figure(name, bound, known, list(dict.fromkeys(reasons)))

    def ratios(group: str, lengths: tuple[int, ...], ours: str, others: str, step: str = BOTH) -> Iterator[Any]:
        for n in lengths:
            place = f"N {n}"
            if others == FLASH and step == BOTH:
                place += f", {value(group, n, 'tiles', 'share with weight', 'share'):.0%} of tiles have weight"
            yield value(group, n, ours, step) / value(group, n, others, step), place

    local, published = "causal attention", "causal attention, published share"
    shared = (4096, 16384)
    yield figure("causal α 1.5, time / adasplash_v2's, 1k to 16k", "≤1.0", ratios(local, LENGTHS[2:7], FIXED, V2))
    yield figure("the same at the published share of tiles", "≤1.0", ratios(published, shared, FIXED, V2))
    yield figure("causal α 1.5, time / flash attention's, from 16k", "≤1.0", ratios(local, LENGTHS[6:], FIXED, FLASH))
    at = (16384, 65536)
    yield figure("the same at the published share of tiles", "≤1.0", ratios(published, at, FIXED, FLASH))
    yield figure("learnt α with its gradient, time / fixed α 1.5's", "≤1.3", ratios(local, LENGTHS, LEARNT, FIXED))
    short = LENGTHS[:3]
    yield figure("N up to 1024, graph, time / flash attention's", "≤1.5", ratios(local, short, FIXED, FLASH, REPLAY))
    full = ((value("full attention", n, FIXED) / (2 * value(local, n, FIXED)), f"N {n}") for n in shared)
    yield figure("not causal, time / what the causal one predicts", "≤1.2", full)

    def cross() -> Iterator[tuple[float, str]]:
        predicted = value(local, 16384, FIXED) * 2 * 2048 / 16384
        yield value("cross-attention of 2048 queries", 16384, FIXED) / predicted, "2048 to 16384"

    yield figure("cross-attention, time / what the causal one predicts", "≤1.2", cross())
    yield figure("rows, share of the bandwidth of a copy", "≥0.5", bandwidths(found))

    def memory() -> Iterator[tuple[float, str]]:
        few, many = (value(local, n, LEARNT, BOTH, "bytes") / (n * h) for n, h in ((16384, 16), (65536, 4)))
        yield many / few, "α learnt"

    yield figure("memory of a token at 64k / at 16k", "≤1.1", memory())
    seconds = ((value(local, 65536, LEARNT), "4 heads") for _ in range(1))
    yield figure("64k tokens with a learnt α and its gradient, seconds", "≤inf", seconds)


def bandwidths(found: dict[tuple[str, int, str, str], Measured]) -> Iterator[tuple[float, str]]:
    """A forward pass moves as many bytes as a copy, a backward pass one and a half times as many."""
    for (group, size, what, step), result in found.items():
        copied = found.get((group, size, "copy", FORWARD), {})
        if what in ("sparsemax", "1.5-entmax", "α per row") and "seconds" in result and "seconds" in copied:
            moved = 1.5 if step == BACKWARD else 1.0
            yield moved * copied["seconds"] / result["seconds"], f"{group}, {size}, {what}, {step}"
