"""Fused attention in Triton: output and every gradient are those of a matrix of weights in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn.kernels import triton
from sparse_attn.kernels.functions import fused as operator
from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.kernels.functions.fused import fused_attention
from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import arguments, decode, plan
from sparse_attn.kernels.triton.attention import backward as attention_backward
from sparse_attn.kernels.triton.attention import forward as attention
from sparse_attn.kernels.triton.attention.dropout import multipliers

ALPHAS = (1.0, 1.0001, 1.01, 1.3, 1.5, 2.0)


def tensors(
    device: torch.device, *, batch: int = 1, heads: int = 2, groups: int = 1, queries: int = 37, keys: int = 53
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value whose head sizes are no powers of two, and differ."""
    shapes = (batch, heads, queries, 19), (batch, heads // groups, keys, 19), (batch, heads // groups, keys, 23)
    return tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    mask: Tensor | None = None,
    *,
    offset: int | None = None,
    scale: float = 0.3,
    key_lengths: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    """With the matrix of weights."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-2, -1) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
    if offset is not None:
        seen = seen.tril(offset)
    if key_lengths is not None:
        seen = seen & (torch.arange(key.shape[2], device=query.device) < key_lengths.view(-1, 1, 1, 1))
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~seen, -math.inf)
    weights = entmax_rows(scores, alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha, -1e300)
    weights = weights if multiplier is None else weights * multiplier
    return weights @ value.repeat_interleave(group, 1)


def compare(inputs: tuple[Tensor, ...], alpha: float | Tensor, bound: float = 2e-6, **how: Any) -> list[Tensor]:
    """Output and gradients against float64, to a bound of the largest entry; returns what the kernels gave."""
    mask = how.pop("mask", None)
    multiplier = how.pop("multiplier", None)
    scale = how.setdefault("scale", 0.3)
    output = fused_attention(*inputs, alpha, mask, **how)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wide_alpha = alpha.detach().double().requires_grad_() if isinstance(alpha, Tensor) else alpha
    learnt = mask is not None and mask.requires_grad
    wide_mask = mask.detach().double().requires_grad_() if learnt else mask
    how = {name: value for name, value in how.items() if name not in ("dropout_p", "scale")}
    wanted = expected(*wide, wide_alpha, wide_mask, scale=scale, multiplier=multiplier, **how)
    pairs = [*zip(inputs, wide, strict=True)]
    pairs += [(alpha, wide_alpha)] if isinstance(alpha, Tensor) and alpha.requires_grad else []
    pairs += [(mask, wide_mask)] if learnt else []
    upstream = torch.randn_like(output)
    got = [output, *torch.autograd.grad(output, [pair[0] for pair in pairs], upstream)]
    right = [wanted, *torch.autograd.grad(wanted, [pair[1] for pair in pairs], upstream.double())]
    for actual, reference in zip(got, right, strict=True):
        assert actual.shape == reference.shape
        worst = (actual.double() - reference).abs().max() / reference.abs().max()
        assert worst <= bound, worst
    return got


@pytest.fixture(params=["short", "long"])
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the scores of all keys are on the chip: the second kernel takes the same small sizes."""
    for name in ("_SHORT", "_SHORT_IN_FLOAT32"):
        monkeypatch.setattr(plan, name, 1024 if request.param == "short" else 0)
    return request.param


def test_alpha_per_head_grouped_heads_an_offset_and_a_learnt_mask(length, device):
    alpha = torch.tensor(ALPHAS, device=device, requires_grad=True)
    mask = torch.randn(1, 6, 1, 53, device=device)
    mask[..., :3] = -math.inf
    mask[..., 3:5] = torch.finfo(torch.float32).min
    inputs = tensors(device, heads=6, groups=3)
    compare(inputs, alpha, mask=mask.requires_grad_(), offset=7)


@pytest.mark.parametrize("alpha", [1.0001, 1.5, 2.0])
def test_one_alpha_lengths_and_a_boolean_mask(alpha, length, device):
    mask = torch.rand(1, 2, 37, 53, device=device) < 0.7
    mask[:, 0, 5] = False
    lengths = torch.tensor([53, 11], device=device)
    inputs = tensors(device, batch=2)
    output, grad_query, *_ = compare(inputs, alpha, mask=mask, key_lengths=lengths)
    assert not output[:, 0, 5].any() and not grad_query[:, 0, 5].any()


@pytest.mark.parametrize("shape", [(37, 53), (37, 1)])
def test_a_learnt_mask_of_fewer_dimensions(shape, device):
    mask = torch.randn(1, 1, *shape, device=device, requires_grad=True)
    if shape[1] == 1:  # the same for all keys of a query: it moves nothing
        inputs = tensors(device)
        output = fused_attention(*inputs, 1.5, mask, scale=0.3)
        assert torch.autograd.grad(output, mask, torch.randn_like(output))[0].abs().max() < 1e-5
    else:
        compare(tensors(device, batch=2), 1.5, mask=mask, offset=0)


def test_queries_that_see_nothing_give_zeros(length, device):
    inputs = tensors(device, queries=13, keys=17)
    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    output, *grads = compare(inputs, alpha, offset=-5)
    assert not output[:, :, :5].any() and not grads[0][:, :, :5].any()
    assert all(grad.isfinite().all() for grad in grads)
    nothing = fused_attention(*inputs, alpha, torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device), scale=0.3)
    assert not nothing.any()
    assert not any(grad.any() for grad in torch.autograd.grad(nothing.sum(), (*inputs, alpha)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, length, device):
    alpha = torch.tensor([1.0, 1.7], device=device, requires_grad=True)
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in tensors(device, queries=131, keys=71))
    got = compare(inputs, alpha, 2e-3 if dtype == torch.float16 else 1.5e-2, offset=11)
    assert [x.dtype for x in got] == [dtype] * 4 + [torch.float32]


