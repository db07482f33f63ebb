"""Rotations compared with complex numbers, slopes with published slopes, and rotations and biases in a layer."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn import NAPE, AdaptiveSparseMultiheadAttention, ALiBi, Positions, RotaryPositions
from sparse_attn.nn.positions import rotate

N, H, L, S, D = 2, 3, 5, 7, 22
E = H * D


def layer_with(**kwargs: Any) -> AdaptiveSparseMultiheadAttention:
    return AdaptiveSparseMultiheadAttention(E, H, **{"batch_first": True, "dtype": torch.float64, **kwargs})


def turned_by_hand(x: Tensor, base: float, first: int = 0) -> Tensor:
    """Rotate (..., L, D): entries `i` and `i + D / 2` are one complex number, multiplied by `exp(1j * angle)`."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    for position in range(x.shape[-2]):
        for i in range(half):
            angle = (first + position) * base ** (-2 * i / x.shape[-1])
            z[..., position, i] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("base", [10000.0, 13.0])
@pytest.mark.parametrize("first", [0, 11])
def test_rotation_equals_multiplication_of_complex_numbers(base: float, first: int) -> None:
    x = torch.randn(N, H, L, D, dtype=torch.float64)
    rotary = RotaryPositions(D, base=base).rotary(torch.arange(first, first + L, dtype=torch.float64))
    assert rotary[0].shape == rotary[1].shape == (L, D // 2)
    torch.testing.assert_close(rotate(x, rotary), turned_by_hand(x, base, first), rtol=1e-12, atol=1e-12)


def test_positions_can_differ_between_the_rows_of_a_batch() -> None:
    x = torch.randn(N, H, L, D, dtype=torch.float64)
    positions = torch.stack([torch.arange(L), 3 + torch.arange(L)])
    rotary = RotaryPositions(D).rotary(positions.double())
    expected = torch.stack([turned_by_hand(x[0], 1e4), turned_by_hand(x[1], 1e4, 3)])
    torch.testing.assert_close(rotate(x, rotary), expected, rtol=1e-12, atol=1e-12)


def test_rotary_scores_depend_only_on_differences_of_positions() -> None:
    query, key = torch.randn(2, H, L, D, dtype=torch.float64).unbind()
    rotary = RotaryPositions(D)

    def scores(first: int) -> Tensor:
        angles = rotary.rotary(torch.arange(first, first + L, dtype=torch.float64))
        return rotate(query[None], angles) @ rotate(key[None], angles).transpose(-2, -1)

    torch.testing.assert_close(scores(1009), scores(0), rtol=1e-9, atol=1e-9)


def test_half_precision_of_the_layer_does_not_round_the_angles() -> None:
    layer = layer_with(positions=RotaryPositions(D), dtype=torch.float32).bfloat16()
    far = torch.arange(5000, 5000 + L)
    torch.testing.assert_close(layer.positions.rotary(far), RotaryPositions(D).rotary(far), rtol=0, atol=0)
    assert layer.positions.rotary(far)[0].dtype == torch.float32
    x = torch.randn(N, L, E, dtype=torch.bfloat16)
    assert layer(x, x, x)[0].dtype == torch.bfloat16


def slope_exponent(head: int, heads: int) -> float:
    """-log2 of the slope of one head, counted from 0.

    For 2^n heads, the paper has 8 (head + 1) / 2^n. For another number of heads, the authors' code takes the exponents
    of the largest power of two below, then every second exponent of twice that power.
    """
    power = 2 ** math.floor(math.log2(heads))
    return 8 * (head + 1) / power if head < power else 4 * (2 * (head - power) + 1) / power


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 8, 12, 16, 20, 31])
def test_slopes_of_alibi(heads: int) -> None:
    expected = [2 ** -slope_exponent(head, heads) for head in range(heads)]
    torch.testing.assert_close(ALiBi(heads).slopes(torch.float64).tolist(), expected)


def test_slopes_of_alibi_with_eight_heads_equal_those_in_the_paper() -> None:
    assert ALiBi(8).slopes().tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


@pytest.mark.parametrize("heads", [2, 5, 8])
def test_slopes_of_nape(heads: int) -> None:
    half = heads // 2
    expected = [1 / (i + 1) for i in range(half)] + [0.0] * (heads - half)
    torch.testing.assert_close(NAPE(heads).slopes(torch.float64).tolist(), expected)
    assert NAPE(heads).unscaled_heads == half and ALiBi(heads).unscaled_heads == 0


@pytest.mark.parametrize("positions", [ALiBi(H), NAPE(H)], ids=str)
def test_bias_is_minus_slope_times_distance(positions: ALiBi) -> None:
    bias = positions.bias(torch.arange(2, 2 + L), torch.arange(S))
    assert bias.shape == (H, L, S)
    for h, slope in enumerate(positions.slopes().tolist()):
        for i in range(L):
            for j in range(S):
                assert bias[h, i, j].item() == pytest.approx(-slope * abs(2 + i - j))


