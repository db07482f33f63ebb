"""Check and time the Triton kernels on this machine's GPU, beside what else there is, in less than ten minutes.

    python scripts/gpu_check.py [--out benchmarks]     with a CUDA device; writes gpu.md and gpu.json there
    python scripts/gpu_check.py --interpret            correctness alone, in Triton's interpreter, without a device

Needs torch, Triton and this checkout; adasplash, entmax and flex attention are timed where they are installed and work.
Ends with 0 when everything was right, 1 when something was wrong, 2 when there is no device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:  # Triton asks when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import backends, entmax, entmax_attention, topk_softmax, use_backend
from sparse_attn.kernels import triton

Run = Callable[[], object]
Measured = dict[str, Any]

SECONDS = 540  # after which no new case is begun
ALPHAS = (1.0, 1.0001, 1.01, 1.3, 1.5, 1.8, 2.0, 2.5)
BOUNDS = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
BEGAN = time.monotonic()


def main() -> int:
    """Check, time, write, and print a short table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="check correctness in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "benchmarks", help="where to write")
    options = parser.parse_args()
    available, why = triton.status()
    if not available:
        print(f"no GPU was checked: {why}")
        return 2
    device = torch.device("cpu" if options.interpret else "cuda")
    with use_backend("triton"):
        checks = list(correctness(device))
        if options.interpret:
            return report_checks(checks)
        timings = [*rows(device), *attention(device)]
    result = {"environment": environment(), "checks": checks, "timings": timings}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "gpu.md").write_text("\n".join(page(result)) + "\n", encoding="utf-8")
    print("\n".join(table(timings)))
    return report_checks(checks)


def report_checks(checks: list[Measured]) -> int:
    """Say what was wrong, and the exit code for it."""
    wrong = [check for check in checks if not check["right"]]
    for check in wrong:
        print(f"WRONG {check['case']}: {check['error']}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks right, {time.monotonic() - BEGAN:.0f} s")
    return 1 if wrong else 0


def environment() -> dict[str, str]:
    """What the figures belong to."""
    versions = {name: version(name) for name in ("torch", "triton", "adasplash", "entmax")}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
        **versions,
    }


def version(package: str) -> str:
    """The installed version, if any."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """The driver's version, where it says so."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("  ")[1]
    except (OSError, IndexError):
        return "unknown"


def correctness(device: torch.device) -> Iterator[Measured]:
    """Values and every gradient against float64."""
    for check in all_checks(device):
        try:
            yield check()
        except Exception as error:  # a kernel that does not compile or start is wrong, and the others are to be checked
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            yield {"case": f"{check.func.__name__}{check.args}", "error": why, "bound": 0.0, "right": False}


def all_checks(device: torch.device) -> Iterator[partial[Measured]]:
    """What is checked; on a CPU less of it."""
    small = device.type == "cpu"
    for size in (1, 7, 1021, 16411) if small else (1, 7, 127, 1021, 4099, 16384, 32000, 50257, 131101):
        for dtype in (torch.float32,) if small else (torch.float32, torch.float16, torch.bfloat16):
            yield partial(check_rows, size, dtype, device)
    # Every combination is compiled, which takes longer than to run it: not all of them are needed.
    for alpha in ("per head", 1.3, 1.5, 2.0):
        for queries, keys in ((37, 53),) if small else ((37, 53), (777, 777), (129, 2051), (2500, 1500)):
            for dtype in (torch.float32,) if small else (torch.float32, torch.bfloat16):
                yield partial(check_attention, alpha, queries, keys, 64, dtype, device)
    for queries, keys in ((37, 53),) if small else ((1, 300), (129, 2051)):
        yield partial(check_attention, "per head", queries, keys, 64, torch.float16, device)
    for head in (16, 40, 128, 256):
        queries, keys = (37, 53) if small else (300, 1100)
        for dtype in (torch.float32,) if small else (torch.float32, torch.bfloat16):
            yield partial(check_attention, "per head", queries, keys, head, dtype, device)
    if not small:
        yield from (partial(check, device) for check in (check_decoding, check_graph, check_compiled))