def test_many_keys_on_the_chip(device, monkeypatch):
    monkeypatch.setattr(plan, "_SHORT_IN_FLOAT32", 1024)
    alpha = torch.tensor([1.0, 1.6], device=device, requires_grad=True)
    inputs = tensors(device, queries=17, keys=121)
    assert plan.Plan.of(inputs[0], inputs[2]).short(121, 4, 2**17)
    compare(inputs, alpha, offset=90)


@pytest.mark.parametrize("sizes", [(5, 3), (64, 128), (200, 31)])
def test_head_sizes(sizes, device):
    query, key, value = (
        torch.randn(1, 1, length, size, device=device, requires_grad=True)
        for length, size in ((17, sizes[0]), (41, sizes[0]), (41, sizes[1]))
    )
    # The interpreter multiplies by numpy, whose rounding of long sums depends on its BLAS.
    compare((query, key, value), 1.5, 5e-6, scale=0.1)


def test_dropped_weights_are_the_same_in_every_pass(length, device, monkeypatch):
    seed = torch.tensor([1234567890123], device=device)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seed)
    alpha = torch.tensor([1.3, 1.6], device=device, requires_grad=True)
    multiplier = multipliers(torch.empty(1, 2, 37, 53, device=device), seed, 0.3)
    assert abs(multiplier.mean() - 1) < 0.03
    assert multiplier.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    compare(tensors(device), alpha, multiplier=multiplier, dropout_p=0.3)
    assert not fused_attention(*tensors(device), 1.5, dropout_p=1.0, scale=0.3).any()