@pytest.mark.parametrize("positions", [ALiBi(H), NAPE(H)], ids=str)
def test_a_layer_adds_the_bias_to_its_scores(positions: ALiBi) -> None:
    layer = layer_with(positions=positions)
    query, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    bias = positions.bias(torch.arange(L).double(), torch.arange(S).double())
    plain = layer_with()
    plain.load_state_dict(layer.state_dict())
    as_mask = bias.expand(N, H, L, S).reshape(N * H, L, S)
    expected = plain(query, memory, memory, attn_mask=as_mask)
    torch.testing.assert_close(layer(query, memory, memory), expected, rtol=1e-12, atol=1e-12)
    given = plain(query, memory, memory, position_bias=bias)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain(query, memory, memory)[0], expected[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_rotates_queries_and_keys(batch_first: bool) -> None:
    layer = layer_with(positions=RotaryPositions(D), alpha_init=1.0, batch_first=batch_first)
    query, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    weight = layer.in_proj_weight.detach()
    q, k = (
        turned_by_hand((x @ weight[i * E : (i + 1) * E].T).view(N, -1, H, D).transpose(1, 2), 1e4)
        for i, x in enumerate((query, memory))
    )
    expected = (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1)
    inputs = (query, memory, memory) if batch_first else (x.transpose(0, 1) for x in (query, memory, memory))
    weights = layer(*inputs, average_attn_weights=False)[1]
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["half", "batch", "doubled"])
def test_rotary_arguments_equal_built_in_positions(form: str) -> None:
    built = layer_with(positions=RotaryPositions(D))
    plain = layer_with()
    plain.load_state_dict(built.state_dict())
    x = torch.randn(N, L, E, dtype=torch.float64)
    positions = torch.arange(L, dtype=torch.float64)
    rotary = RotaryPositions(D).rotary(positions.expand(N, L) if form == "batch" else positions)
    if form == "doubled":  # the form in which Hugging Face's Llama computes cosines and sines
        rotary = tuple(torch.cat([part, part], -1)[None] for part in rotary)
    torch.testing.assert_close(plain(x, x, x, rotary=rotary), built(x, x, x), rtol=1e-12, atol=1e-12)


def test_a_position_bias_argument_gets_a_gradient_and_can_mask() -> None:
    layer = layer_with()
    query, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)

    def run(bias: Tensor) -> Tensor:
        return layer(query, memory, memory, position_bias=bias)[0]

    assert torch.autograd.gradcheck(run, torch.randn(H, 1, S, dtype=torch.float64).requires_grad_(), fast_mode=True)
    masking = torch.zeros(S).masked_fill(torch.arange(S) >= 4, torch.finfo(torch.float32).min)
    short = layer(query, memory[:, :4], memory[:, :4])[0]
    torch.testing.assert_close(run(masking), short, rtol=1e-9, atol=1e-12)


def test_parameters_of_user_defined_positions_get_gradients() -> None:
    class Learnt(Positions):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(H, 1, 1, dtype=torch.float64))

        def bias(self, query: Tensor, key: Tensor) -> Tensor:
            return -self.slope.abs() * (query[:, None] - key).abs()

    layer = layer_with(positions=Learnt())
    x = torch.randn(N, L, E, dtype=torch.float64)
    layer(x, x, x)[0].square().sum().backward()
    assert bool((layer.positions.slope.grad != 0).all())


@pytest.mark.parametrize("positions", [RotaryPositions(D, base=500.0), ALiBi(H), NAPE(H)], ids=str)
def test_positions_survive_copies_and_pickles_and_are_not_in_the_state_dict(positions: Positions) -> None:
    layer = layer_with(positions=positions)
    x = torch.randn(N, L, E, dtype=torch.float64)
    expected = layer(x, x, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x, x, x), expected, rtol=0, atol=0)
    assert set(layer.state_dict()) == set(layer_with().state_dict())


