"""Length scaling: the initial factor of the queries, its formula, which keys are counted, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import (
    NAPE,
    AdaptiveSparseMultiheadAttention,
    LengthScaling,
    TopKMultiheadAttention,
    TransformerEncoderLayer,
)

N, H, L, S, D = 2, 3, 5, 7, 11
E = H * D


def test_every_factor_starts_near_one_for_any_length() -> None:
    scaling = LengthScaling(E, H)
    x = torch.randn(N, L, E)
    for visible in (1, 2, 64, 10**6):
        torch.testing.assert_close(scaling(x, torch.tensor(visible)), torch.full((N, H, L, 1), 1.05))


def test_factors_stay_near_one_if_all_matrices_are_initialised_again() -> None:
    encoder = nn.TransformerEncoder(TransformerEncoderLayer(E, H, length_scaling=True), 2, enable_nested_tensor=False)
    model = nn.Transformer(E, H, num_decoder_layers=1, custom_encoder=encoder, batch_first=True)
    for layer in model.encoder.layers:
        factor = layer.self_attn.length_scaling(torch.randn(N, L, E), torch.tensor(S))
        torch.testing.assert_close(factor, torch.full((N, H, L, 1), 1.05))


def test_factors_equal_the_formula() -> None:
    scaling = LengthScaling(E, H, unscaled_heads=1, dtype=torch.float64)
    for parameter in scaling.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, visible = torch.randn(N, L, E, dtype=torch.float64), torch.randint(2, 1000, (N, H, L))
    factor = scaling(x, visible)
    assert factor.shape == (N, H, L, 1)
    assert factor[:, 0].eq(1).all()
    for n in range(N):
        for h in range(1, H):
            for i in range(L):
                row = slice((h - 1) * E, h * E)
                beta_in = (scaling.beta_weight[row] @ x[n, i] + scaling.beta_bias[h - 1]).item()
                gamma_in = (scaling.gamma_weight[row] @ x[n, i] + scaling.gamma_bias[h - 1]).item()
                beta, gamma = math.log1p(math.exp(beta_in)), 2 * math.tanh(gamma_in)
                expected = 1 + beta * math.log(visible[n, h, i].item()) ** gamma
                assert factor[n, h, i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [-5.0, 0.0, 5.0])
def test_queries_that_see_one_key_or_none_have_a_finite_factor_and_gradient(gamma: float) -> None:
    scaling = LengthScaling(E, H)
    nn.init.constant_(scaling.gamma_bias, gamma)
    factor = scaling(torch.randn(N, L, E), torch.tensor([0, 1, 2, 3, 4]))
    factor.sum().backward()
    assert factor.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in scaling.parameters())


def test_gradients_equal_finite_differences() -> None:
    scaling = LengthScaling(E, H, 1, dtype=torch.float64)
    x, visible = torch.randn(N, L, E, dtype=torch.float64), torch.randint(0, 50, (N, 1, L))
    parameters = {name: parameter for name, parameter in scaling.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(scaling, dict(zip(parameters, values, strict=True)), (x, visible))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters.values()), fast_mode=True)


def layer_of(**kwargs: object) -> AdaptiveSparseMultiheadAttention:
    kwargs = {"batch_first": True, "dtype": torch.float64, "length_scaling": True, **kwargs}
    layer = AdaptiveSparseMultiheadAttention(E, H, **kwargs)
    for parameter in layer.length_scaling.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def seen_by(layer: AdaptiveSparseMultiheadAttention, *inputs: Tensor, **kwargs: object) -> Tensor:
    """The numbers of keys that the layer passes to its scaling."""
    told = []
    handle = layer.length_scaling.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    layer(*inputs, **kwargs)
    handle.remove()
    return told[0].expand(N, H, inputs[0].shape[1])


def test_length_scaling_counts_only_visible_keys() -> None:
    x, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    causal = torch.arange(1, L + 1)
    assert seen_by(layer_of(), x, memory, memory).eq(S).all()
    assert seen_by(layer_of(), x, x, x, is_causal=True).eq(causal).all()
    assert seen_by(layer_of(window=(1, 0)), x, x, x).eq(causal.clamp(max=2)).all()
    assert seen_by(layer_of(add_bias_kv=True, add_zero_attn=True), x, x, x, is_causal=True).eq(causal + 2).all()
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3:] = True
    expected = torch.tensor([S, 3])[:, None, None]
    assert seen_by(layer_of(), x, memory, memory, key_padding_mask=padding).eq(expected).all()
    added = torch.zeros(N, S).masked_fill(padding, torch.finfo(torch.float32).min)
    assert seen_by(layer_of(), x, memory, memory, key_padding_mask=added).eq(expected).all()
    per_head = torch.rand(N * H, L, S) < 0.4
    expected = (~per_head).sum(-1).view(N, H, L)
    assert seen_by(layer_of(), x, memory, memory, attn_mask=per_head).eq(expected).all()
    assert seen_by(layer_of(positions=NAPE(H)), x, memory, memory, attn_mask=per_head).eq(expected).all()
    no_bias = torch.zeros(L, S).masked_fill(torch.arange(S) > 3, -math.inf)
    assert seen_by(layer_of(), x, memory, memory, position_bias=no_bias).eq(4).all()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("nape", [True, False])
def test_a_layer_multiplies_its_queries_by_the_factor(nape: bool, batch_first: bool) -> None:
    positions = {"positions": NAPE(H)} if nape else {}
    layer = layer_of(batch_first=batch_first, **positions)
    plain = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **positions)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "scaling" not in name})
    x, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    factor = layer.length_scaling(x, torch.tensor(S)).detach()
    assert factor[:, 0].eq(1).all() == nape
    inputs = (x, memory, memory) if batch_first else (t.transpose(0, 1) for t in (x, memory, memory))
    weights = layer(*inputs, average_attn_weights=False)[1]
    for n in range(N):
        for h in range(H):
            for i in range(L):
                scaled = plain(factor[n, h, i] * x[n, i, None], memory[n], memory[n], average_attn_weights=False)[1]
                if nape:  # the query has position `i` in the layer, but position 0 if it is computed alone
                    bias = plain.positions.bias(torch.tensor([i]).double(), torch.arange(S).double())
                    zero = plain.positions.bias(torch.tensor([0]).double(), torch.arange(S).double())
                    args = (factor[n, h, i] * x[n, i, None], memory[n], memory[n])
                    scaled = plain(*args, average_attn_weights=False, position_bias=bias - zero)[1]
                torch.testing.assert_close(weights[n, h, i], scaled[h, 0], rtol=1e-9, atol=1e-12)


def test_length_scaling_gets_gradients_and_is_off_by_default() -> None:
    layer = TopKMultiheadAttention(E, H, k=3, batch_first=True, length_scaling=True)
    x = torch.randn(N, L, E)
    layer(x, x, x)[0].square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if name.startswith("length_scaling")}
    assert sorted(grads) == [f"length_scaling.{part}_{p}" for part in ("beta", "gamma") for p in ("bias", "weight")]
    assert all(bool((grad != 0).any()) for grad in grads.values())
    assert not [name for name in TopKMultiheadAttention(E, H, k=3).state_dict() if "scaling" in name]


@pytest.mark.parametrize("unscaled", [-1, H])
def test_a_wrong_number_of_unscaled_heads_is_refused(unscaled: int) -> None:
    with pytest.raises(ValueError, match=rf"unscaled_heads must be in \[0, 3\), the number of heads, got {unscaled}"):
        LengthScaling(E, H, unscaled)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 2), ValueError, "embed_dim must be at least 1, got 0"),
        ((8.0, 2), TypeError, "embed_dim must be an int, got 8.0"),
        ((8, "2"), TypeError, "num_heads must be an int, got '2'"),
        ((8, 2, None), TypeError, "unscaled_heads must be an int, got None"),
    ],
)
def test_wrong_sizes_of_length_scaling_raise_an_error(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        LengthScaling(*arguments)
