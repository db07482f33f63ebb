"""Direct calls of the C kernel give the results of ordinary calls; unsupported calls take the ordinary path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_attn import entmax, entmax_attention, topk_attention, use_backend
from sparse_attn.kernels.cpu import rows
from sparse_attn.ops import attention

pytestmark = pytest.mark.skipif(not rows.available(), reason="no compiled kernels")


def tensors(*, kv_heads: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((2, 6, 11, 5), (2, kv_heads, 13, 5), (2, kv_heads, 13, 7))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def results(attend: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = attend()
    return [output, *torch.autograd.grad(output.float().sin().sum(), inputs)]


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """A list that gets True for each call of attention that went directly to the C kernel, and False for others."""
    seen: list[bool] = []
    attend_directly = attention.attend_directly

    def recorded(*arguments):
        output = attend_directly(*arguments)
        seen.append(output is not None)
        return output

    monkeypatch.setattr(attention, "attend_directly", recorded)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 2.0, "is_causal": True},
        {"k": 3},
        {"k": 3, "scale": 0.3, "is_causal": True},
        {"alpha": "per head", "enable_gqa": True},
        {"attn_mask": torch.rand(2, 1, 1, 13) > 0.3},
        {"attn_mask": torch.rand(1, 6, 11, 13) > 0.3, "enable_gqa": True, "alpha": "per head"},
        {"attn_mask": torch.randn(1, 6, 1, 13), "alpha": 1.0},
    ],
)
def test_direct_and_ordinary_calls_agree(options, dtype, taken, monkeypatch):
    inputs = tensors(kv_heads=2 if "enable_gqa" in options else 6, dtype=dtype)
    options = dict(options)
    if options.get("alpha") == "per head":
        options["alpha"] = torch.linspace(1, 2, 6).requires_grad_()
    learnt = [x.requires_grad_() for x in options.values() if isinstance(x, Tensor) and x.is_floating_point()]
    attend = topk_attention if "k" in options else entmax_attention

    def run() -> list[Tensor]:
        return results(lambda: attend(*inputs, **options), [*inputs, *learnt])

    first, second = run(), run()
    assert taken == [True, True]
    monkeypatch.setattr(attention, "attend_directly", lambda *arguments: None)
    for got, again, wanted in zip(first, second, run(), strict=True):
        assert torch.equal(got, wanted) and torch.equal(again, wanted)
        assert got.stride() == wanted.stride() and got.dtype == wanted.dtype


class Subclass(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use, in torch.func.jvp
def test_unsupported_calls_are_not_direct(taken):
    query, key, value = (x.detach() for x in tensors())
    output = entmax_attention(query, key, value)
    assert taken.pop()
    with use_backend("torch"):
        torch.testing.assert_close(entmax_attention(query, key, value), output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert entmax_attention(query, key, value).dtype == torch.bfloat16
    mapped = torch.func.vmap(entmax_attention)(query, key, value)
    torch.testing.assert_close(mapped, output)
    _, tangent = torch.func.jvp(lambda x: entmax_attention(x, key, value), (query,), (torch.ones_like(query),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        by_level = torch.autograd.forward_ad.unpack_dual(entmax_attention(dual, key, value)).tangent
    torch.testing.assert_close(by_level, tangent)
    entmax_attention(query.as_subclass(Subclass), key, value)
    entmax_attention(query[0], key, value)
    entmax_attention(query, key[:, :1], value[:, :1])
    entmax_attention(query, key, value, attn_mask=torch.ones(13, dtype=torch.bool))
    entmax_attention(query, key, value, alpha=torch.tensor(1.5))
    entmax_attention(query[:0], key[:0], value[:0])
    assert entmax_attention(*(x.to("meta") for x in (query, key, value))).is_meta
    assert not any(taken)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"alpha": True}, TypeError),
        ({"alpha": -1.0}, ValueError),
        ({"alpha": float("nan")}, ValueError),
        ({"alpha": torch.tensor([1.5, 1.0, 2.0, 1.2, -1.0, 1.0])}, ValueError),
        ({"alpha": torch.tensor([1.5, 1.0, 2.0, 1.2, float("nan"), 1.0])}, ValueError),
        ({"alpha": torch.tensor([1.5, 1.0])}, ValueError),
        ({"key": torch.randn(2, 6, 12, 5)}, ValueError),
        ({"key": torch.randn(2, 6, 13, 5).double()}, TypeError),
        ({"attn_mask": torch.ones(2, 6, 11, 12, dtype=torch.bool)}, ValueError),
        ({"attn_mask": torch.ones(2, 6, 11, 13, dtype=torch.int32)}, TypeError),
        ({"attn_mask": torch.ones(2, 6, 11, 13, dtype=torch.bool), "is_causal": True}, ValueError),
        ({"dropout_p": 2.0}, ValueError),
        ({"dropout_p": "0"}, TypeError),
    ],
)
def test_wrong_arguments_raise_an_error_after_a_valid_call(changed, error):
    arguments = dict(zip(("query", "key", "value"), tensors(), strict=True))
    entmax_attention(**arguments)
    with pytest.raises(error):
        entmax_attention(**{**arguments, **changed})


def test_the_default_device_changes_nothing():
    query, key, value = tensors()
    scores = torch.randn(7, 11, requires_grad=True)
    alpha = torch.full((6,), 1.5, requires_grad=True)
    with torch.device("meta"):
        assert entmax_attention(query, key, value, alpha).sum().backward() is None
        entmax(scores, 1.3).sin().sum().backward()
        longer = [x.repeat(1, 1, 50, 1) for x in (query, key, value)]
        output = entmax_attention(*longer, dropout_p=0.5)
        torch.autograd.grad(output.sum(), longer, create_graph=True)
    assert all(x.grad is not None and x.grad.device.type == "cpu" for x in (query, key, value, alpha, scores))