def test_repr_of_positions_is_their_constructor_call() -> None:
    assert [str(p) for p in (RotaryPositions(8), ALiBi(4), NAPE(4))] == [
        "RotaryPositions(8, base=10000.0)",
        "ALiBi(4)",
        "NAPE(4)",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryPositions(7), "head_dim must be an even number of at least 2, got 7"),
        (lambda: RotaryPositions(0), "head_dim must be an even number of at least 2, got 0"),
        (lambda: RotaryPositions(8, base=0.0), r"base must be in \(0, inf\), got 0.0"),
        (lambda: RotaryPositions(8, base=math.inf), r"base must be in \(0, inf\), got inf"),
        (lambda: RotaryPositions(8, base=math.nan), r"base must be in \(0, inf\), got nan"),
        (lambda: ALiBi(0), "num_heads must be at least 1, got 0"),
        (lambda: NAPE(1), "num_heads must be at least 2, got 1"),
        (lambda: layer_with(positions=RotaryPositions(8)), r"must be RotaryPositions\(22\), the size of a head, got"),
        (lambda: layer_with(positions=ALiBi(4)), r"positions must be for 3 heads, got ALiBi\(4\)"),
        (lambda: layer_with(positions=NAPE(2)), r"positions must be for 3 heads, got NAPE\(2\)"),
    ],
)
def test_wrong_sizes_and_positions_for_another_layer_raise_an_error(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_positions_or_sizes_of_a_wrong_type_raise_an_error() -> None:
    with pytest.raises(TypeError, match=r"head_dim must be an int, got 8\.0"):
        RotaryPositions(8.0)
    with pytest.raises(TypeError, match="base must be a number, got '500000'"):
        RotaryPositions(8, base="500000")
    with pytest.raises(TypeError, match="num_heads must be an int, got '4'"):
        NAPE("4")
    with pytest.raises(TypeError, match=r"positions must be a sparse_attn\.nn\.Positions, got str"):
        layer_with(positions="rotary")


COS = torch.ones(L, D // 2)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rotary": COS}, TypeError, r"rotary must be a pair \(cos, sin\), got Tensor"),
        ({"rotary": (COS.long(), COS.long())}, TypeError, "rotary must have a floating dtype"),
        (
            {"rotary": (COS[:4], COS[:4])},
            ValueError,
            r"even head size, D = 22, got \(4, 11\) and \(4, 11\)",
        ),
        ({"rotary": (COS[:, :5], COS[:, :5])}, ValueError, r"got \(5, 5\) and \(5, 5\)"),
        ({"rotary": (COS, COS[:4])}, ValueError, r"got \(5, 11\) and \(4, 11\)"),
        ({"position_bias": torch.zeros(N, L, L)}, ValueError, r"position_bias must broadcast to .*\(2, 3, 5, 5\).*got"),
        (
            {"position_bias": torch.zeros(L, S)},
            ValueError,
            r"position_bias must broadcast .*\(2, 3, 5, 5\).*\(5, 7\)",
        ),
        ({"position_bias": torch.zeros(L, L).bool()}, TypeError, "position_bias must have a floating dtype"),
    ],
)
def test_rotary_and_bias_arguments_of_a_wrong_type_or_shape_raise_an_error(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = torch.randn(N, L, E, dtype=torch.float64)
    with pytest.raises(error, match=message):
        layer_with()(x, x, x, **kwargs)


def test_rotary_that_does_not_fit_the_layer_or_the_keys_is_refused() -> None:
    x, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    with pytest.raises(ValueError, match="rotary must be None, since the layer's own positions rotate"):
        layer_with(positions=RotaryPositions(D))(x, x, x, rotary=(COS, COS))
    with pytest.raises(ValueError, match="as many queries as new keys, got 5 queries and 7 keys"):
        layer_with()(x, memory, memory, rotary=(COS, COS))
    odd = AdaptiveSparseMultiheadAttention(9, 3, batch_first=True)
    with pytest.raises(ValueError, match="an even head size, D = 3"):
        odd(*[torch.randn(N, L, 9)] * 3, rotary=(torch.ones(L, 1), torch.ones(L, 1)))


class OfGivenBias(Positions):
    """Positions whose bias is a given tensor."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def bias(self, query: Tensor, key: Tensor) -> Tensor:
        return self.given


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(7, 3), ValueError, r"the bias of positions must broadcast to the scores .*, got shape \(7, 3\)"),
        (torch.zeros(5, 5, dtype=torch.bool), TypeError, "the bias of positions must have a floating dtype"),
        ([1.0], TypeError, r"the bias of positions must be a torch\.Tensor, got list"),
    ],
)
def test_a_wrong_bias_of_positions_is_refused(bias: Any, error: type[Exception], message: str) -> None:
    layer = AdaptiveSparseMultiheadAttention(16, 2, batch_first=True, positions=OfGivenBias(bias))
    with pytest.raises(error, match=message):
        layer(*[torch.randn(3, 5, 16)] * 3)


def test_the_smallest_number_in_a_bias_of_positions_masks_its_key() -> None:
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    bias = torch.zeros(5, 5).masked_fill(hidden, torch.finfo(torch.float32).min)
    options: dict[str, Any] = {"batch_first": True, "length_scaling": True}
    layer = AdaptiveSparseMultiheadAttention(16, 2, **options, positions=OfGivenBias(bias))
    torch.nn.init.ones_(layer.length_scaling.gamma_bias)  # the factor now depends on the number of visible keys
    x = torch.randn(3, 5, 16)
    given = layer(x, x, x)[0]
    layer.positions = None
    expected = layer(x, x, x, attn_mask=hidden)[0]
    torch.testing.assert_close(given, expected)
