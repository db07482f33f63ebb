"""α as a bounded parameter: gradients at and past the bounds in every mode; a fixed α that is set later; dtypes."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparse_attn import AdaptiveSparseMultiheadAttention, Entmax, EntmaxLoss, SparseAttention, alpha_per_head
from sparse_attn.nn.alpha_range import bounded_alpha
from sparse_attn.optim import project_alpha, set_alpha

# torch warns at the first use of forward mode or of the compiler in a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

RANGE = (1.0, 2.0)
N, S, H, E = 2, 7, 3, 33


def layer_of(**kwargs: Any) -> AdaptiveSparseMultiheadAttention:
    return AdaptiveSparseMultiheadAttention(E, H, **{"batch_first": True, **kwargs})


@pytest.mark.parametrize(
    ("raw", "alpha", "grads"),
    [
        (1.5, 1.5, (-1.0, 1.0)),
        (1.0, 1.0, (-1.0, 1.0)),  # on a bound, both signs pass, so that gradients of micro-batches add up
        (2.0, 2.0, (-1.0, 1.0)),
        (0.985, 1.0, (-1.0, 1.0)),  # past a bound by less than the margin 0.02: both signs pass
        (2.015, 2.0, (-1.0, 1.0)),
        (0.975, 1.0, (-1.0, 0.0)),  # past the margin: only a gradient whose step moves α back passes
        (2.025, 2.0, (0.0, 1.0)),
        (-7.0, 1.0, (-1.0, 0.0)),
        (9.0, 2.0, (0.0, 1.0)),
    ],
)
def test_value_and_gradient(raw: float, alpha: float, grads: tuple[float, float]) -> None:
    for sign, grad in zip((-1.0, 1.0), grads, strict=True):
        parameter = nn.Parameter(torch.tensor([raw]))
        bounded = bounded_alpha(parameter, RANGE)
        assert bounded.tolist() == [pytest.approx(alpha, abs=1e-7)]
        (sign * bounded).sum().backward()
        assert parameter.grad is not None and parameter.grad.tolist() == [grad]


def test_alpha_inside_its_range_is_unchanged() -> None:
    raw = torch.rand(97, dtype=torch.float64) + 1
    assert torch.equal(bounded_alpha(raw, RANGE), raw)


def test_the_margin_is_a_share_of_the_range() -> None:
    raw = nn.Parameter(torch.tensor([3.19, 3.21]))
    bounded_alpha(raw, (-7.0, 3.0)).sum().neg().backward()
    assert raw.grad is not None and raw.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("start", [1.0, 1.01, 2.0])
def test_gradients_of_micro_batches_sum_to_the_gradient_of_the_joined_batch(start: float) -> None:
    layer = layer_of(alpha_init=start, dtype=torch.float64)
    x = 3 * torch.randn(5, S, E, dtype=torch.float64)
    target = torch.randn(5, S, E, dtype=torch.float64)

    def loss(rows: slice) -> Tensor:
        return (layer(x[rows], x[rows], x[rows])[0] * target[rows]).sum()

    apart = []
    for n in range(5):
        (grad,) = torch.autograd.grad(loss(slice(n, n + 1)), [layer.raw_alpha])
        apart.append(grad)
    signs = torch.stack(apart).sign()
    assert bool((signs.min(0).values != signs.max(0).values).any()), "no gradients differ in sign"
    (together,) = torch.autograd.grad(loss(slice(None)), [layer.raw_alpha])
    torch.testing.assert_close(sum(apart), together)


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_alpha_leaves_a_bound_soon_after_a_long_stay(make_optimizer: type[torch.optim.Optimizer], bound: float) -> None:
    raw = nn.Parameter(torch.tensor([bound]))
    outwards, lr = (1.0 if bound == 1.0 else -1.0), 0.005
    optimizer = make_optimizer([raw], lr=lr)
    steps = []
    for direction, most in ((outwards, 500), (-outwards, 100)):
        for step in range(most):
            optimizer.zero_grad()
            alpha = bounded_alpha(raw, RANGE)
            (direction * alpha).sum().backward()
            assert alpha.item() == bound if direction == outwards else True
            if direction != outwards and alpha.item() != bound:
                steps.append(step)
                break
            optimizer.step()
    assert steps and steps[0] <= 15, "the margin is 4 steps wide, and Adam's momentum takes a few more"


def test_noise_in_micro_batches_does_not_move_alpha_off_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 8, generator=generator) + 0.5  # gradients of both signs; their mean would move α below 1
    raw = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([raw], lr=1e-3)
    for batch in noise:
        optimizer.zero_grad()
        for micro in batch:
            (micro * bounded_alpha(raw, RANGE)).sum().backward()
        optimizer.step()
        # If the gradient of each micro-batch were projected, α would be above the bound after about every fourth step.
        assert bounded_alpha(raw, RANGE).item() == 1.0


def test_projection_after_each_step_is_projected_gradient_descent() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Entmax(torch.tensor([1.0, 1.2, 2.0]), learn_alpha=True)
    raw = layer.raw_alpha
    assert isinstance(raw, nn.Parameter)
    optimizer = torch.optim.SGD([raw], lr=0.3)
    optimizer.register_step_post_hook(lambda *_: project_alpha(layer))
    expected = raw.detach().clone()
    for gradient in torch.randn(50, 3, generator=generator):
        optimizer.zero_grad()
        assert isinstance(layer.alpha, Tensor)
        (gradient * layer.alpha).sum().backward()
        optimizer.step()
        expected = (expected - 0.3 * gradient).clamp(1.0, 2.0)
        torch.testing.assert_close(raw.detach(), expected)


# Forward mode, per-example gradients, second derivatives


@pytest.mark.parametrize("raw", [0.9, 1.0, 1.5, 2.0, 2.1])
def test_the_forward_mode_tangent_is_not_projected(raw: float) -> None:
    x, tangent = torch.tensor([raw]), torch.tensor([3.0])
    value, out = torch.func.jvp(lambda r: bounded_alpha(r, RANGE), (x,), (tangent,))
    assert value.item() == min(max(x.item(), 1.0), 2.0) and out.tolist() == [3.0]
    with forward_ad.dual_level():
        dual = bounded_alpha(forward_ad.make_dual(x, tangent), RANGE)
        assert forward_ad.unpack_dual(dual).tangent.tolist() == [3.0]


def test_second_derivatives_in_every_order_of_modes() -> None:
    x = torch.tensor([1.0, 1.3, 2.0], dtype=torch.float64)

    def f(raw: Tensor) -> Tensor:
        return bounded_alpha(raw, RANGE).pow(3).sum()

    once = (torch.func.jacfwd, torch.func.jacrev)
    for outer, inner in itertools.product(once, once):
        torch.testing.assert_close(outer(inner(f))(x), torch.diag(6 * x))


@pytest.mark.parametrize("start", [1.0, 1.37, 2.0])
def test_forward_mode_through_a_layer_agrees_with_reverse_mode(start: float) -> None:
    layer = layer_of(alpha_init=start, dtype=torch.float64)
    x = torch.randn(N, S, E, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    tangents = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x, x, x))[0].square().sum()

    _, forward = torch.func.jvp(loss, (parameters,), (tangents,))
    reverse = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(forward, sum((reverse[name] * tangents[name]).sum() for name in parameters))


@pytest.mark.parametrize("start", [1.0, 1.5])
def test_gradients_per_example_by_vmap(start: float) -> None:
    layer = layer_of(alpha_init=start, dtype=torch.float64)
    x = torch.randn(N, S, E, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x, x, x))[0].square().sum()

    alone = torch.func.vmap(torch.func.grad(lambda p, one: loss(p, one[None])), in_dims=(None, 0))(parameters, x)
    for name, gradient in torch.func.grad(loss)(parameters, x).items():
        torch.testing.assert_close(alone[name].sum(0), gradient)


def test_an_exported_layer_clamps_alpha() -> None:
    layer = layer_of(alpha_init=1.5).eval()
    nn.init.constant_(layer.raw_alpha, 2.3)
    x = torch.randn(N, S, E)
    program = torch.export.export(layer, (x, x, x))
    torch.testing.assert_close(program.module()(x, x, x), layer(x, x, x))


# A fixed α that changes later


@pytest.mark.parametrize("alphas", [1.75, [1.25, 1.5, 2.0]])
def test_a_fixed_alpha_that_was_set_is_used_saved_and_loaded(alphas: Any) -> None:
    layer = layer_of(alpha_init=1.0, learn_alpha=False)
    before = alpha_per_head(layer)[""]
    set_alpha(layer, alphas)
    expected = layer_of(alpha_init=alphas, learn_alpha=False)
    expected.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "raw_alpha"})
    x = torch.randn(N, S, E)
    torch.testing.assert_close(layer(x, x, x), expected(x, x, x))
    assert not any(name == "raw_alpha" for name, _ in layer.named_parameters())

    for fresh in (layer_of(alpha_init=1.0, learn_alpha=False), layer_of(), copy.deepcopy(layer)):
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(fresh.alpha.detach(), torch.tensor(alphas).expand(H))
    set_alpha(layer, 1.0)
    assert before.tolist() == [1.0] * H
    assert alpha_per_head(layer)[""].tolist() == [1.0] * H


def test_alpha_per_head_returns_copies() -> None:
    layer = layer_of(alpha_init=1.0, learn_alpha=False)
    set_alpha(layer, 1.25)
    kept = alpha_per_head(layer)[""]
    set_alpha(layer, 1.5)
    assert kept.tolist() == [1.25] * H


@pytest.mark.parametrize("make", [lambda: Entmax(1.25), lambda: EntmaxLoss(1.25)])
def test_set_alpha_turns_a_fixed_number_into_a_buffer(make: Any) -> None:
    module = make()
    assert list(module.state_dict()) == []
    set_alpha(module, 1.5)
    assert list(module.state_dict()) == ["raw_alpha"] and module.alpha.item() == 1.5
    fresh = make()
    fresh.load_state_dict(module.state_dict())
    assert fresh.alpha.item() == 1.5
    assert module.half().raw_alpha.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone])
def test_an_alpha_in_half_precision_is_converted_to_float32(kind: Any, dtype: torch.dtype) -> None:
    given = kind(torch.tensor([1.25, 1.5], dtype=dtype))
    module = Entmax(given)
    assert module.raw_alpha.dtype == torch.float32 and module.raw_alpha.tolist() == [1.25, 1.5]
    assert (module.raw_alpha is given) == isinstance(given, nn.Parameter)


@pytest.mark.parametrize(
    "make", [lambda: Entmax(torch.full((H, 1, 1), 1.5)), lambda: SparseAttention(alpha=torch.ones(H))]
)
def test_repr_on_the_meta_device(make: Any) -> None:
    assert f"alpha=<({H}," in repr(make().to("meta"))


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {}])
def test_a_gradient_stays_float32_with_its_alpha(convert: Any, options: dict[str, Any]) -> None:
    layer, x = layer_of(), torch.randn(N, S, E)
    layer(x, x, x)[0].square().sum().backward()
    before, alpha = layer.raw_alpha.grad.clone(), layer.raw_alpha
    convert(layer)
    assert layer.raw_alpha is alpha and torch.equal(layer.raw_alpha.grad, before)
    torch.optim.AdamW([layer.raw_alpha], lr=0.125, weight_decay=0.0, **options).step()
    torch.testing.assert_close(layer.raw_alpha.detach(), 1.5 - 0.125 * before.sign())


def test_a_parameter_in_half_precision_keeps_its_gradient() -> None:
    given = nn.Parameter(torch.tensor(1.5).half())
    given.grad = torch.tensor(0.25).half()
    Entmax(given)
    assert given.dtype == given.grad.dtype == torch.float32 and given.grad.item() == 0.25


@pytest.mark.parametrize("learn_alpha", [False, True])
def test_alpha_can_be_a_fraction(learn_alpha: bool) -> None:
    for module in (
        Entmax(Fraction(5, 4), learn_alpha=learn_alpha),
        layer_of(alpha_init=Fraction(5, 4), learn_alpha=learn_alpha),
    ):
        assert set(torch.as_tensor(module.alpha).flatten().tolist()) == {1.25}
        set_alpha(module, Fraction(7, 4))
        assert set(torch.as_tensor(module.alpha).flatten().tolist()) == {1.75}
