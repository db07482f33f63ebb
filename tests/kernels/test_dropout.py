"""`dropout`, which makes a mask faster than torch: rate, mean, independence and gradients; and the layer `Dropout`."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparse_attn.kernels.dropout import dropout, dropout_noise
from sparse_attn.nn.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83, 1e-4])
def test_rate_and_mean_of_dropout(p):
    torch.manual_seed(0)
    count = 1_000_003
    noise = dropout_noise(torch.empty(count, dtype=torch.double), p)
    zeros = (noise == 0).double().mean().item()
    assert abs(zeros - p) < 5 * math.sqrt(p * (1 - p) / count) + 2**-17
    assert abs(noise.mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / count)
    (scale,) = noise[noise > 0].unique().tolist()
    assert scale == pytest.approx(1 / (1 - p), rel=2e-5 / (1 - p))


def test_neighbouring_entries_are_uncorrelated():
    torch.manual_seed(0)
    kept = (dropout_noise(torch.empty(1_000_001), 0.3) > 0).double() - 0.7
    for lag in (1, 2, 3, 4, 8, 256):
        correlation = (kept[lag:] * kept[:-lag]).mean() / (0.3 * 0.7)
        assert abs(correlation) < 5e-3, lag


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_probabilities_zero_and_one_of_dropout(p, expected):
    assert torch.equal(dropout(torch.ones(3, 5), p), torch.full((3, 5), expected))


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 11, 13), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_output_has_the_shape_and_dtype_of_the_input(shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    y = dropout(x, 0.5)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert ((y == 0) | (y == 2)).all()


def test_a_transposed_tensor_keeps_its_layout():
    x = torch.ones(5, 7).t()
    assert dropout(x, 0.5).stride() == x.stride()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode calls it
def test_gradients_in_both_modes_and_of_second_order():
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)

    def seeded(x):
        torch.manual_seed(1)
        return dropout(x, 0.4) ** 2

    assert torch.autograd.gradcheck(seeded, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(seeded, x)


def test_the_gradient_has_the_mask_and_scale_of_the_output():
    x = torch.ones(7, 11, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_a_seed_repeats_the_mask_and_a_second_call_draws_another():
    torch.manual_seed(3)
    first, second = dropout(torch.ones(1009), 0.5), dropout(torch.ones(1009), 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(torch.ones(1009), 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask_again(use_reentrant):
    def run(function):
        torch.manual_seed(5)
        x = torch.ones(31, 37, requires_grad=True)
        y = function(x)
        (y * y).sum().backward()
        return y.detach(), x.grad

    def twice(x):
        return dropout(dropout(x, 0.3).sin(), 0.3)

    plain, checkpointed = run(twice), run(lambda x: checkpoint(twice, x, use_reentrant=use_reentrant))
    assert torch.equal(plain[0], checkpointed[0])
    assert torch.equal(plain[1], checkpointed[1])


def test_compiles_without_a_graph_break():
    compiled = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")
    y = compiled(torch.ones(101, 103, requires_grad=True))
    assert abs((y == 0).double().mean().item() - 0.5) < 0.05
    y.sum().backward()


def test_vmap_of_dropout_needs_a_randomness_mode_as_in_torch():
    x = torch.ones(5, 1009)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda row: dropout(row, 0.5))(x)
    rows = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(x)
    assert not torch.equal(rows[0], rows[1])


def test_the_layer_is_a_subclass_of_torchs_and_supports_eval_mode_and_in_place():
    layer = Dropout(0.25)
    x = torch.ones(11)
    assert isinstance(layer, torch.nn.Dropout)
    assert copy.deepcopy(layer).eval()(x) is x
    inside = Dropout(0.25, inplace=True)
    assert inside(x) is x
