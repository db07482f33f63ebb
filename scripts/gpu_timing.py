"""The timings of `gpu_check.py` as a list, in phases. In every phase the most important timings come first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from gpu_workloads import (
    BACKWARD,
    BOTH,
    FIXED,
    FLASH,
    FORWARD,
    LEARNT,
    LOCAL,
    PUBLISHED,
    REPLAY,
    V2,
    Measured,
    Run,
    active_share,
    attend,
    decoding,
    loss,
    measured,
    plan_of,
    profiled,
    replayed,
    row_operator,
    synchronize,
    with_short,
)

from sparse_attn.kernels import triton
from sparse_attn.kernels.triton.attention.plan import Plan

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROWS = (128, 1024, 4096, 16384, 32000, 131072)
VOCABULARIES = (32000, 128256, 256000)
# Queries, keys and warps of a tile; the first tile is in use for heads of 64 in half precision.
TILES = ((64, 64, 4), (128, 64, 8), (64, 32, 4), (128, 128, 8), (128, 32, 8))
STAGES = (3, 4)  # of the software pipeline; 2 stages are in use


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
        except Exception as error:  # an error, for example from another package, becomes a line of the table
            result = self.named() | {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            result |= {"lost": True} if "CUDA error" in str(error) else {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result

    def named(self) -> Measured:
        """The fields that identify the result."""
        key = {"group": self.group, "length": self.length, "who": self.what, "step": self.step}
        return key | {"case": f"{self.group}, {self.length}", "what": f"{self.what}, {self.step}"}


def key_timings() -> Iterator[Timing]:
    """The main timings: causal attention up to 16k, also with the share of tiles that AdaSplash-2 publishes."""
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
    """Each kernel with other tiles (`predict_gpu.py` predicts these) and pipelines, and the kernel for few keys."""
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
    """Operators, with a copy for comparison; losses; decoding."""
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
    """Long lengths, attention without a causal mask, the forward alone, and other packages."""
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


def rows(size: int, dtype: torch.dtype) -> Iterator[Timing]:
    """Operators over 2²⁶ scores, with a copy and softmax for comparison."""
    group = f"rows, {str(dtype)[6:]}"
    for what in ("copy", "softmax", "sparsemax", "1.5-entmax", "α per row", "top-32 softmax", "entmax package, 1.5"):
        yield Timing(group, size, what, FORWARD, partial(row_operator, size, dtype, what, FORWARD))
    for what in ("softmax", "1.5-entmax", "α per row"):
        yield Timing(group, size, what, BACKWARD, partial(row_operator, size, dtype, what, BACKWARD))


def attention(group: str, queries: int, keys: int, what: str, step: str) -> Timing:
    """Attention of one package, heads of 64 in bfloat16; all packages get the same tensors."""
    causal, local = group.startswith("causal"), PUBLISHED[keys] if "published" in group else LOCAL
    return Timing(group, keys, what, step, partial(attend, queries, keys, causal, what, step, local))


def share(group: str, length: int) -> Timing:
    """The share of the tiles left by a causal mask that have weight at α = 1.5."""
    local = PUBLISHED[length] if "published" in group else LOCAL
    return Timing(group, length, "tiles", "share with weight", partial(active_share, length, local))


PHASES: dict[str, Callable[[], Iterator[Timing]]] = {
    "key": key_timings,
    "kernels": kernel_timings,
    "tiles": tile_timings,
    "rows": row_timings,
    "long": long_timings,
}
