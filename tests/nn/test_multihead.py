"""At α = 1 the adaptive layer equals torch's; parameters, dtypes and errors of both multi-head layers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, TopKMultiheadAttention
from sparse_attn.nn.multihead import SparseMultiheadAttention

N, L, S, H, E, KDIM, VDIM = 2, 5, 7, 3, 33, 13, 17
ATTN_MASKS = ("none", "bool 2-D", "float 2-D", "bool 3-D", "float 3-D")
PADDING_MASKS = ("none", "bool", "float")
LAYERS = {
    "adaptive": lambda *args, **kwargs: AdaptiveSparseMultiheadAttention(*args, **kwargs),
    "topk": lambda *args, **kwargs: TopKMultiheadAttention(*args, k=2, **kwargs),
}


def dense_and_sparse(**kwargs: object) -> tuple[nn.MultiheadAttention, AdaptiveSparseMultiheadAttention]:
    """torch's layer and ours at α = 1, in float64, with the same parameters, none of them zero."""
    dense = nn.MultiheadAttention(E, H, dtype=torch.float64, **kwargs)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)  # with the initial biases of zero, a missing bias would not be detected
    sparse = AdaptiveSparseMultiheadAttention(E, H, dtype=torch.float64, alpha_init=1.0, **kwargs)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def attn_mask_of(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (queries, keys) if kind.endswith("2-D") else (batch * H, queries, keys)
    if kind.startswith("float"):
        return torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # torch's layer returns NaN for a query without visible keys
    return mask


def padding_mask_of(kind: str, batched: bool, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.randn(N, keys, dtype=torch.float64)
    if kind == "bool":
        mask = torch.zeros(N, keys, dtype=torch.bool)
        mask[0, 3:] = True
    return mask if batched else mask[0]


def results(layer: nn.MultiheadAttention, inputs: list[Tensor], **kwargs: object) -> dict[str, Tensor]:
    """Output, weights, and the gradients of a loss of these results for the inputs and all parameters except α."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    query, key, value = inputs if len(inputs) == 3 else inputs * 3
    output, weights = layer(query, key, value, **kwargs)
    found = {"output": output} if weights is None else {"output": output, "weights": weights}
    loss = sum((x.flatten() * torch.linspace(-1, 2, x.numel(), dtype=x.dtype)).sum() for x in found.values())
    leaves = {f"input {i}": x for i, x in enumerate(inputs)}
    leaves |= {name: parameter for name, parameter in layer.named_parameters() if name != "raw_alpha"}
    found |= zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    return found


def assert_same_results(
    dense: nn.MultiheadAttention, sparse: nn.MultiheadAttention, inputs: list[Tensor], **kwargs: object
) -> None:
    expected, actual = results(dense, inputs, **kwargs), results(sparse, inputs, **kwargs)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, (name, kwargs)
        # torch.testing.assert_close, called thousands of times, would take half of the test's time.
        assert torch.allclose(actual[name], tensor, rtol=1e-9, atol=1e-11), (name, kwargs)


# torch's layer warns if the padding mask is boolean and the attention mask is float.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("inputs", ["self", "cross", "cross with kdim and vdim"])
@pytest.mark.parametrize("add_zero_attn", [False, True], ids=["", "zero_attn"])
@pytest.mark.parametrize("add_bias_kv", [False, True], ids=["", "bias_kv"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_outputs_weights_and_gradients_equal_torchs_at_alpha_one(
    bias: bool, add_bias_kv: bool, add_zero_attn: bool, inputs: str, batch_first: bool, batched: bool
) -> None:
    kdim, vdim = (KDIM, VDIM) if "kdim" in inputs else (None, None)
    dense, sparse = dense_and_sparse(
        bias=bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        kdim=kdim,
        vdim=vdim,
        batch_first=batch_first,
    )

    def tensor(length: int, size: int) -> Tensor:
        batch = [N] if batched else []
        shape = [*batch, length, size] if batch_first else [length, *batch, size]
        return torch.randn(shape, dtype=torch.float64)

    query = tensor(L, E)
    tensors = [query] if inputs == "self" else [query, tensor(S, kdim or E), tensor(S, vdim or E)]
    keys = L if inputs == "self" else S
    for attn_mask, padding, need_weights, average in product(ATTN_MASKS, PADDING_MASKS, (False, True), (False, True)):
        assert_same_results(
            dense,
            sparse,
            tensors,
            attn_mask=attn_mask_of(attn_mask, N if batched else 1, L, keys),
            key_padding_mask=padding_mask_of(padding, batched, keys),
            need_weights=need_weights,
            average_attn_weights=average,
        )


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_causal_mask_with_is_causal_equals_torch(need_weights: bool) -> None:
    dense, sparse = dense_and_sparse(batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    x = torch.randn(N, L, E, dtype=torch.float64)
    assert_same_results(dense, sparse, [x], attn_mask=causal, is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize("shape", [(L, S), (N * H, L, S)])
def test_a_learnt_float_mask_gets_torchs_gradient(shape: tuple[int, ...]) -> None:
    dense, sparse = dense_and_sparse(batch_first=True)
    query, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    upstream = torch.randn(N, L, E, dtype=torch.float64)
    grads = []
    values = torch.randn(shape, dtype=torch.float64)
    for layer in (dense, sparse):
        mask = values.clone().requires_grad_()
        layer(query, memory, memory, attn_mask=mask)[0].backward(upstream)
        grads.append(mask.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_dropout_drops_the_weights_that_torch_drops(batch_first: bool, average: bool) -> None:
    dense, sparse = dense_and_sparse(dropout=0.4, batch_first=batch_first)
    x = torch.randn(N, L, E, dtype=torch.float64)
    outcomes = []
    for layer in (dense, sparse):
        torch.manual_seed(7)
        outcomes.append(results(layer, [x], need_weights=True, average_attn_weights=average))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-11)
    if not average:
        assert 0.2 < (outcomes[1]["weights"] == 0).double().mean() < 0.6  # some weights were dropped
    assert_same_results(dense.eval(), sparse.eval(), [x], need_weights=True, average_attn_weights=average)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": KDIM, "vdim": VDIM}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_a_seed_gives_torchs_initial_parameters_under_torchs_names(kind: str, kwargs: dict[str, object]) -> None:
    torch.manual_seed(3)
    expected = nn.MultiheadAttention(E, H, **kwargs).state_dict()
    torch.manual_seed(3)
    actual = LAYERS[kind](E, H, **kwargs).state_dict()
    actual.pop("raw_alpha", None)
    assert list(actual) == list(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_gives_the_same_dtype_as_torch(kind: str) -> None:
    dense, layer = nn.MultiheadAttention(E, H), LAYERS[kind](E, H)
    x = torch.randn(L, N, E)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = dense(x, x, x)[0], layer(x, x, x)[0]
    assert actual.dtype == expected.dtype
    actual.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())


def test_the_shared_base_class_cannot_be_called() -> None:
    x = torch.randn(L, N, E)
    with pytest.raises(NotImplementedError):
        SparseMultiheadAttention(E, H)(x, x, x)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((33, 4), "embed_dim must be a positive multiple of num_heads, got embed_dim=33 and num_heads=4"),
        ((0, 3), "embed_dim must be a positive multiple of num_heads, got embed_dim=0 and num_heads=3"),
        ((33, 0), "embed_dim must be a positive multiple of num_heads, got embed_dim=33 and num_heads=0"),
        ((33, 3, 1.5), r"dropout must be in \[0, 1\], got 1.5"),
        ((33, 3, -0.1), r"dropout must be in \[0, 1\], got -0.1"),
    ],
)
def test_wrong_sizes_and_dropout_raise_an_error(kind: str, args: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYERS[kind](*args)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kdim": 0}, ValueError, "kdim must be at least 1 or None, got 0"),
        ({"vdim": -7}, ValueError, "vdim must be at least 1 or None, got -7"),
        ({"vdim": 7.0}, TypeError, "vdim must be an int, got 7.0"),
        ({"bias": "False"}, TypeError, "bias must be True or False, got 'False'"),
        ({"add_bias_kv": "no"}, TypeError, "add_bias_kv must be True or False, got 'no'"),
        ({"add_zero_attn": "no"}, TypeError, "add_zero_attn must be True or False, got 'no'"),
        ({"batch_first": "no"}, TypeError, "batch_first must be True or False, got 'no'"),
    ],
)
def test_wrong_sizes_of_keys_and_flags_raise_an_error(kind, kwargs, error, message):
    with pytest.raises(error, match=message):
        LAYERS[kind](E, H, **kwargs)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_mask_or_a_string_in_the_place_of_a_flag_raises_an_error(kind):
    layer, x = LAYERS[kind](E, H), torch.randn(L, N, E)
    with pytest.raises(TypeError, match=r"need_weights must be True or False, got a tensor of shape \(5, 5\)"):
        layer(x, x, x, None, torch.zeros(L, L))
    with pytest.raises(TypeError, match="average_attn_weights must be True or False, got 'no'"):
        layer(x, x, x, average_attn_weights="no")
    with pytest.raises(TypeError, match="is_causal must be True or False, got 'False'"):
        layer(x, x, x, is_causal="False")
    assert layer(x, x, x, need_weights=None)[1] is None  # as in torch, None counts as False


WRONG_INPUTS = [
    (((N, 1, L, E),) * 3, r"all be 3-D \(batched\) or all 2-D \(unbatched\); got query \(2, 1, 5, 33\)"),
    (((E,),) * 3, r"all be 3-D \(batched\) or all 2-D \(unbatched\); got query \(33,\)"),
    (((N, L, E), (S, E), (S, E)), r"all be 3-D .* got query \(2, 5, 33\), key \(7, 33\)"),
    (
        ((N, L, 32), (N, S, E), (N, S, E)),
        r"\(embed_dim, kdim, vdim\) = \(33, 33, 33\); got query \(2, 5, 32\)",
    ),
    (((N, L, E), (N, S, 31), (N, S, E)), r"\(embed_dim, kdim, vdim\) = \(33, 33, 33\); .* key \(2, 7, 31\)"),
    (
        ((N, L, E), (N, S, E), (N, S, 31)),
        r"\(embed_dim, kdim, vdim\) = \(33, 33, 33\); .* value \(2, 7, 31\)",
    ),
    (
        ((N, L, E), (N, S, E), (N, L, E)),
        r"key and value must have the same batch and length; .* value \(2, 5, 33\)",
    ),
    (
        ((N, L, E), (1, S, E), (1, S, E)),
        r"same batch size \(axis 0\); got query \(2, 5, 33\), key \(1, 7, 33\)",
    ),
]


@pytest.mark.parametrize(("shapes", "message"), WRONG_INPUTS)
def test_an_input_of_a_wrong_shape_raises_an_error(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    layer = AdaptiveSparseMultiheadAttention(E, H, batch_first=True)
    with pytest.raises(ValueError, match=message):
        layer(*(torch.randn(shape) for shape in shapes))


def test_the_batch_axis_of_length_first_input_is_checked() -> None:
    layer = AdaptiveSparseMultiheadAttention(E, H)
    with pytest.raises(ValueError, match=r"same batch size \(axis 1\); got query \(5, 2, 33\), key \(7, 3, 33\)"):
        layer(torch.randn(L, N, E), *torch.randn(2, S, 3, E))


WRONG_MASKS = [
    (
        {"attn_mask": torch.zeros(S, L, dtype=torch.bool)},
        ValueError,
        r"\(5, 7\) or .* = \(6, 5, 7\), got \(7, 5\)",
    ),
    (
        {"attn_mask": torch.zeros(N, L, S)},
        ValueError,
        r"\(L, S\) = \(5, 7\) or .* = \(6, 5, 7\), got \(2, 5, 7\)",
    ),
    (
        {"attn_mask": torch.zeros(L, S).int()},
        TypeError,
        r"attn_mask must be boolean or floating, got torch.int32",
    ),
    ({"attn_mask": [[0.0] * S] * L}, TypeError, "attn_mask must be a torch.Tensor, got list"),
    ({"key_padding_mask": torch.zeros(S, N).bool()}, ValueError, r"\(N, S\) = \(2, 7\), got \(7, 2\)"),
    (
        {"key_padding_mask": torch.zeros(N, S).long()},
        TypeError,
        "key_padding_mask must be .*, got torch.int64",
    ),
]


@pytest.mark.parametrize(("masks", "error", "message"), WRONG_MASKS)
def test_a_mask_of_a_wrong_shape_or_type_raises_an_error(
    masks: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    layer = TopKMultiheadAttention(E, H, batch_first=True, k=2)
    memory = torch.randn(N, S, E)
    with pytest.raises(error, match=message):
        layer(torch.randn(N, L, E), memory, memory, **masks)


def test_the_padding_of_unbatched_input_has_one_dimension() -> None:
    layer = AdaptiveSparseMultiheadAttention(E, H)
    x = torch.randn(S, E)
    with pytest.raises(
        ValueError, match=r"key_padding_mask must be 1-D \(S,\) for unbatched input, got shape \(1, 7\)"
    ):
        layer(x, x, x, key_padding_mask=torch.zeros(1, S, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused() -> None:
    layer = AdaptiveSparseMultiheadAttention(E, H, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(L, E), torch.randn(S, E)])
    with pytest.raises(TypeError, match="query, key and value must be dense tensors, got a nested tensor"):
        layer(nested, nested, nested)
