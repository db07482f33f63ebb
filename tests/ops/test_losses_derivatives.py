"""Derivatives of the losses in both modes and of second order; the losses vmapped, compiled and exported."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from sparse_attn import entmax, entmax15_loss, entmax_loss

# Warnings of torch itself, at the first use of these transforms in a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

N, C, D1, D2 = 7, 5, 3, 2
ALPHAS = [0.7, 1.0, 1.0001, 1.3, 1.5, 2.0, 2.7]

# name -> function from scores (N, C), α (N, 1) and probabilities (N, C) to losses
LOSSES: dict[str, Callable[..., Tensor]] = {
    "indices": lambda x, alpha, y: entmax_loss(x, INDICES, alpha, reduction="none"),
    "smoothed": lambda x, alpha, y: entmax_loss(x, INDICES, alpha, weight=WEIGHT, label_smoothing=0.3),
    "probabilities": lambda x, alpha, y: entmax_loss(x, y, alpha, weight=WEIGHT, label_smoothing=0.3, reduction="none"),
    **{
        f"α = {alpha}": partial(lambda x, _, y, alpha: entmax_loss(x, INDICES, alpha, reduction="none"), alpha=alpha)
        for alpha in (1.0, 1.5, 2.0)
    },
}
INDICES = torch.tensor([1, 0, -100, 4, 2, 2, 3])
WEIGHT = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
both_targets = pytest.mark.parametrize(
    "make", [lambda: INDICES, lambda: probabilities()], ids=["indices", "probabilities"]
)
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def probabilities() -> Tensor:
    return torch.softmax(torch.randn(N, C, dtype=torch.float64), 1)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(N, C, dtype=torch.float64)
    return x, torch.tensor(ALPHAS, dtype=torch.float64).view(N, 1), probabilities()


@every_loss
def test_derivatives_of_first_and_second_order_in_both_modes(loss):
    inputs = tuple(x.requires_grad_() for x in arguments())
    assert torch.autograd.gradcheck(
        loss, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_is_p_minus_y_and_the_hessian_equals_the_mappings_jacobian(alpha):
    x = torch.randn(C, dtype=torch.float64)
    one = partial(entmax_loss, target=torch.tensor(3), alpha=alpha)
    torch.testing.assert_close(grad(one)(x), entmax(x, alpha) - F.one_hot(torch.tensor(3), C))
    torch.testing.assert_close(hessian(one)(x), jacrev(partial(entmax, alpha=alpha))(x))


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.001, 1.01, 1.1, 1.5, 1.75, 2.0, 2.5])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_float32_gradients_keep_their_digits(alpha, scale):
    grads = {}
    scores, target = torch.randn(7, 31) * scale, torch.randint(31, (7,))
    for dtype in (torch.float32, torch.float64):
        x = scores.to(dtype).requires_grad_()
        per_row = torch.full((7, 1), alpha).to(dtype).requires_grad_()  # rounded to float32 for both dtypes
        grads[dtype] = torch.autograd.grad(entmax_loss(x, target, per_row, reduction="sum"), (x, per_row))
    for got, exact, bound in zip(grads[torch.float32], grads[torch.float64], (1e-6, 1e-5), strict=True):
        assert (got - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("shape", [(C,), (N, C), (N, C, D1), (N, C, D1, D2), (300, 1021), (3, 1021, 307)], ids=str)
def test_the_gradient_for_alpha_in_every_shape(shape):
    x = torch.randn(shape, dtype=torch.float64)
    dim = min(x.dim() - 1, 1)
    target = torch.randint(C, x.select(dim, 0).shape)
    alpha = 1 + torch.rand_like(x.narrow(dim, 0, 1)).requires_grad_()
    loss = entmax_loss(x, target, alpha, reduction="none")
    upstream = torch.randn_like(loss)
    # With a graph for second derivatives, all rows are computed at once; otherwise a few at a time.
    (expected,) = torch.autograd.grad(loss, alpha, upstream, create_graph=True)
    (got,) = torch.autograd.grad(loss, alpha, upstream)
    torch.testing.assert_close(got, expected.detach())
    step = 1e-6
    above, below = (entmax_loss(x, target, alpha.detach() + e, reduction="none") for e in (step, -step))
    numerical = (upstream * (above - below) / (2 * step)).view_as(alpha)
    torch.testing.assert_close(got, numerical, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5, 2.0, 2.5])
def test_the_loss_falls_as_alpha_grows(alpha):
    given = torch.full((101, 1), alpha, requires_grad=True)
    entmax_loss(torch.randn(101, C), torch.randint(C, (101,)), given, reduction="sum").backward()
    assert (given.grad <= 0).all() and (given.grad < 0).any()


def test_alpha_of_one_element_or_one_per_row():
    x, target = torch.randn(N, C, D1), torch.randint(C, (N, D1))
    per_row = 1 + torch.rand(N, 1, D1)
    losses = entmax_loss(x, target, per_row, reduction="none")
    for n, d in itertools.product(range(N), range(D1)):
        alone = entmax_loss(x[n, :, d], target[n, d], per_row[n, 0, d].item())
        torch.testing.assert_close(losses[n, d], alone)
    expected = entmax_loss(x, target, 1.3)
    for shape in ((), (1,), (1, 1), (1, 1, 1)):
        alpha = torch.full(shape, 1.3, requires_grad=True)
        loss = entmax_loss(x, target, alpha)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert alpha.grad.shape == shape
    halves = torch.full((), 1.5, dtype=torch.float16, requires_grad=True)
    entmax_loss(x, target, halves).backward()
    assert halves.grad.dtype == torch.float16 and halves.grad < 0


@both_targets
def test_changing_alpha_in_place_before_the_backward_raises_an_error(make):
    for dtype in (torch.float64, torch.float32):
        x, alpha = torch.randn(N, C, requires_grad=True), torch.full((N, 1), 1.3, dtype=dtype, requires_grad=True)
        loss = entmax_loss(x, make(), alpha)
        with torch.no_grad():
            alpha.mul_(1.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_strided_and_expanded_scores():
    x, target = torch.randn(C, N, dtype=torch.float64).T, torch.randint(C, (N,))
    torch.testing.assert_close(entmax_loss(x, target, 1.3), entmax_loss(x.contiguous(), target, 1.3))
    row = torch.randn(1, C, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(entmax_loss(row.expand(N, C), target, 1.3), row)
    (expected,) = torch.autograd.grad(entmax_loss(row.repeat(N, 1), target, 1.3), row)
    torch.testing.assert_close(got, expected)


@every_loss
def test_jacobians_and_hessians_agree_in_every_order_of_modes(loss):
    inputs = arguments()

    def squares(*inputs: Tensor) -> Tensor:
        return loss(*inputs).square().sum()

    everything = (0, 1, 2)
    forward, reverse = (jacobian(squares, argnums=everything)(*inputs) for jacobian in (jacfwd, jacrev))
    torch.testing.assert_close(forward, reverse)
    expected = torch.autograd.functional.hessian(squares, inputs)
    for outer, inner in [(jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd), (jacrev, jacrev)]:
        torch.testing.assert_close(outer(inner(squares, argnums=everything), argnums=everything)(*inputs), expected)


def test_vmap_equals_a_loop():
    x, alpha, y = arguments()
    target = torch.randint(C, (N,))
    for second in (target, y):
        expected = torch.stack([entmax_loss(*row) for row in zip(x, second, alpha, strict=True)])
        torch.testing.assert_close(vmap(entmax_loss)(x, second, alpha), expected)
        one_alpha = vmap(entmax_loss, in_dims=(0, 0, None))(x, second, alpha[3])
        torch.testing.assert_close(one_alpha, entmax_loss(x, second, alpha[3], reduction="none"))
        over_targets = vmap(entmax_loss, in_dims=(None, 0))(x[0], second)
        torch.testing.assert_close(over_targets, entmax_loss(x[:1].repeat(N, 1), second, reduction="none"))
        over_alphas = vmap(entmax_loss, in_dims=(None, None, 0))(x[0], second[0], alpha)
        torch.testing.assert_close(over_alphas, torch.stack([entmax_loss(x[0], second[0], a) for a in alpha]))
        per_row = vmap(grad(entmax_loss, argnums=(0, 2)))(x, second, alpha)
        torch.testing.assert_close(
            per_row, grad(lambda *args: entmax_loss(*args, reduction="sum"), argnums=(0, 2))(x, second, alpha)
        )
        # Gradients for inputs without the batched dimension
        shared = grad(lambda x, a, second=second: vmap(entmax_loss, (None, 0, None))(x, second, a).sum(), (0, 1))
        repeated = grad(lambda x, a, second=second: entmax_loss(x.expand(N, C), second, a, reduction="sum"), (0, 1))
        torch.testing.assert_close(shared(x[0], alpha[3]), repeated(x[0], alpha[3]))
    batches = vmap(partial(entmax_loss, ignore_index=2, weight=WEIGHT, label_smoothing=0.1), in_dims=(-1, 1))
    x, target = torch.randn(N, C, D1, dtype=torch.float64), torch.randint(C, (N, D1))
    expected = [
        entmax_loss(x[..., d], target[:, d], ignore_index=2, weight=WEIGHT, label_smoothing=0.1) for d in range(D1)
    ]
    torch.testing.assert_close(batches(x, target), torch.stack(expected))


@every_loss
def test_forward_mode_by_dual_numbers(loss):
    inputs = arguments()
    tangents = tuple(torch.randn_like(x) for x in inputs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(loss(*duals)).tangent
    torch.testing.assert_close(tangent, jvp(loss, inputs, tangents)[1])


@pytest.mark.parametrize("name", ["smoothed", "probabilities", "α = 1.5"])
def test_a_compiled_graph_without_breaks_trains_like_eager_code(name):
    torch._dynamo.reset()
    loss = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = arguments()
    learnt = tuple(x.clone().requires_grad_() for x in inputs)
    got, expected = compiled(*learnt), loss(*learnt)
    torch.testing.assert_close(got, expected)
    a, b = (torch.autograd.grad(y.sum(), learnt, allow_unused=True, materialize_grads=True) for y in (got, expected))
    torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))


def test_inductor_compiles_the_loss():
    torch._dynamo.reset()
    x = torch.randn(N, C, requires_grad=True)
    loss = partial(entmax15_loss, target=INDICES, weight=WEIGHT.float(), label_smoothing=0.1)
    got, expected = torch.compile(loss, fullgraph=True)(x), loss(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x) for value in (got, expected)))


def vmap_of_grad(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return vmap(grad(f))


@pytest.mark.parametrize(("alpha", "transform"), [(1.0, jacrev), (1.0, jacfwd), (1.5, vmap_of_grad)])
def test_torch_func_inside_a_compiled_function(alpha, transform):
    torch._dynamo.reset()
    x, target = torch.randn(N, C, dtype=torch.float64), torch.randint(C, (N,))

    def one(x: Tensor, target: Tensor) -> Tensor:
        return entmax_loss(x, target, alpha)

    compiled = torch.compile(lambda *args: transform(one)(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), transform(one)(x, target))


class TwoLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("weight", torch.rand(C))

    def forward(self, x: Tensor, target: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            entmax_loss(x, target, self.alpha, ignore_index=1, label_smoothing=0.1),
            entmax15_loss(x, y, weight=self.weight),
        )


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_compute_and_train_like_eager_code(strict):
    model = TwoLosses()
    x, target, y = torch.randn(N, C), torch.randint(C, (N,)), probabilities().float()
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (x, target, y), dynamic_shapes=(batch,) * 3, strict=strict)
    assert not [
        node for node in program.graph.nodes if "sparse_attn" in str(node.target)
    ]  # the program does not need this library
    for inputs in ((x, target, y), (x[:3], target[:3], y[:3])):
        for got, expected in zip(program.module()(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(got, expected)
    exported = program.module()
    for trained in (exported, model):
        trained(x, target, y)[0].backward()
    (alpha,) = exported.parameters()
    torch.testing.assert_close(alpha.grad, model.alpha.grad, atol=1e-5, rtol=1e-4)


@both_targets
def test_shapes_without_data(make):
    x, target = torch.randn(N, C), make()
    assert entmax_loss(x.to("meta"), target.to("meta"), reduction="none").shape == (N,)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, target)]
        fakes[0].requires_grad_()
        entmax_loss(*fakes).backward()
        assert fakes[0].grad.shape == (N, C)
