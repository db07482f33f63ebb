"""Encoder and decoder layers: equal to torch's at α = 1, usable inside torch's stacks; options and errors."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_layers import F64, E, H, L, N, S, padding, randn, short

from sparse_attn import (
    NAPE,
    AdaptiveSparseMultiheadAttention,
    RotaryPositions,
    TopKMultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    alpha_per_head,
)
from sparse_attn.analysis import record_attention

CLASSIC = [
    {"norm_first": first, "activation": activation, "bias": bias, "batch_first": batch_first}
    for first, activation, bias, batch_first in product((False, True), (F.relu, F.gelu), (True, False), (True, False))
]


def results(layer: nn.Module, inputs: tuple[Tensor, ...], **kwargs: Any) -> dict[str, Tensor]:
    """Output, and the gradients of the inputs and of every parameter except α."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    output = layer(*inputs, **kwargs)
    leaves = {f"input {i}": x for i, x in enumerate(inputs)} | dict(layer.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if "raw_alpha" not in name}
    grads = torch.autograd.grad((output * output.detach().cos()).sum(), list(leaves.values()))
    return {"output": output, **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("options", CLASSIC, ids=short)
def test_an_encoder_layer_equals_torch_at_alpha_one(options: dict[str, Any]) -> None:
    dense = nn.TransformerEncoderLayer(E, H, **F64, **options)
    sparse = TransformerEncoderLayer(E, H, alpha_init=1.0, learn_alpha=False, **F64, **options)
    sparse.load_state_dict(dense.state_dict())
    x = randn(N, L, E) if options["batch_first"] else randn(L, N, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    expected = results(dense, (x,), src_mask=causal, is_causal=True)
    torch.testing.assert_close(results(sparse, (x,), src_mask=causal), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results(sparse, (x,), is_causal=True), expected, rtol=1e-9, atol=1e-10)
    expected = results(dense, (x,), src_key_padding_mask=padding(L))
    torch.testing.assert_close(results(sparse, (x,), src_key_padding_mask=padding(L)), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", CLASSIC, ids=short)
def test_a_decoder_layer_equals_torch_at_alpha_one(options: dict[str, Any]) -> None:
    dense = nn.TransformerDecoderLayer(E, H, **F64, **options)
    sparse = TransformerDecoderLayer(E, H, alpha_init=1.0, learn_alpha=False, **F64, **options)
    sparse.load_state_dict(dense.state_dict())
    inputs = (randn(N, L, E), randn(N, S, E)) if options["batch_first"] else (randn(L, N, E), randn(S, N, E))
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    masks = {"memory_key_padding_mask": padding(S), "memory_mask": torch.rand(L, S) < 0.2}
    expected = results(dense, inputs, tgt_mask=causal, tgt_is_causal=True, **masks)
    torch.testing.assert_close(results(sparse, inputs, tgt_is_causal=True, **masks), expected, rtol=1e-9, atol=1e-10)
    expected = results(dense, inputs, tgt_key_padding_mask=padding(L))
    actual = results(sparse, inputs, tgt_key_padding_mask=padding(L))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("train", [True, False])
def test_torchs_stacks_accept_our_layers(train: bool) -> None:
    shared = {"batch_first": True, "norm_first": True, **F64}
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **shared), 2, enable_nested_tensor=False)
    layer = TransformerEncoderLayer(E, H, activation=F.relu, alpha_init=1.0, **F64)
    sparse = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert {name for name in sparse.state_dict() if "alpha" not in name} == set(dense.state_dict())
    sparse.load_state_dict(dense.state_dict())
    source, target = randn(N, S, E), randn(N, L, E)
    with torch.set_grad_enabled(train):
        memory = sparse.train(train)(source, src_key_padding_mask=padding(S))
        expected = dense.train(train)(source, src_key_padding_mask=padding(S))
        torch.testing.assert_close(memory, expected, rtol=1e-9, atol=1e-10)
        causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
        torch.testing.assert_close(sparse(source, causal), dense(source, causal), rtol=1e-9, atol=1e-10)
    dense_decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, **shared), 2)
    decoder = nn.TransformerDecoder(TransformerDecoderLayer(E, H, activation=F.relu, alpha_init=1.0, **F64), 2)
    decoder.load_state_dict(dense_decoder.state_dict())
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    with torch.set_grad_enabled(train):
        actual = decoder.train(train)(target, source, causal, memory_key_padding_mask=padding(S))
        expected = dense_decoder.train(train)(target, source, causal, memory_key_padding_mask=padding(S))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("train", [True, False])
