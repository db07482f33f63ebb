"""Attention of packed sequences equals attention of each sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_attn.kernels.choose_attention as choose
from sparse_attn import backends, entmax_attention, entmax_attention_varlen, use_backend

BACKENDS = [name for name in ("compiled", "torch") if not backends()[name].startswith("not")]
LENGTHS_Q, LENGTHS_K = (5, 61, 1, 0, 37), (11, 53, 1, 3, 300)


def starts(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(dtype: torch.dtype = torch.float64, kv_heads: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((sum(LENGTHS_Q), 6, 5), (sum(LENGTHS_K), kv_heads, 5), (sum(LENGTHS_K), kv_heads, 7))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, alpha: float | Tensor, **options) -> Tensor:
    parts = zip(query.split(LENGTHS_Q), key.split(LENGTHS_K), value.split(LENGTHS_K), strict=True)
    outputs = [entmax_attention(*(x.transpose(0, 1) for x in part), alpha, **options) for part in parts]
    return torch.cat(outputs, 1).transpose(0, 1)


def results(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    upstream = torch.linspace(-9, 9, output.numel()).sin().view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("alpha", [1.0, 1.5, "per head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packed_sequences_equal_one_call_per_sequence(dtype, alpha, kv_heads, is_causal, backend):
    inputs = packed(dtype, kv_heads)
    if alpha == "per head":
        alpha = torch.tensor([1.0, 1.1, 1.4, 1.5, 1.7, 2.0], dtype=torch.float64, requires_grad=True)
        inputs = (*inputs, alpha)
    options = {"is_causal": is_causal, "enable_gqa": kv_heads < 6, "scale": 0.3}
    with use_backend(backend):
        for lengths in (torch.int64, torch.int32):
            cumulative = (starts(LENGTHS_Q, lengths), starts(LENGTHS_K, lengths))
            got = results(entmax_attention_varlen(*inputs[:3], *cumulative, alpha, **options), inputs)
            wanted = results(one_by_one(*inputs[:3], alpha, **options), inputs)
            bound = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            for x, y in zip(got, wanted, strict=True):
                assert (x - y).abs().max() <= bound * y.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_second_order_and_dropout(backend, monkeypatch):
    if backend == "compiled":  # with so few scores and dropout, torch would be used instead of the C kernel
        monkeypatch.setattr(choose, "_LARGE", 1)
    query, key, value = (torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    alpha, cumulative = torch.tensor([1.2, 1.6], dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 7])

    def attend(*inputs: Tensor, dropout_p: float = 0.0) -> Tensor:
        torch.manual_seed(1)
        return entmax_attention_varlen(*inputs[:3], cumulative, cumulative, inputs[3], dropout_p=dropout_p)

    with use_backend(backend):
        for dropout_p in (0.0, 0.4):
            inputs, options = (query, key, value, alpha), {"dropout_p": dropout_p}
            assert torch.autograd.gradcheck(lambda *x, o=options: attend(*x, **o), inputs)
            assert torch.autograd.gradgradcheck(lambda *x, o=options: attend(*x, **o), inputs)


def test_empty_batches_and_empty_sequences():
    query, alpha = torch.randn(0, 2, 3, requires_grad=True), torch.tensor([1.5, 1.2], requires_grad=True)
    for lengths in ([0], [0, 0]):
        cumulative = torch.tensor(lengths)
        output = entmax_attention_varlen(query, query, query, cumulative, cumulative, alpha)
        assert output.shape == (0, 2, 3)
        gradients = torch.autograd.grad(output.sum(), (query, alpha))
        assert gradients[0].shape == (0, 2, 3) and gradients[1].tolist() == [0.0, 0.0]
    key = torch.randn(4, 2, 3)
    output = entmax_attention_varlen(key, key, key, torch.tensor([0, 4, 4]), torch.tensor([0, 0, 4]))
    assert (output == 0).all()  # no query sees a key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_as_one_graph():
    query, key, value = packed(torch.float32)
    cumulative = (starts(LENGTHS_Q), starts(LENGTHS_K))
    compiled = torch.compile(entmax_attention_varlen, fullgraph=True)
    got = results(compiled(query, key, value, *cumulative), (query, key, value))
    wanted = results(entmax_attention_varlen(query, key, value, *cumulative), (query, key, value))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y)


WRONG: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"query": torch.randn(3, 2, 4).numpy()}, TypeError, "query must be a torch.Tensor, got ndarray"),
    ({"cu_seqlens_q": [0, 3]}, TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens_q must have the dtype int32 or int64, got"),
    (
        {"cu_seqlens_k": torch.tensor([[0, 5]])},
        ValueError,
        r"cu_seqlens_k must have the shape \(N \+ 1,\), got \(1, 2\)",
    ),
    ({"cu_seqlens_k": torch.tensor([0, 2, 5])}, ValueError, r"the same length N \+ 1, got 2 and 3"),
    ({"cu_seqlens_q": torch.tensor([1, 3])}, ValueError, "cu_seqlens_q must begin with 0, got 1"),
    ({"cu_seqlens_k": torch.tensor([0, 4])}, ValueError, "cu_seqlens_k must end with the total length 5, got 4"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 1, 3])}, ValueError, "cu_seqlens_q must not decrease, got 1 after 2"),
    ({"query": torch.randn(1, 3, 2, 4)}, ValueError, r"query must have the shape \(total, H, D\), got \(1, 3, 2, 4\)"),
    ({"key": torch.randn(5, 3, 4)}, ValueError, "batch and head sizes must broadcast"),
    ({"alpha": -1.0}, ValueError, r"alpha must be in \(0, inf\), got -1"),
    ({"alpha": torch.ones(3)}, ValueError, r"alpha must be a number or have shape \(H,\) = \(2,\), got \(3,\)"),
    ({"dropout_p": 2.0}, ValueError, "dropout_p"),
    ({"is_causal": None}, TypeError, "is_causal must be True or False, got None"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_invalid_input_raises_an_error(change, error, message, backend):
    key, lengths = torch.randn(5, 2, 4), torch.tensor([0, 3])
    arguments = {"query": torch.randn(3, 2, 4), "key": key, "value": key, "cu_seqlens_q": lengths}
    arguments |= {"cu_seqlens_k": torch.tensor([0, 5]), **change}
    if "decrease" in message:
        arguments["cu_seqlens_k"] = torch.tensor([0, 2, 3, 5])
    with use_backend(backend), pytest.raises(error, match=message):
        entmax_attention_varlen(**arguments)
