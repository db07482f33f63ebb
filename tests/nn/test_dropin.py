"""Known problems of a drop-in for `nn.MultiheadAttention` inside torch's modules, each with one test or more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    KVCache,
    TopKMultiheadAttention,
    alpha_per_head,
    replace_attention,
)
from sparse_attn.nn.multihead import SparseMultiheadAttention

N, S, H, E = 3, 5, 2, 14
LAYERS: dict[str, tuple[type[SparseMultiheadAttention], dict[str, Any]]] = {
    "adaptive": (AdaptiveSparseMultiheadAttention, {"alpha_init": 2.0}),
    "topk": (TopKMultiheadAttention, {"k": 2}),
}


def encoder_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    """An encoder layer without dropout: train mode, which uses no fused kernel, must give the output of eval mode."""
    return nn.TransformerEncoderLayer(E, H, 17, dropout=0.0, batch_first=True, **kwargs)


def layer_of(kind: str, **kwargs: Any) -> SparseMultiheadAttention:
    layer, own = LAYERS[kind]
    return layer(E, H, **{"batch_first": True, "dtype": torch.float64, **own, **kwargs})


# In eval mode without gradients, nn.TransformerEncoderLayer calls a fused softmax kernel unless our layer prevents it.


def no_grad(module: nn.Module) -> AbstractContextManager[None]:
    return torch.no_grad()


def inference_mode(module: nn.Module) -> AbstractContextManager[None]:
    return torch.inference_mode()


def all_frozen(module: nn.Module) -> AbstractContextManager[None]:
    module.requires_grad_(False)
    return nullcontext()


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("grad_off", [no_grad, inference_mode, all_frozen])
def test_torch_uses_its_fused_kernel_under_the_tested_conditions(
    grad_off: Callable[[nn.Module], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.MultiheadAttention, "forward", None)  # the fused kernel does not call this method
    block = encoder_layer().eval()
    with grad_off(block):
        block(torch.randn(N, S, E))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("grad_off", [no_grad, inference_mode, all_frozen])
@pytest.mark.parametrize("built", ["swapped in", "set by hand", "rebuilt"])
@pytest.mark.parametrize("kind", LAYERS)
def test_eval_mode_computes_the_same_function_as_training(
    kind: str, built: str, grad_off: Callable[[nn.Module], AbstractContextManager[None]], copied: str
) -> None:
    block = encoder_layer()
    dense = copy.deepcopy(block)
    layer, kwargs = LAYERS[kind]
    if built == "swapped in":
        replace_attention(block, layer, **kwargs)
    else:
        block.self_attn = layer(E, H, batch_first=True, **kwargs)
        dense.self_attn.load_state_dict({k: v for k, v in block.self_attn.state_dict().items() if k != "raw_alpha"})
    if built == "rebuilt":
        block.self_attn._reset_parameters()  # this method reads the attribute that prevents the fused kernel
        dense.self_attn.load_state_dict({k: v for k, v in block.self_attn.state_dict().items() if k != "raw_alpha"})
    x = 3 * torch.randn(N, S, E)
    trained, softmax = block.train()(x), dense.train()(x)
    assert not torch.allclose(trained, softmax, atol=1e-2)  # otherwise the comparison below would be trivial
    block = COPIES[copied](block).eval()
    with grad_off(block):
        torch.testing.assert_close(block(x), trained)


# nn.TransformerEncoder decides in its constructor whether it converts padded batches to nested tensors.


@pytest.mark.parametrize("which", ["every layer", "the first layer", "the last layer"])
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_padded_batch_in_eval_mode_computes_the_same_function_as_training(kind: str, copied: str, which: str) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), num_layers=2, enable_nested_tensor=True)
    assert encoder.use_nested_tensor
    chosen = {"the first layer": "0", "the last layer": "1"}.get(which, "")
    layer, kwargs = LAYERS[kind]
    replace_attention(encoder, layer, filter_fn=lambda name, _: chosen in name, **kwargs)
    assert not encoder.use_nested_tensor
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 2:] = padding[2, 4:] = True
    x = 3 * torch.randn(N, S, E)
    trained = encoder.train()(x, src_key_padding_mask=padding)
    encoder = COPIES[copied](encoder).eval()
    with torch.no_grad():
        output = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], trained[~padding])


# nn.Transformer gives every parameter with more than one dimension random values.


def test_nn_transformer_does_not_initialise_alpha() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 1, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 17, batch_first=True), 1)
    for stack in (encoder, decoder):
        replace_attention(stack, alpha_init=(1.25, 1.75))
    weight = encoder.layers[0].self_attn.in_proj_weight.detach().clone()
    model = nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    assert not torch.equal(encoder.layers[0].self_attn.in_proj_weight, weight)  # the weight is initialised again
    alphas = alpha_per_head(model)
    assert len(alphas) == 3
    assert all(alpha.tolist() == [1.25, 1.75] for alpha in alphas.values())


# torch deep-copies layers, which fails if a module stores a tensor with a graph.


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(vars(value))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_has_run_can_be_copied(kind: str, copied: str, backward: bool) -> None:
    layer = layer_of(kind)
    x = torch.randn(N, S, E, dtype=torch.float64, requires_grad=True)
    output, weights = layer(x, x, x, is_causal=True, cache=KVCache())
    if isinstance(layer, AdaptiveSparseMultiheadAttention):
        assert layer.alpha.requires_grad
    if backward:
        (output.sum() + weights.square().sum()).backward()
    assert all(tensor.is_leaf for tensor in tensors_in(vars(layer)))
    other = COPIES[copied](layer)
    torch.testing.assert_close(other(x, x, x, is_causal=True), (output, weights), rtol=0, atol=0)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}


# torch's encoder turns boolean masks into float masks, and passes is_causal=True with a causal mask.


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_float_mask_is_applied_although_is_causal_is_true(kind: str, need_weights: bool) -> None:
    layer = layer_of(kind)
    x = torch.randn(N, S, E, dtype=torch.float64)
    hidden = torch.ones(S, S, dtype=torch.bool).tril(-1)  # the reverse of causal: earlier keys are hidden
    floats = torch.zeros(S, S, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    expected = layer(x, x, x, attn_mask=hidden, need_weights=need_weights)
    actual = layer(x, x, x, attn_mask=floats, need_weights=need_weights, is_causal=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_is_applied_inside_torchs_encoder(padded: bool, train: bool) -> None:
    dense = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).double()
    sparse = copy.deepcopy(dense)
    replace_attention(sparse, alpha_init=1.0)
    hidden = torch.ones(S, S, dtype=torch.bool).tril(-2)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3] = padded
    x = torch.randn(N, S, E, dtype=torch.float64)
    expected = dense(x, mask=hidden, src_key_padding_mask=padding)
    sparse.train(train)
    for is_causal in (False, True):
        actual = sparse(x, mask=hidden, src_key_padding_mask=padding, is_causal=is_causal)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("extra", ["no more keys", "add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize("kind", LAYERS)
def test_is_causal_without_a_mask_builds_the_causal_mask(
    kind: str, extra: str, need_weights: bool, padding: str
) -> None:
    layer = layer_of(kind, **({extra: True} if extra.startswith("add") else {}))
    x = torch.randn(N, S, E, dtype=torch.float64)
    masks = {"none": None, "bool": torch.rand(N, S) < 0.3, "float": torch.randn(N, S, dtype=torch.float64)}
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    kwargs = {"key_padding_mask": masks[padding], "need_weights": need_weights}
    expected = layer(x, x, x, attn_mask=causal, **kwargs)
    torch.testing.assert_close(layer(x, x, x, is_causal=True, **kwargs), expected, rtol=1e-9, atol=1e-12)


# A query without visible keys gets zero weights; its output is the out-projection's bias.


def blind_masks() -> dict[str, dict[str, Tensor]]:
    """Masks of several kinds that hide every key from all queries of batch row 1."""
    rows = torch.zeros(N, H, S, S, dtype=torch.bool)
    rows[1] = True
    rows = rows.view(N * H, S, S)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    zeros = torch.zeros(N * H, S, S, dtype=torch.float64)
    half = padding & (torch.arange(S) < 2)
    return {
        "bool": {"attn_mask": rows},
        "-inf": {"attn_mask": zeros.masked_fill(rows, -torch.inf)},
        "smallest number": {"attn_mask": zeros.masked_fill(rows, torch.finfo(torch.float64).min)},
        "bool padding": {"key_padding_mask": padding},
        "-inf padding": {"key_padding_mask": zeros[:N, 0].masked_fill(padding, -torch.inf)},
        "both, half each": {"attn_mask": rows & (torch.arange(S) >= 2), "key_padding_mask": half},
        "both, float and bool": {"attn_mask": zeros.masked_fill(rows, -torch.inf), "key_padding_mask": padding},
        "both, float": {
            "attn_mask": zeros.masked_fill(rows, -torch.inf),
            "key_padding_mask": zeros[:N, 0].masked_fill(padding, torch.finfo(torch.float64).min),
        },
    }


@pytest.mark.parametrize("masked", blind_masks())
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [("adaptive", {"alpha_init": alpha}) for alpha in (1.0, 1.5, 2.0)]
    + [("adaptive", {"alpha_init": 1.0, "learn_alpha": False}), ("topk", {})],
)
def test_a_query_without_visible_keys_gets_the_bias(kind: str, kwargs: dict[str, Any], bias: bool, masked: str) -> None:
    layer = layer_of(kind, bias=bias, **kwargs)
    if bias:
        nn.init.normal_(layer.out_proj.bias)
    expected = layer.out_proj.bias.expand(S, E) if bias else torch.zeros(S, E, dtype=torch.float64)
    for need_weights, train in product((True, False), (True, False)):
        x = torch.randn(N, S, E, dtype=torch.float64, requires_grad=True)
        output, weights = layer.train(train)(x, x, x, need_weights=need_weights, **blind_masks()[masked])
        torch.testing.assert_close(output[1], expected, rtol=0, atol=0)
        assert bool(output.isfinite().all())
        if need_weights:
            assert not weights[1].any()
            torch.testing.assert_close(weights[[0, 2]].sum(-1), torch.ones(2, S).double())
        layer.zero_grad()
        output.square().sum().backward()
        assert x.grad is not None and not x.grad[1].any()
        assert bool(x.grad[[0, 2]].any())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in (x, *layer.parameters()))


# The out-projection is called as a module.


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_of_the_out_projection_run(kind: str, need_weights: bool) -> None:
    layer = layer_of(kind)
    x = torch.randn(N, S, E, dtype=torch.float64)
    expected = layer(x, x, x)[0]
    seen: list[Tensor] = []
    layer.out_proj.register_forward_hook(lambda module, args, output: seen.append(output) or output + 1)
    torch.testing.assert_close(layer(x, x, x, need_weights=need_weights)[0], expected + 1)
    assert len(seen) == 1


class LowRank(nn.Module):
    """A LoRA adapter around a linear layer; the adapter has no `weight` of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(3, E, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(E, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("kwargs", [{}, {"alpha_init": (1.0, 1.5), "learn_alpha": False}], ids=["learnt", "fixed"])
def test_an_adapter_that_replaces_the_out_projection_is_used(kwargs: dict[str, Any]) -> None:
    layer = layer_of("adaptive", **kwargs)
    merged = copy.deepcopy(layer)
    adapter = LowRank(layer.out_proj)
    with torch.no_grad():
        merged.out_proj.weight += adapter.up @ adapter.down
    layer.out_proj = adapter
    x = torch.randn(N, S, E, dtype=torch.float64)
    torch.testing.assert_close(layer(x, x, x), merged(x, x, x))
    layer(x, x, x)[0].square().sum().backward()
    assert adapter.up.grad is not None and adapter.down.grad is not None
    torch.testing.assert_close(alpha_per_head(layer), alpha_per_head(merged), rtol=0, atol=0)
