"""The checks of `gpu_check.py`: values and all gradients against float64, and the kernels' behaviour on a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from sparse_attn import entmax, entmax_attention, entmax_loss, topk_softmax, use_backend
from sparse_attn.kernels.triton.attention.dropout import multipliers

Measured = dict[str, Any]

ALPHAS = (1.0, 1.0001, 1.01, 1.3, 1.5, 1.8, 2.0, 2.5)
PER_HEAD = (1.0, 1.01, 1.4, 2.0)
BOUNDS = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
HEADS, KEY_HEADS = 4, 2
# Together these cases cover every feature. Some features occur with one α per head and with one α for all heads.
FEATURES = (
    ("per head", "learnt mask"),
    ("per head", "causal"),
    ("per head", "dropout"),
    (1.3, "lower right"),
    (1.3, "dropout"),
    (1.5, "causal"),
    (1.5, "boolean mask"),
    (2.0, "padding"),
    (2.0, "learnt mask"),
)


def tasks(device: torch.device) -> list[Callable[[], Measured]]:
    """The checks; on a CPU there are fewer."""
    small = device.type == "cpu"
    wide, both = (torch.float32,), (torch.float32, torch.bfloat16)
    checks: list[partial[Measured]] = []
    for queries, keys in ((37, 53),) if small else ((37, 53), (777, 777), (129, 2051), (2500, 1500)):
        for dtype in wide if small else both:
            for alpha, feature in FEATURES:
                checks.append(partial(check_attention, alpha, feature, queries, keys, 64, dtype, device))
    for head in (16, 40, 128, 256):
        for dtype in wide if small else both:
            queries, keys = (37, 53) if small else (300, 1100)
            checks.append(partial(check_attention, "per head", "causal", queries, keys, head, dtype, device))
    for dtype in wide if small else (*both, torch.float16):
        checks.append(partial(check_attention, 1.0, "boolean mask", 37, 53, 64, dtype, device))
        checks.append(partial(check_decoding, 2051 if small else 20011, dtype, device))
    for size in (1, 7, 1021, 16411) if small else (1, 7, 127, 1021, 4099, 16384, 32000, 50257, 131101):
        for dtype in wide if small else (*both, torch.float16):
            checks.append(partial(check_rows, size, dtype, device))
        if size > 7:
            checks.append(partial(check_top_k, size, device))
    for size in (1021,) if small else (32000, 128256, 256000):
        checks.append(partial(check_loss, size, device))
    if not small:
        alone = (check_graph, check_compiled, check_checkpoint, check_compiles_once)
        checks += [partial(check, device) for check in alone]
        checks += [partial(check_far_places, device, sequence_first) for sequence_first in (False, True)]
    return [partial(guarded, check) for check in checks]


def guarded(check: partial[Measured]) -> Measured:
    """Run a check; an error, for example from a kernel that does not compile, is reported as a wrong result."""
    try:
        return check()
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return {"case": name_of(check), "error": why, "bound": 0.0, "right": False, "lost": is_lost()}


def name_of(task: partial[Measured]) -> str:
    """The name of a check: its function and its arguments."""
    check = task.args[0] if task.func is guarded else task
    return " ".join(str(x) for x in (check.func.__name__, *check.args))


def is_lost() -> bool:
    """Whether this process can no longer use its device."""
    try:
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def judged(case: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], bound: float) -> Measured:
    """The largest error, relative to the largest entry of each tensor."""
    errors = [
        float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-30))
        for x, y in zip(got, wanted, strict=True)
    ]
    right = all(error <= bound for error in errors)  # False for NaN
    return {"case": case, "error": f"{max(errors):.1e}", "bound": bound, "right": right}


def without_edges(upstream: Tensor, scores: Tensor, alpha: Tensor) -> Tensor:
    """The upstream gradient (..., D), 0 for rows at α = 2 with a score within 1e-5 of the edge of the support.

    In such a row, rounding to float32 may move an entry across the edge, and at α = 2 the gradient then changes by 1e-2
    to 1e-1. About every other run had such a row; this is not an error of a kernel.
    """
    p = entmax(scores.double(), 2.0)
    threshold = scores - p
    threshold = threshold.masked_fill(p == 0, float("-inf")).amax(-1, keepdim=True)
    edge = ((scores - threshold).abs() < 1e-5).any(-1, keepdim=True) & (alpha == 2.0)
    return upstream.masked_fill(edge, 0.0)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """A result and its gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))