def test_tiles_without_weight_are_skipped(device):
    query, key, value = tensors(device, heads=1, queries=70, keys=300)
    with torch.no_grad():
        query[..., 0] = 20.0
        key[..., 0] = -1.0
        key[:, :, 40:50, 0] = 1.0  # the only keys with weight: of ten tiles, one
    compare((query, key, value), 1.5)
    sizes = plan.Plan.of(query, value)
    setting = Setting(0.5, 0.3, 0.0, None)
    *_, flags = attention.forward(query, key, value, None, None, None, None, setting, True)
    used = sorted({position // sizes.block_n for position in range(40, 50)})
    assert flags.shape[2] >= 9
    assert flags.sum((0, 1)).nonzero()[:, 0].tolist() == used


def test_what_is_no_number_stays_in_its_row(length, device):
    query, key, value = (x.detach() for x in tensors(device, queries=7))
    query[0, 1, 3] = math.nan
    output = fused_attention(query, key, value, 1.5, scale=0.3)
    assert output[0, 1, 3].isnan().all()
    output[0, 1, 3] = 0
    assert output.isfinite().all()
    for bad in (slice(3, 4), slice(None)):  # in one row of a tile, in all
        query[0, 1, bad] = math.nan
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output = fused_attention(*inputs, 1.5, scale=0.3)
        for grad in torch.autograd.grad(output.sum(), inputs):
            hit = grad.isnan().all(-1)
            assert not hit[0, 0].any() and hit[0, 1, bad if len(grad[0, 1]) == 7 else slice(None)].all()
    query[0, 1] = 1.0
    wrong = fused_attention(query, key, value, torch.tensor([1.5, -1.0], device=device), scale=0.3)
    assert wrong[:, 1].isnan().all() and wrong[:, 0].isfinite().all()


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, "per head"])
def test_few_queries_to_many_keys(alpha, device, monkeypatch):
    monkeypatch.setattr(decode, "_MANY", 100)
    monkeypatch.setattr(decode, "_SPLITS", 2)
    calls = []
    forward = decode.forward
    monkeypatch.setattr(decode, "forward", lambda *args: calls.append(args) or forward(*args))
    inputs = [x.detach() for x in tensors(device, batch=2, heads=6, groups=3, queries=3, keys=307)]
    alpha = torch.tensor(ALPHAS, device=device) if alpha == "per head" else alpha
    mask = torch.randn(1, 6, 3, 307, device=device)
    mask[..., 100:200] = -math.inf
    how = {"scale": 0.3, "offset": 304, "key_lengths": torch.tensor([307, 251], device=device)}
    output = fused_attention(*inputs, alpha, mask, **how)
    assert len(calls) == 1
    wide_alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
    wanted = expected(*(x.double() for x in inputs), wide_alpha, mask.double(), **how)
    assert (output - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore")  # of torch's own, while it checks
def test_the_custom_operator_is_well_behaved(device):
    inputs = tensors(device, queries=5, keys=7)
    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    mask = torch.randn(1, 1, 5, 7, device=device, requires_grad=True)
    arguments = (alpha, mask, None, None, 0.0, 0.3, 0.0, 2)
    torch.library.opcheck(operator._attention, (*inputs, *arguments, True))
    without = [None if x is None else x.detach() for x in (*inputs, *arguments[:4])]
    torch.library.opcheck(operator._attention, (*without, *arguments[4:], False))


@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
def test_under_compile(device):
    inputs = tensors(device, queries=13, keys=17)
    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    mask = torch.randn(1, 1, 13, 17, device=device, requires_grad=True)

    def attend(*inputs: Tensor) -> Tensor:
        return fused_attention(*inputs, scale=0.3).square()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    everything = (*inputs, alpha, mask)
    upstream = torch.randn(1, 2, 13, 23, device=device)
    outputs = [function(*everything) for function in (compiled, attend)]
    assert torch.equal(*outputs)
    grads = [torch.autograd.grad(output, everything, upstream) for output in outputs]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*everything), outputs[1])


@pytest.mark.filterwarnings("ignore")
def test_under_compile_lengths_may_vary_and_weights_are_dropped(device):
    compiles = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def attend(*inputs: Tensor, dropout_p: float = 0.0) -> Tensor:
        return fused_attention(*inputs, scale=0.3, offset=0, dropout_p=dropout_p)

    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    counts = []
    for queries, keys in ((13, 17), (19, 23), (11, 29)):
        inputs = (*tensors(device, queries=queries, keys=keys), alpha)
        torch.testing.assert_close(attend(*inputs), fused_attention(*inputs, scale=0.3, offset=0))
        counts.append(compiles.frame_count)
    assert counts[0] == counts[-1]  # nothing was compiled again
    *others, value = inputs[0], inputs[1], torch.ones_like(inputs[2]).requires_grad_()
    output = attend(*others, value, alpha, dropout_p=0.5)
    assert output.std() > 0.1
    # Each weight is in its value's gradient as it was in the output.
    (grad,) = torch.autograd.grad(output, value, torch.ones_like(output))
    torch.testing.assert_close(grad.sum(), output.sum())


