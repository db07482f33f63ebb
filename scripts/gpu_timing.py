"""The timings of `gpu_check.py`, the packages to compare with, and the derived figures.

The most important timings come first. Timings for which no time is left are reported as missing.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import entmax, entmax_attention, entmax_loss, topk_softmax
from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention.plan import Plan

Measured = dict[str, Any]
Run = Callable[[], object]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROWS = (128, 1024, 4096, 16384, 32000, 131072)
VOCABULARIES = (32000, 128256, 256000)
# Queries, keys and warps of a tile; the first is what heads of 64 in half precision have.
TILES = ((128, 32, 8), (64, 64, 4), (128, 64, 8), (64, 32, 4), (128, 128, 8))
FIXED, LEARNT, FLASH, V2 = "ours, α 1.5", "ours, α learnt", "flash attention", "adasplash_v2"


class Timing(NamedTuple):
    """One timing: what is timed, by which package, and how to prepare it."""

    group: str
    length: int
    what: str
    step: str
    make: Callable[[torch.device], Run]

    def __call__(self, warm_up_only: bool = False) -> Measured:
        """A time, or the reason for its absence: a package may be missing, or not support a case."""
        device = torch.device("cuda")
        try:
            run = self.make(device)
            if warm_up_only:
                run()
                torch.cuda.synchronize()
                return {}
            result = self.named() | measured(run)
        except Exception as error:  # every error of another package is a line of the table
            result = self.named() | {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            result |= {"lost": True} if "CUDA error" in str(error) else {}
        torch.cuda.empty_cache()
        return result

    def named(self) -> Measured:
        """The key of the result."""
        key = {"group": self.group, "length": self.length, "who": self.what, "step": self.step}
        return key | {"case": f"{self.group}, {self.length}", "what": f"{self.what}, {self.step}"}


def tasks(warm_up_only: bool) -> list[Callable[[], Measured]]:
    """All timings, or with ``warm_up_only`` one call of each, so that compiled kernels are on the disk."""
    return [partial(timing, warm_up_only) if warm_up_only else timing for timing in timings()]


def timings() -> Iterator[Timing]:
    """This library and flash attention first, then the package in the targets, then the others."""
    for length in LENGTHS:
        for what in (FIXED, LEARNT, FLASH):
            yield attention("causal attention", length, length, what, BOTH)
        yield Timing("causal attention", length, "tiles", "share with weight", partial(active_share, length))
    for size in ROWS:
        yield from rows(size, torch.float32)
    for length in (16384, 4096, 65536, 1024, 8192, 32768, 2048):
        yield attention("causal attention", length, length, V2, BOTH)
    for length in (4096, 16384):
        yield attention("full attention", length, length, FIXED, BOTH)
        yield attention("full attention", length, length, FLASH, BOTH)
    yield attention("cross-attention of 2048 queries", 2048, 16384, FIXED, BOTH)
    for tile in TILES[1:]:
        for what in (FIXED, LEARNT):
            yield other_tiles(tile, 8192, what)
    for keys in (4096, 32768, 131072):
        for what in (LEARNT, "scaled_dot_product_attention"):
            yield Timing("decoding", keys, what, FORWARD, partial(decoding, keys, what))
    for size in (1024, 32000):
        yield from rows(size, torch.bfloat16)
    for size in VOCABULARIES:
        for what in ("1.5-entmax loss", "cross-entropy"):
            yield Timing("loss of 4096 tokens", size, what, BOTH, partial(loss, size, what))
    for length in LENGTHS:
        for what in (FIXED, LEARNT, FLASH, V2):
            yield attention("causal attention", length, length, what, FORWARD)
        yield attention("causal attention", length, length, "ours, α 2", BOTH)
    for length in (4096, 16384):
        for what in ("adasplash_v1", "flex attention"):
            yield attention("causal attention", length, length, what, BOTH)
        yield attention("full attention", length, length, "adasplash_v1", BOTH)


def measured(run: Run) -> Measured:
    """The median time of a call, between device events, after a warm-up, and the memory it needs."""
    share = run()
    if isinstance(share, float):  # nothing to time
        return {"share": share}
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = elapsed(run)
    peak = torch.cuda.max_memory_allocated() - before
    times = [elapsed(run) for _ in range(min(max(int(0.5 / first), 5), 30))]
    return {"seconds": statistics.median(times), "bytes": peak}


def elapsed(run: Run) -> float:
    """Seconds of one call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rows(size: int, dtype: torch.dtype) -> Iterator[Timing]:
    """Operators over 2²⁶ scores, beside a copy and softmax."""
    group = f"rows, {str(dtype)[6:]}"
    for what in ("copy", "softmax", "sparsemax", "1.5-entmax", "α per row", "top-32 softmax", "entmax package, 1.5"):
        yield Timing(group, size, what, FORWARD, partial(row_operator, size, dtype, what, FORWARD))
    for what in ("softmax", "1.5-entmax", "α per row"):
        yield Timing(group, size, what, BACKWARD, partial(row_operator, size, dtype, what, BACKWARD))