def test_torchs_attention_can_be_used_in_our_layers(train: bool) -> None:
    dense = nn.TransformerDecoderLayer(E, H, batch_first=True, norm_first=True, activation=F.gelu, **F64).train(train)
    layer = TransformerDecoderLayer(E, H, attention=nn.MultiheadAttention, **F64).train(train)
    layer.load_state_dict(dense.state_dict())
    x, memory = randn(N, L, E), randn(N, S, E)
    torch.testing.assert_close(layer(x, memory), dense(x, memory), rtol=1e-9, atol=1e-10)


def test_layers_are_as_sparse_in_eval_as_in_training() -> None:
    encoder = nn.TransformerEncoder(
        TransformerEncoderLayer(E, H, alpha_init=2.0, **F64), 2, enable_nested_tensor=False
    ).requires_grad_(False)
    x = 3 * randn(N, L, E)
    torch.testing.assert_close(encoder.train()(x), encoder.eval()(x), rtol=0, atol=0)
    with torch.no_grad(), record_attention(encoder) as record:
        encoder(x)
    assert list(record) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(bool((heads.density < 1).all()) for heads in record.values())


@pytest.mark.parametrize("kind", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_rotary_and_bias_arguments_reach_the_self_attention(kind: Any) -> None:
    options = {"alpha_init": 1.3, **F64}
    built, plain = kind(E, H, positions=RotaryPositions(E // H), **options), kind(E, H, **options)
    plain.load_state_dict(built.state_dict())
    x, memory = randn(N, L, E), () if kind is TransformerEncoderLayer else (randn(N, S, E),)
    rotary = RotaryPositions(E // H).rotary(torch.arange(L, dtype=torch.float64))
    torch.testing.assert_close(plain(x, *memory, rotary=rotary), built(x, *memory), rtol=1e-9, atol=1e-10)
    bias = NAPE(H).bias(torch.arange(L).double(), torch.arange(L).double())
    built = kind(E, H, positions=NAPE(H), **options)
    built.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain(x, *memory, position_bias=bias), built(x, *memory), rtol=1e-9, atol=1e-10)


def test_attention_arguments_reach_both_attentions_but_positions_and_window_only_self_attention() -> None:
    options = {"num_kv_heads": 2, "window": 3, "positions": NAPE(H), "length_scaling": True, "alpha_init": 1.2}
    layer = TransformerDecoderLayer(E, H, **options, dropout=0.3, batch_first=False)
    own, cross = layer.self_attn, layer.multihead_attn
    assert own.positions is options["positions"] and own.window == (3, 3)
    assert cross.positions is None and cross.window is None
    for attention in (own, cross):
        assert attention.num_kv_heads == 2 and attention.dropout == 0.3 and not attention.batch_first
        assert attention.length_scaling is not None
    assert own.length_scaling.unscaled_heads == 2 and cross.length_scaling.unscaled_heads == 0
    assert list(alpha_per_head(layer)) == ["self_attn", "multihead_attn"]
    assert layer.linear1.out_features == 4 * E
    assert TransformerEncoderLayer(E, H, attention=TopKMultiheadAttention, k=2).self_attn.k == 2


@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_is_applied_only_in_training(norm_first: bool) -> None:
    layer = TransformerEncoderLayer(E, H, dropout=0.5, norm_first=norm_first)
    x = torch.randn(N, L, E)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer = TransformerEncoderLayer(E, H, dropout=1.0)
    assert torch.equal(layer(x), x)  # only the residual connection is left


@pytest.mark.parametrize("kind", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_gradients_equal_finite_differences(kind: Any) -> None:
    options = {"num_kv_heads": 1, "positions": NAPE(2), "qk_norm": True, "length_scaling": True, "norm": "rms"}
    layer = kind(6, 2, alpha_init=1.4, **options, **F64)
    parameters = dict(layer.named_parameters())
    inputs = [randn(1, 3, 6).requires_grad_() for _ in range(1 + (kind is TransformerDecoderLayer))]

    def run(*leaves: Tensor) -> Tensor:
        state = dict(zip(parameters, leaves[len(inputs) :], strict=True))
        return torch.func.functional_call(layer, state, leaves[: len(inputs)])

    assert torch.autograd.gradcheck(run, (*inputs, *parameters.values()), fast_mode=True)


# torch's tracer builds an autograd function in a deprecated way and warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_decoder_layer_compiles_into_one_graph() -> None:
    layer = TransformerDecoderLayer(E, H, num_kv_heads=2, positions=RotaryPositions(E // H), norm="rms", **F64)
    x, memory = randn(N, L, E), randn(N, S, E)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(x, memory, tgt_is_causal=True)
    torch.testing.assert_close(compiled(x, memory, tgt_is_causal=True), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_copies_pickles_and_half_precision(kind: Any) -> None:
    layer = kind(E, H, num_kv_heads=2, norm="rms", qk_norm=True, dropout=0.0)
    inputs = (torch.randn(N, L, E),) * (1 + (kind is TransformerDecoderLayer))
    expected = layer(*inputs)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(*inputs), expected, rtol=0, atol=0)
    half = layer.bfloat16()(*[x.bfloat16() for x in inputs])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", [TransformerEncoderLayer, TransformerDecoderLayer])
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((E, 5), {}, ValueError, "embed_dim must be a positive multiple of num_heads"),
        ((0, 1), {}, ValueError, "d_model must be at least 1, got 0"),
        ((24.0, H), {}, TypeError, "d_model must be an int, got 24.0"),
        ((E, H), {"dim_feedforward": "wide"}, TypeError, "dim_feedforward must be an int, got 'wide'"),
        ((E, H), {"dim_feedforward": 0}, ValueError, "dim_feedforward must be at least 1, got 0"),
        ((E, H), {"dropout": 2.0}, ValueError, r"dropout must be in \[0, 1\], got 2.0"),
        ((E, H), {"norm": "batch"}, ValueError, "norm must be one of layer, rms, got 'batch'"),
        ((E, H), {"activation": "gelu"}, TypeError, "activation must be a function of a tensor .* got 'gelu'"),
        ((E, H), {"norm_first": "no"}, TypeError, "norm_first must be True or False, got 'no'"),
        ((E, H), {"layer_norm_eps": "small"}, TypeError, "layer_norm_eps must be a number, got 'small'"),
        (
            (E, H),
            {"attention": AdaptiveSparseMultiheadAttention(E, H)},
            TypeError,
            "attention must be a class or a fun",
        ),
        ((E, H), {"attention": "entmax"}, TypeError, "makes an attention layer, got str"),
        ((E, H), {"qk_norm": "no"}, TypeError, "qk_norm must be True or False, got 'no'"),
        ((E, H), {"length_scaling": 0}, TypeError, "length_scaling must be True or False, got 0"),
        ((E, H), {"window": 0}, ValueError, "window must be an int of at least 1"),
        ((E, H), {"heads": 2}, TypeError, "unexpected keyword argument 'heads'"),
    ],
)
def test_an_invalid_argument_raises_an_error(
    kind: Any, args: tuple[int, int], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(*args, **kwargs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(TransformerEncoderLayer, "src"), (TransformerDecoderLayer, "tgt")])
def test_invalid_input_raises_an_error(kind: Any, name: str, norm_first: bool) -> None:
    layer, x = kind(E, H, norm_first=norm_first), torch.randn(N, L, E)
    given = {"memory": x} if name == "tgt" else {}
    for wrong, error, message in (
        (
            x[..., 1:],
            ValueError,
            rf"{name} must be \(N, L, E\) or \(L, E\) with E = {E}, got shape \({N}, {L}, {E - 1}\)",
        ),
        (x[None], ValueError, rf"{name} must be \(N, L, E\) or \(L, E\) with E = {E}, got shape \(1, {N}, {L}, {E}\)"),
        (x.long(), TypeError, f"{name} must have a floating dtype .*, got torch.int64"),
        (x.tolist(), TypeError, f"{name} must be a torch.Tensor, got list"),
        (
            torch.nested.nested_tensor([x[0], x[1, 1:]], layout=torch.jagged),
            TypeError,
            f"{name} must be a dense tensor",
        ),
    ):
        with pytest.raises(error, match=message):
            layer(wrong, **given)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_error_names_the_mask_that_the_user_gave(batch_first: bool) -> None:
    options = {"batch_first": batch_first}
    encoder, decoder = TransformerEncoderLayer(E, H, **options), TransformerDecoderLayer(E, H, **options)
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    bad = torch.zeros(3, 3, dtype=torch.bool)
    for layer, inputs, names in (
        (encoder, (x,), {"src": L}),
        (decoder, (x, memory), {"tgt": L, "memory": S}),
        (encoder, (torch.randn(L, E),), {"src": L}),
        (decoder, (torch.randn(L, E), torch.randn(S, E)), {"tgt": L, "memory": S}),
    ):
        batch, padding_form = (N, rf"\(N, S\) = \({N}, ") if inputs[0].dim() == 3 else (1, r"\(S,\) = \(")
        for name, keys in names.items():
            message = rf"^{name}_mask must have shape \(L, S\) = \({L}, {keys}\) or .* = \({batch * H}, {L}, {keys}\), "
            with pytest.raises(ValueError, match=message + r"got \(3, 3\)$"):
                layer(*inputs, **{f"{name}_mask": bad})
            message = rf"^{name}_key_padding_mask must have shape {padding_form}{keys},?\), got \(3, 3\)$"
            with pytest.raises(ValueError, match=message):
                layer(*inputs, **{f"{name}_key_padding_mask": bad})
            for mask in (f"{name}_mask", f"{name}_key_padding_mask"):
                with pytest.raises(TypeError, match=f"^{mask} must be boolean or floating, got torch.int64$"):
                    layer(*inputs, **{mask: bad.long()})


@pytest.mark.parametrize("batch_first", [True, False])
def test_memory_of_another_batch_size_raises_an_error(batch_first: bool) -> None:
    layer = TransformerDecoderLayer(E, H, batch_first=batch_first)
    x, memory = torch.randn(N, L, E), torch.randn(N + 1, S, E)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    axis = 0 if batch_first else 1
    with pytest.raises(ValueError, match=rf"^memory must have the batch size of tgt, {N}, in axis {axis}, got shape"):
        layer(x, memory)


def test_attention_can_be_a_function_that_makes_layers() -> None:
    made = []

    def factory(embed_dim: int, num_heads: int, **kwargs: Any) -> AdaptiveSparseMultiheadAttention:
        made.append(kwargs)
        return AdaptiveSparseMultiheadAttention(embed_dim, num_heads, alpha_init=1.0 + len(made) / 4, **kwargs)

    layer = TransformerDecoderLayer(E, H, attention=factory)
    assert [alpha[0].item() for alpha in alpha_per_head(layer).values()] == [1.25, 1.5]
    assert all(kwargs["batch_first"] for kwargs in made)


def test_cross_attention_can_be_of_another_kind() -> None:
    make = partial(TopKMultiheadAttention, k=2)
    layer = TransformerDecoderLayer(E, H, num_kv_heads=1, alpha_init=1.25, cross_attention=make, dropout=0.3)
    assert isinstance(layer.self_attn, AdaptiveSparseMultiheadAttention)
    assert (layer.self_attn.num_kv_heads, layer.self_attn.alpha.tolist()) == (1, [1.25] * H)
    cross = layer.multihead_attn
    assert isinstance(cross, TopKMultiheadAttention)
    assert (cross.k, cross.num_kv_heads, cross.dropout, cross.batch_first) == (2, H, 0.3, True)
    layer.eval()
    x, memory = torch.randn(N, L, E), torch.randn(N, L + 2, E)
    with record_attention(layer) as record:
        layer(x, memory, tgt_is_causal=True)
    assert record["multihead_attn"].support_size.tolist() == [2.0] * H
    with pytest.raises(TypeError, match=r"cross_attention must be a class or a function .*, got str"):
        TransformerDecoderLayer(E, H, cross_attention="topk")  # type: ignore[arg-type]


def test_a_wrong_memory_is_named() -> None:
    layer, x = TransformerDecoderLayer(E, H), torch.randn(N, L, E)
    with pytest.raises(TypeError, match=r"memory must be a torch\.Tensor, got list"):
        layer(x, [1])
    for wrong in (torch.randn(N, S, 7), torch.randn(S, E)):
        with pytest.raises(ValueError, match=r"memory must be \(N, S, E\) with E = 24, and have 3 dimensions like tgt"):
            layer(x, wrong)


@pytest.mark.parametrize(("batch_first", "of_target", "of_memory"), [(True, "N, L", "N, S"), (False, "L, N", "S, N")])
def test_shape_errors_name_the_axes_in_their_order(batch_first: bool, of_target: str, of_memory: str) -> None:
    encoder = TransformerEncoderLayer(E, H, batch_first=batch_first)
    decoder = TransformerDecoderLayer(E, H, batch_first=batch_first)
    wrong, x = torch.randn(L, N, E + 1), torch.randn(L, N, E)
    with pytest.raises(ValueError, match=rf"^src must be \({of_target}, E\) or \(L, E\) with E = 24, got shape"):
        encoder(wrong)
    with pytest.raises(ValueError, match=rf"^tgt must be \({of_target}, E\) or \(L, E\) with E = 24, got shape"):
        decoder(wrong, x)
    with pytest.raises(ValueError, match=rf"^memory must be \({of_memory}, E\) with E = 24, and have 3 "):
        decoder(x, wrong)