def judged(case: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], bound: float) -> Measured:
    """The largest error, relative to the largest entry of each tensor."""
    errors = [
        float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-30))
        for x, y in zip(got, wanted, strict=True)
    ]
    right = all(error <= bound for error in errors)  # NaN is not
    return {"case": case, "error": f"{max(errors):.1e}", "bound": bound, "right": right}


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """A result and its gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))


def check_rows(size: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """Eight rows, each with an α, and its gradient."""
    x = (torch.randn(len(ALPHAS), size, device=device) * 2).to(dtype)
    alpha = torch.tensor(ALPHAS, device=device)[:, None]
    upstream = torch.randn(x.shape, device=device).to(dtype)
    got = with_gradients(entmax, [x, alpha], upstream)
    with use_backend("torch"):
        wanted = with_gradients(entmax, [x.double(), alpha.double()], upstream)
    if size == 1:  # no gradient but rounding
        got, wanted = got[:1], wanted[:1]
    return judged(f"rows of {size}, {str(dtype)[6:]}", got, wanted, BOUNDS[dtype])


def check_attention(
    alpha: str | float, queries: int, keys: int, head: int, dtype: torch.dtype, device: torch.device
) -> Measured:
    """Grouped heads, a learnt mask and a causal offset; in float64 with the matrix of weights."""
    heads, key_heads = 4, 2
    shapes = ((2, heads, queries, head), (2, key_heads, keys, head), (2, key_heads, keys, head))
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    inputs.append(torch.randn(1, heads, 1, keys, device=device))
    if alpha == "per head":
        inputs.append(torch.tensor([1.0, 1.01, 1.4, 2.0], device=device))
    upstream = torch.randn(2, heads, queries, head, device=device).to(dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, per_head: Any = alpha) -> Tensor:
        return entmax_attention(query, key, value, per_head, mask, enable_gqa=True)

    got = with_gradients(attend, inputs, upstream)
    with use_backend("torch"):
        wanted = with_gradients(attend, [x.double() for x in inputs], upstream)
    case = f"attention α {alpha}, L {queries} S {keys} D {head}, {str(dtype)[6:]}"
    return judged(case, got, wanted, BOUNDS[dtype])


def check_decoding(device: torch.device) -> Measured:
    """One query against a cache."""
    query, key = torch.randn(3, 8, 1, 64, device=device), torch.randn(3, 2, 20011, 64, device=device)
    alpha = torch.linspace(1, 2, 8, device=device)
    got = entmax_attention(query, key, key, alpha, enable_gqa=True)
    with use_backend("torch"):
        wanted = entmax_attention(query.double(), key.double(), key.double(), alpha.double(), enable_gqa=True)
    return judged("decoding with 20,011 keys", (got,), (wanted,), BOUNDS[torch.float32])


def check_graph(device: torch.device) -> Measured:
    """A captured forward and backward, replayed on other data: nothing in them waits for the device."""
    static = [torch.randn(1, 4, 300, 64, device=device, requires_grad=True) for _ in range(3)]
    alpha = torch.tensor([1.0, 1.3, 1.5, 2.0], device=device, requires_grad=True)
    inputs = [*static, alpha]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            output = entmax_attention(*inputs, is_causal=True)
            torch.autograd.grad(output, inputs, torch.ones_like(output))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = entmax_attention(*inputs, is_causal=True)
        grads = torch.autograd.grad(output, inputs, torch.ones_like(output))
    with torch.no_grad():
        for x in static:
            x.copy_(torch.randn_like(x))
        alpha.copy_(torch.tensor([2.0, 1.1, 1.7, 1.2]))
    graph.replay()
    again = entmax_attention(*inputs, is_causal=True)
    wanted = (again, *torch.autograd.grad(again, inputs, torch.ones_like(again)))
    return judged("a CUDA graph", (output, *grads), wanted, BOUNDS[torch.float32])


def check_compiled(device: torch.device) -> Measured:
    """Under torch.compile, in training."""
    inputs = [torch.randn(1, 4, 300, 64, device=device) for _ in range(3)]
    inputs.append(torch.tensor([1.0, 1.3, 1.5, 2.0], device=device))
    upstream = torch.randn(1, 4, 300, 64, device=device)
    compiled = torch.compile(lambda *x: entmax_attention(*x, is_causal=True) * 2, fullgraph=True)
    wanted = with_gradients(lambda *x: entmax_attention(*x, is_causal=True) * 2, inputs, upstream)
    got = with_gradients(compiled, inputs, upstream)
    return judged("torch.compile(fullgraph=True)", got, wanted, BOUNDS[torch.float32])


def seconds(run: Run, rounds: int = 20) -> float:
    """The median time of a call, between device events, after a warm-up."""
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


def timed(case: str, what: str, run: Run) -> Measured:
    """A time, or why there is none: a peer may be missing, or refuse a case."""
    if time.monotonic() - BEGAN > SECONDS:
        return {"case": case, "what": what, "skipped": "no time left"}
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(run)
        peak = torch.cuda.max_memory_allocated() - before
        return {"case": case, "what": what, "seconds": taken, "bytes": peak}
    except Exception as error:  # whatever a peer raises is a line of the table
        return {"case": case, "what": what, "skipped": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def rows(device: torch.device) -> Iterator[Measured]:
    """Operators over 256 MiB of scores, beside a copy, which moves as many bytes, and softmax."""
    for size in (128, 1024, 4096, 16384, 32000, 65536, 131072):
        x = torch.randn(2**26 // size, size, device=device)
        yield from our_rows(f"rows of {size}, float32", x)
        yield from peer_rows(f"rows of {size}, float32", x)


def our_rows(case: str, x: Tensor) -> Iterator[Measured]:
    """Forward and backward, each by itself."""
    alpha = 1 + torch.rand(len(x), 1, device=x.device)
    functions: dict[str, Callable[..., Tensor]] = {
        "softmax": partial(torch.softmax, dim=-1),
        "sparsemax": partial(entmax, alpha=2.0),
        "1.5-entmax": partial(entmax, alpha=1.5),
        "α per row": partial(entmax, alpha=alpha),
        "top-32 softmax": partial(topk_softmax, k=32),
    }
    yield timed(case, "copy", x.clone)
    for name, function in functions.items():
        yield timed(case, f"{name}, forward", partial(function, x))
    scores, learnt, upstream = x.clone().requires_grad_(), alpha.requires_grad_(), torch.randn_like(x)
    for name in ("softmax", "1.5-entmax", "α per row"):
        inputs = (scores, learnt) if name == "α per row" else (scores,)
        output = functions[name](scores)
        yield timed(
            case, f"{name}, backward", partial(torch.autograd.grad, output, inputs, upstream, retain_graph=True)
        )


def peer_rows(case: str, x: Tensor) -> Iterator[Measured]:
    """The entmax package."""
    try:
        import entmax as peer
    except ImportError:
        yield {"case": case, "what": "entmax package, 1.5, forward", "skipped": "not installed"}
        return
    yield timed(case, "entmax package, 1.5, forward", partial(peer.entmax15, x, -1))


def local_heads(length: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in bfloat16 whose scores fall off with the distance: blocks far away have no weight."""
    batch = max(1, 16384 // length)
    base = torch.randn(2, batch, heads, length, 64, device=device) * 0.5
    angle = torch.arange(length, device=device)[:, None] / 2.0 ** torch.arange(5, 13, device=device)
    base[..., :16] += 2.5 * torch.cat([angle.cos(), angle.sin()], -1)
    query, key = base.bfloat16().unbind()
    return query, key, torch.randn_like(key)


def attention(device: torch.device) -> Iterator[Measured]:
    """Forward + backward, causal and not, 16 heads of 64 in bfloat16; all take the same tensors."""
    for length in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        inputs = [x.requires_grad_() for x in local_heads(length, 16 if length <= 16384 else 4, device)]
        for causal in (True, False) if length <= 16384 else (True,):
            case = f"attention {tuple(inputs[0].shape)}, {'causal' if causal else 'full'}"
            for name, function, others in competitors(causal, length, inputs[0].shape[1], device):
                yield timed(case, f"{name}, forward", partial(function, *inputs))
                yield timed(case, f"{name}, forward + backward", forward_and_backward(function, inputs, others))
            if causal:
                yield {"case": case, "what": "share of tiles with weight", "share": active_share(inputs)}
    for keys in (4096, 32768, 131072):
        yield from decoding(keys, device)


def forward_and_backward(function: Callable[..., Tensor], inputs: list[Tensor], others: tuple[Tensor, ...]) -> Run:
    """A training step of the function alone."""
    upstream = torch.randn_like(inputs[2])

    def run() -> None:
        torch.autograd.grad(function(*inputs), (*inputs, *others), upstream)

    return run


def competitors(
    causal: bool, length: int, heads: int, device: torch.device
) -> Iterator[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Names, functions of query, key and value, and what else gets a gradient."""
    learnt = torch.full((heads,), 1.5, device=device, requires_grad=True)
    yield "ours, α 1.5", lambda q, k, v: entmax_attention(q, k, v, 1.5, is_causal=causal), ()
    yield "ours, α 2", lambda q, k, v: entmax_attention(q, k, v, 2.0, is_causal=causal), ()
    yield "ours, α learnt", lambda q, k, v: entmax_attention(q, k, v, learnt, is_causal=causal), (learnt,)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    yield "flash attention", flash, ()

    def adasplash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        import adasplash

        return adasplash.adasplash(q, k, v, alpha=1.5, is_causal=causal)

    yield "adasplash", adasplash, ()
    if length in (4096, 16384):  # compiled for each
        yield "flex attention", flex(causal), ()


def flex(causal: bool) -> Callable[..., Tensor]:
    """Compiled at its first call."""
    compiled: list[Callable[..., Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not compiled:
            seen = lambda b, h, i, j: i >= j  # noqa: E731
            mask = create_block_mask(seen, None, None, q.shape[2], k.shape[2]) if causal else None
            function = torch.compile(flex_attention)
            compiled.append(lambda q, k, v: function(q, k, v, block_mask=mask))
        return compiled[0](q, k, v)

    return attend


def active_share(inputs: list[Tensor]) -> float:
    """Of the tiles that a causal mask leaves, how many have weight at α = 1.5."""
    from sparse_attn.kernels.triton.attention import forward
    from sparse_attn.kernels.triton.plan import Plan, Setting

    query, key, value = (x.detach() for x in inputs)
    setting = Setting(0.5, 1 / math.sqrt(query.shape[-1]), 0.0, 0)
    *_, flags = forward(query, key, value, None, None, None, None, setting, True, False)
    plan = Plan.of(query, value)
    last = torch.arange(1, flags.shape[1] + 1) * plan.block_m
    visible = int(((last.clamp(max=key.shape[2]) + plan.block_n - 1) // plan.block_n).sum()) * len(flags)
    return float(flags.sum()) / visible


def decoding(keys: int, device: torch.device) -> Iterator[Measured]:
    """One query against a cache, without gradients."""
    query = torch.randn(8, 32, 1, 128, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, 8, 8, keys, 128, device=device, dtype=torch.bfloat16)
    alpha = torch.full((32,), 1.5, device=device)
    case = f"decoding with {keys} keys"
    yield timed(case, "ours, α learnt", partial(entmax_attention, query, key, value, alpha, enable_gqa=True))
    softmax = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    yield timed(case, "scaled_dot_product_attention", softmax)


def table(timings: list[Measured]) -> Iterator[str]:
    """Milliseconds of every case, a row for each; the first column is what the case is."""
    yield "| case | what | ms | MiB |"
    yield "|---|---|---|---|"
    for line in timings:
        if "seconds" in line:
            figures = f"{line['seconds'] * 1e3:.3f} | {line['bytes'] / 2**20:.0f}"
        else:
            figures = f"{line['share']:.2f} |" if "share" in line else f"{line['skipped']} |"
        yield f"| {line['case']} | {line['what']} | {figures} |"


def page(result: dict[str, Any]) -> Iterator[str]:
    """The dated page of benchmarks/."""
    checks = result["checks"]
    yield "# The Triton kernels on a GPU"
    yield ""
    yield "Made by `python scripts/gpu_check.py`; raw figures in `gpu.json`."
    yield ", ".join(f"{name} {value}" for name, value in result["environment"].items()) + "."
    yield f"Backend: {backends()['triton']}."
    yield ""
    yield f"{sum(check['right'] for check in checks)} of {len(checks)} checks against float64 are right."
    yield "Times are medians between device events of calls on the same tensors; a row of 256 MiB of scores moves as"
    yield "many bytes as `copy` in its forward pass."
    yield ""
    yield from table(result["timings"])
    yield ""
    yield "## Checks"
    yield ""
    yield "| case | largest relative error | bound |"
    yield "|---|---|---|"
    for check in checks:
        wrong = "" if check["right"] else " WRONG"
        yield f"| {check['case']} | {check['error']}{wrong} | {check['bound']:.0e} |"


if __name__ == "__main__":
    sys.exit(main())