def test_second_derivatives_are_those_of_the_same_function(device):
    inputs = tensors(device, queries=5, keys=7)
    alpha = torch.tensor([1.3, 1.6], device=device, requires_grad=True)

    def second(attend, inputs):
        (grad,) = torch.autograd.grad(attend(*inputs).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    got = second(lambda *x: fused_attention(*x, scale=0.3), (*inputs, alpha))
    wide = [x.detach().double().requires_grad_() for x in (*inputs, alpha)]
    for actual, wanted in zip(got, second(expected, wide), strict=True):
        assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    torch.manual_seed(3)  # the dropout too is the same
    output = fused_attention(*inputs, alpha, dropout_p=0.5, scale=0.3)
    plain, fused = (
        torch.autograd.grad(output, inputs, torch.ones_like(output), create_graph=graph, retain_graph=True)
        for graph in (True, False)
    )
    for pair in zip(plain, fused, strict=True):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def test_gradients_in_batches(device):
    inputs = tensors(device, queries=3, keys=7)
    output = fused_attention(*inputs, 1.5, scale=0.3)
    upstream = torch.randn(2, *output.shape, device=device)
    batched = torch.autograd.grad(output, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for number, one in enumerate(upstream):
        for got, wanted in zip(batched, torch.autograd.grad(output, inputs, one, retain_graph=True), strict=True):
            torch.testing.assert_close(got[number], wanted, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_drops_the_same_weights(device):
    inputs = tensors(device, queries=5, keys=7)

    def attend(*inputs: Tensor) -> Tensor:
        return fused_attention(*inputs, 1.5, dropout_p=0.5, scale=0.3)

    results = []
    for function in (attend, lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(1)
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What is compiled: a kernel for its constants, types of arguments, and integers that are 1 or 16 divides."""
    found: set[Any] = set()

    def record(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        free = kernel.kwargs["do_not_specialize"] if triton.interpreted() else kernel.do_not_specialize

        def specialised(parameter: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(specialised(parameter, field) for field in value)
            if isinstance(value, Tensor):
                return value.dtype
            if parameter.isupper() or value is None:
                return value
            if isinstance(value, int) and parameter not in (free or ()):
                return value == 1, value % 16 == 0
            return type(value)

        key = [specialised(*pair) for pair in zip(kernel.arg_names, arguments, strict=True)]
        found.add((kernel.__name__, *key, *options.items()))

    for module in (attention, attention_backward, decode, decode.rows):
        monkeypatch.setattr(module, "launch", record)
    return found


def test_no_value_of_alpha_compiles_anything_anew(device, compiled):
    inputs = tensors(device)

    def count(*alphas: Any) -> int:
        compiled.clear()
        for alpha in alphas:
            output = fused_attention(*inputs, alpha, scale=0.3, offset=0)
            torch.autograd.grad(output, inputs, output.detach())
        return len(compiled)

    learnt = [
        torch.tensor(values, device=device, requires_grad=True) for values in ((1.0, 2.0), (1.3, 1.5), (2.5, 3.0))
    ]
    assert count(learnt[0]) == count(*learnt) == 5  # forward, two lists, two backwards
    assert count(1.2) == count(1.2, 1.3, 1.0001) == 5
    assert count(1.2, 1.5, 2.0) == 11  # what lists tiles is the same for all
    compiled.clear()
    for scale in (1, 2, 0.3):
        fused_attention(*inputs, 1.5, scale=scale)
    assert len(compiled) == 1


def test_lengths_compile_anew_only_for_keys_that_16_divides(device, compiled, monkeypatch):
    monkeypatch.setattr(plan, "_SHORT_IN_FLOAT32", 0)  # its kernel is made for the number of tiles

    def count(*lengths: tuple[int, int]) -> int:
        compiled.clear()
        for queries, keys in lengths:
            query, key = (torch.zeros(1, 2, n, 16, device=device, requires_grad=True) for n in (queries, keys))
            output = fused_attention(query, key, key, 1.5, scale=0.3, offset=keys - queries)
            torch.autograd.grad(output, query, output.detach())
        return len(compiled)

    lengths = [(97, 97), (101, 125), (112, 127), (128, 113), (111, 111)]
    assert count(lengths[0]) == count(*lengths) == 5
    assert count(*lengths, (96, 96), (97, 112), (112, 128)) == 8  # the lists of tiles are the same
    compiled.clear()
    key = torch.zeros(1, 2, 4111, 16, device=device)
    for keys in (4097, 4098, 4099, 4111):  # a cache that grows
        fused_attention(key[:, :, :1], key[:, :, :keys], key[:, :, :keys], 1.5, scale=0.3)
    assert len(compiled) == 3


def test_rows_far_apart_are_copied(device, monkeypatch):
    monkeypatch.setattr(operator, "_LARGEST_STRIDE", 100)
    inputs = [torch.randn(1, 2, 5, 200, device=device)[..., :16] for _ in range(3)]
    seen = []
    forward = operator._forward
    monkeypatch.setattr(operator, "_forward", lambda *args: seen.extend(args[:3]) or forward(*args))
    output = fused_attention(*inputs, 1.5, scale=0.3)
    assert all(x.stride(-2) == 16 for x in seen)
    torch.testing.assert_close(output, fused_attention(*(x.contiguous() for x in inputs), 1.5, scale=0.3))


def test_tf32_may_be_allowed_either_way(device):
    inputs = tensors(device)
    setting = Setting(0.5, 0.3, 0.0, None)

    def precision() -> str:
        fused_attention(*inputs, 1.5, scale=0.3)
        return arguments.arguments_of(*inputs, None, None, None, None, setting)[2].precision

    assert precision() == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # after which torch refuses to tell the older setting
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are of CUDA")
def test_in_a_cuda_graph(device):
    inputs = [x.detach() for x in tensors(device)]
    alpha = torch.tensor([1.3, 2.0], device=device)
    expected = fused_attention(*inputs, alpha, scale=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused_attention(*inputs, alpha, scale=0.3)
    graph.replay()
    torch.testing.assert_close(output, expected)