def row_operator(size: int, dtype: torch.dtype, what: str, step: str, device: torch.device) -> Run:
    """One pass of one operator."""
    x = torch.randn(2**26 // size, size, device=device, dtype=dtype, requires_grad=step == BACKWARD)
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
            return topk_softmax(x, 32)
        if what == "softmax":
            return x.softmax(-1)
        return entmax(x, {"sparsemax": 2.0, "1.5-entmax": 1.5, "α per row": alpha}[what])

    if step == FORWARD:
        return apply
    output, upstream = apply(), torch.randn_like(x)
    return partial(torch.autograd.grad, output, inputs, upstream, retain_graph=True)


def loss(size: int, what: str, device: torch.device) -> Run:
    """A loss and its gradient, in bfloat16."""
    x = torch.randn(4096, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(size, (4096,), device=device)
    function = F.cross_entropy if what == "cross-entropy" else entmax_loss
    return lambda: torch.autograd.grad(function(x, target), x)


def local_heads(length: int, device: torch.device) -> list[Tensor]:
    """Query, key and value in bfloat16 whose scores fall off with the distance: blocks far away have no weight."""
    batch, heads = max(1, 16384 // length), 16 if length <= 16384 else 4
    base = torch.randn(2, batch, heads, length, 64, device=device) * 0.5
    angle = torch.arange(length, device=device)[:, None] / 2.0 ** torch.arange(5, 13, device=device)
    base[..., :16] += 2.5 * torch.cat([angle.cos(), angle.sin()], -1)
    query, key = base.bfloat16().unbind()
    return [query, key, torch.randn_like(key)]


def attention(group: str, queries: int, keys: int, what: str, step: str) -> Timing:
    """Attention of one package, heads of 64 in bfloat16; all packages get the same tensors."""
    return Timing(group, keys, what, step, partial(attend, queries, keys, group.startswith("causal"), what, step))


def attend(queries: int, keys: int, causal: bool, what: str, step: str, device: torch.device) -> Run:
    """A call, or a training step, of the function alone."""
    query, key, value = local_heads(keys, device)
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


@contextlib.contextmanager
def planned(tile: tuple[int, int, int]) -> Iterator[None]:
    """Attention of heads of 64 with these tiles, while the context lasts."""
    of, Plan.of = Plan.of, staticmethod(lambda query, value: Plan(*tile[:2], 64, 64, tile[2]))
    try:
        yield
    finally:
        Plan.of = staticmethod(of)


def other_tiles(tile: tuple[int, int, int], length: int, what: str) -> Timing:
    """Causal attention with tiles that are not in use: the outcome of what `predict_gpu.py` predicts."""

    def make(device: torch.device) -> Run:
        run = attend(length, length, True, what, BOTH, device)

        def run_planned() -> object:
            with planned(tile):
                return run()

        return run_planned

    return Timing(f"causal attention in tiles {tile[0]} × {tile[1]}, {tile[2]} warps", length, what, BOTH, make)


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

    if what == V2:
        return adasplash.adasplash_v2
    return partial(adasplash.adasplash_v1, alpha=1.5, is_causal=causal)


def flash(causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's, and nothing else of torch's."""
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


def active_share(length: int, device: torch.device) -> Run:
    """Of the tiles that a causal mask leaves, how many have weight at α = 1.5."""
    from sparse_attn.kernels.triton.attention.forward import forward

    query, key, value = local_heads(length, device)
    setting = Setting(0.5, 1 / math.sqrt(query.shape[-1]), 0.0, 0)

    def share() -> float:
        *_, flags = forward(query, key, value, None, None, None, None, setting, True)
        plan = Plan.of(query, value)
        last = torch.arange(1, flags.shape[1] + 1) * plan.block_m
        visible = int(((last.clamp(max=length) + plan.block_n - 1) // plan.block_n).sum()) * len(flags)
        return float(flags.sum()) / visible

    return share


def decoding(keys: int, what: str, device: torch.device) -> Run:
    """One query against a cache, without gradients."""
    query = torch.randn(8, 32, 1, 128, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, 8, 8, keys, 128, device=device, dtype=torch.bfloat16)
    if what == LEARNT:
        alpha = torch.full((32,), 1.5, device=device)
        return partial(entmax_attention, query, key, value, alpha, enable_gqa=True)
    return partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)


Figure = tuple[str, str, list[tuple[float, str]]]


def figures(timings: list[Measured]) -> Iterator[Figure]:
    """The targets: a name, a bound, and the measured figure."""
    found = {(x["group"], x["length"], x["who"], x["step"]): x for x in timings if "skipped" not in x}
    seconds = {key: x["seconds"] for key, x in found.items() if "seconds" in x}

    def causal(length: int, what: str) -> float:
        return seconds.get(("causal attention", length, what, BOTH), math.nan)

    def ratios(lengths: tuple[int, ...], ours: str, others: str) -> list[tuple[float, str]]:
        return known((causal(n, ours) / causal(n, others), f"N {n}") for n in lengths)

    yield "causal α 1.5, time / adasplash_v2's, 1k to 64k", "≤1.0", ratios(LENGTHS[2:], FIXED, V2)
    shares = {n: found.get(("causal attention", n, "tiles", "share with weight"), {}).get("share") for n in LENGTHS}
    against_flash = [
        (ratio, f"N {n}, {shares[n] or math.nan:.0%} of tiles have weight")
        for n in LENGTHS[6:]
        for ratio, _ in ratios((n,), FIXED, FLASH)
    ]
    yield "causal α 1.5, time / flash attention's, from 16k", "≤1.0", against_flash
    yield "learnt α with its gradient, time / fixed α 1.5's", "≤1.3", ratios(LENGTHS, LEARNT, FIXED)
    yield "N up to 1024, time / flash attention's", "≤1.5", ratios(LENGTHS[:3], FIXED, FLASH)
    full = (
        (seconds.get(("full attention", n, FIXED, BOTH), math.nan) / (2 * causal(n, FIXED)), f"N {n}")
        for n in (4096, 16384)
    )
    yield "not causal, time / what the causal one predicts", "≤1.2", known(full)
    cross = seconds.get(("cross-attention of 2048 queries", 16384, FIXED, BOTH), math.nan)
    predicted = causal(16384, FIXED) * 2 * 2048 / 16384
    yield "cross-attention, time / what the causal one predicts", "≤1.2", known([(cross / predicted, "2048 to 16384")])
    yield "rows, share of the bandwidth of a copy", "≥0.5", list(bandwidths(seconds))
    per_token = {
        n: found.get(("causal attention", n, LEARNT, BOTH), {}).get("bytes", math.nan) / (n * heads)
        for n, heads in ((16384, 16), (65536, 4))
    }
    yield "memory of a token at 64k / at 16k", "≤1.1", known([(per_token[65536] / per_token[16384], "α learnt")])
    yield "64k tokens with a learnt α and its gradient, seconds", "≤inf", known([(causal(65536, LEARNT), "4 heads")])


def known(values: Any) -> list[tuple[float, str]]:
    """Those that were measured."""
    return [value for value in values if not math.isnan(value[0])]


def bandwidths(seconds: dict[tuple[str, int, str, str], float]) -> Iterator[tuple[float, str]]:
    """A forward pass moves as many bytes as a copy, a backward pass one and a half times as many."""
    for (group, size, what, step), taken in seconds.items():
        copied = seconds.get((group, size, "copy", FORWARD))
        if copied and what in ("sparsemax", "1.5-entmax", "α per row"):
            moved = 1.5 if step == BACKWARD else 1.0
            yield moved * copied / taken, f"{group}, {size}, {what}, {step}"