def check_rows(size: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """Check eight rows, each with its own α and the gradient for it."""
    x = (torch.randn(len(ALPHAS), size, device=device) * 2).to(dtype)
    alpha = torch.tensor(ALPHAS, device=device)[:, None]
    upstream = without_edges(torch.randn(x.shape, device=device).to(dtype), x.double(), alpha)
    got = with_gradients(entmax, [x, alpha], upstream)
    with use_backend("torch"):
        wanted = with_gradients(entmax, [x.double(), alpha.double()], upstream)
    if size == 1:  # the gradients are zero up to rounding
        got, wanted = got[:1], wanted[:1]
    return judged(f"rows of {size}, {str(dtype)[6:]}", got, wanted, BOUNDS[dtype])


def check_top_k(size: int, device: torch.device) -> Measured:
    """Check top-7 softmax of rows in which many scores are equal."""
    x, upstream = torch.randint(-9, 9, (8, size), device=device).float(), torch.randn(8, size, device=device)
    got = with_gradients(lambda x: topk_softmax(x, 7), [x], upstream)
    with use_backend("torch"):
        wanted = with_gradients(lambda x: topk_softmax(x, 7), [x.double()], upstream)
    return judged(f"top 7 of {size}", got, wanted, BOUNDS[torch.float32])


def check_loss(size: int, device: torch.device) -> Measured:
    """Check a loss over a vocabulary of this size, with a learnt α."""
    x, target = torch.randn(3, size, device=device), torch.tensor([0, 7, size - 1], device=device)
    inputs, upstream = [x, torch.tensor(1.4, device=device)], torch.ones((), device=device)
    got = with_gradients(lambda x, alpha: entmax_loss(x, target, alpha), inputs, upstream)
    with use_backend("torch"):
        wide = [x.double() for x in inputs]
        wanted = with_gradients(lambda x, alpha: entmax_loss(x, target, alpha), wide, upstream)
    return judged(f"loss of {size} classes", got, wanted, BOUNDS[torch.float32])


def check_attention(
    alpha: str | float,
    feature: str,
    queries: int,
    keys: int,
    head: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Measured:
    """Check attention with grouped heads and one more feature, against plain torch in float64."""
    shapes = ((2, HEADS, queries, head), (2, KEY_HEADS, keys, head), (2, KEY_HEADS, keys, head))
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    if alpha == "per head":
        inputs.append(torch.tensor(PER_HEAD, device=device))
    if feature == "learnt mask":
        inputs.append(torch.randn(1, HEADS, 1, keys, device=device))
    upstream = torch.randn(2, HEADS, queries, head, device=device).to(dtype)
    mask: Tensor | None = None
    if feature == "boolean mask":
        mask = torch.rand(2, 1, queries, keys, device=device) < 0.5
        mask[:, :, 3] = False
    elif feature == "padding":
        mask = torch.arange(keys, device=device) < torch.tensor([keys, keys // 3], device=device).view(2, 1, 1, 1)
    elif feature == "lower right":
        mask = causal_lower_right(queries, keys)
    dropout_p = 0.3 if feature == "dropout" else 0.0
    upstream = without_edges(upstream, scores_of(inputs, mask, feature), per_head(alpha, device))

    def attend(*tensors: Tensor) -> Tensor:
        rest = list(tensors[3:])
        one = rest.pop(0) if alpha == "per head" else alpha
        how = {"is_causal": feature == "causal", "enable_gqa": True}
        torch.manual_seed(7)  # the seed of the dropout
        if tensors[0].dtype != torch.float64 or not dropout_p:
            return entmax_attention(*tensors[:3], one, rest[0] if rest else mask, dropout_p, **how)
        seed = torch.randint(2**31 - 1, (1,), device=device)
        query, key, value = tensors[0], *(x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in tensors[1:3])
        scores = query @ key.transpose(-2, -1) / head**0.5
        weights = entmax(scores, one.view(-1, 1, 1) if isinstance(one, Tensor) else one)
        return (weights * multipliers(weights, seed, dropout_p)) @ value

    got = with_gradients(attend, inputs, upstream)
    with use_backend("torch"):
        wanted = with_gradients(attend, [x.double() for x in inputs], upstream)
    case = f"attention, α {alpha}, {feature}, L {queries} S {keys} D {head}, {str(dtype)[6:]}"
    return judged(case, got, wanted, BOUNDS[dtype])


def per_head(alpha: str | float, device: torch.device) -> Tensor:
    """The α of each head, (H, 1, 1)."""
    numbers = PER_HEAD if isinstance(alpha, str) else (alpha,) * HEADS
    return torch.tensor(numbers, device=device).view(-1, 1, 1)


def scores_of(inputs: list[Tensor], mask: Tensor | None, feature: str) -> Tensor:
    """The scores of a check in float64."""
    query, key = (x.double() for x in inputs[:2])
    scores = query @ key.repeat_interleave(HEADS // KEY_HEADS, 1).transpose(-2, -1) / query.shape[-1] ** 0.5
    queries, keys = scores.shape[-2:]
    if feature in ("causal", "lower right"):
        offset = 0 if feature == "causal" else keys - queries
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(offset + 1), float("-inf"))
    if feature == "learnt mask":
        return scores + inputs[-1].double()
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def check_decoding(keys: int, dtype: torch.dtype, device: torch.device) -> Measured:
    """Check one query against a cache that is not full."""
    query, key, value = (
        torch.randn(3, heads, n, 64, device=device).to(dtype) for heads, n in ((8, 1), (2, keys), (2, keys))
    )
    mask = torch.arange(keys, device=device) < torch.tensor([keys, 1500, 17], device=device).view(3, 1, 1, 1)
    alpha = torch.linspace(1, 2, 8, device=device)
    got = entmax_attention(query, key, value, alpha, mask, enable_gqa=True)
    with use_backend("torch"):
        wide = (x.double() for x in (query, key, value, alpha))
        wanted = entmax_attention(*wide, mask, enable_gqa=True)
    return judged(f"decoding with {keys} keys, {str(dtype)[6:]}", (got,), (wanted,), BOUNDS[dtype])


def few_inputs(device: torch.device) -> list[Tensor]:
    """Query, key, value and α, with gradients."""
    inputs = [torch.randn(1, HEADS, 300, 64, device=device, requires_grad=True) for _ in range(3)]
    return [*inputs, torch.tensor([1.0, 1.3, 1.5, 2.0], device=device, requires_grad=True)]


def check_graph(device: torch.device) -> Measured:
    """Check a captured forward and backward, replayed on other data: a capture allows no waiting for the device."""
    inputs = few_inputs(device)

    def step(dropout_p: float = 0.0) -> tuple[Tensor, ...]:
        output = entmax_attention(*inputs, is_causal=True, dropout_p=dropout_p)
        return output, *torch.autograd.grad(output, inputs, torch.ones_like(output))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
            step(0.5)
    torch.cuda.current_stream().wait_stream(side)
    graph, dropping = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.cuda.graph(dropping):
        dropped, *_ = step(0.5)
    with torch.no_grad():
        for x in inputs[:3]:
            x.copy_(torch.randn_like(x))
        inputs[3].copy_(torch.tensor([2.0, 1.1, 1.7, 1.2]))
    graph.replay()
    result = judged("a CUDA graph", captured, step(), BOUNDS[torch.float32])
    dropping.replay()
    first = dropped.clone()
    dropping.replay()
    if torch.equal(first, dropped):
        result |= {"right": False, "error": "each replay drops the same weights"}
    return result


def check_compiled(device: torch.device) -> Measured:
    """Check that forward and backward under torch.compile equal the eager ones."""
    inputs = few_inputs(device)
    upstream = torch.randn(inputs[0].shape, device=device)
    compiled = torch.compile(lambda *x: entmax_attention(*x, is_causal=True) * 2, fullgraph=True)
    wanted = with_gradients(lambda *x: entmax_attention(*x, is_causal=True) * 2, inputs, upstream)
    got = with_gradients(compiled, inputs, upstream)
    return judged("torch.compile(fullgraph=True)", got, wanted, BOUNDS[torch.float32])


def check_checkpoint(device: torch.device) -> Measured:
    """Check activation checkpointing under autocast: the second forward must drop the same weights."""
    inputs = few_inputs(device)
    upstream = torch.randn(inputs[0].shape, device=device)

    def attend(*x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return entmax_attention(*x, dropout_p=0.5)

    def again(*x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)

    results = []
    for function in (again, attend):
        torch.manual_seed(1)
        results.append(with_gradients(function, inputs, upstream))
    return judged("activation checkpointing, autocast, dropout", *results, 1e-6)


def check_compiles_once(device: torch.device) -> Measured:
    """Check that new values of a learnt α, and new lengths that 16 does not divide, cause no compilation."""
    from triton import knobs

    compiled: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(str(what.get("repr")))
    try:
        counts = []
        for values, length in (((1.3, 1.7), 2051), ((1.0, 2.0), 2053), ((1.5, 1.5), 2054), ((1.0001, 3.0), 2063)):
            inputs = [torch.randn(1, 2, length, 64, device=device).bfloat16() for _ in range(3)]
            inputs.append(torch.tensor(values, device=device))
            with_gradients(lambda *x: entmax_attention(*x, is_causal=True), inputs, inputs[0])
            counts.append(len(compiled))
    finally:
        knobs.runtime.jit_post_compile_hook = before
    right = 0 < counts[0] == counts[-1]
    return {"case": "kernels compiled, step by step", "error": str(counts), "bound": 0.0, "right": right}


def check_far_places(device: torch.device, sequence_first: bool) -> Measured:
    """Check tensors of more than 2³¹ entries: the last example has the same result in the batch as alone."""
    batch = 33000
    case = f"more than 2³¹ entries, {'sequence' if sequence_first else 'batch'} first"
    needed = 12 * batch * 16 * 64 * 64 * 2
    if torch.cuda.mem_get_info()[0] < needed:
        return {"case": case, "unsuited": f"needs {needed / 2**30:.0f} GiB of free device memory"}
    base = torch.randn(3, 1, 16, 64, 64, device=device).bfloat16()
    alpha = torch.linspace(1, 2, 16, device=device)
    inputs = [x.repeat(batch, 1, 1, 1) for x in base]
    if sequence_first:  # (L, N, H, D) in memory, as in layers without batch_first
        inputs = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    output = entmax_attention(*inputs, alpha)
    got = (output[-1:], *(grad[-1:] for grad in torch.autograd.grad(output, inputs, output.detach())))
    alone = [x.detach()[-1:].contiguous().requires_grad_() for x in inputs]
    output = entmax_attention(*alone, alpha)
    wanted = (output, *torch.autograd.grad(output, alone, output.detach()))
    return judged(case, got, wanted, 1e-6)
