"""Known defects of the entmax package (1.3). The functions of sparse_attn and of its module `compat` do not have them.

A comment in each test describes the behaviour of the package. Numbers with a # are issues and pull requests of
the package.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.func import grad as func_grad
from torch.func import jvp, vmap

import sparse_attn
from sparse_attn.compat import entmax as compat
from sparse_attn.nn.losses import Entmax15Loss, EntmaxLoss, SparsemaxLoss
from sparse_attn.ops.losses import entmax_loss

# Warnings of torch itself, at the first use of forward mode and of the compiler in a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

MAPPINGS = {
    "sparsemax": compat.sparsemax,
    "sparsemax, k": lambda x: compat.sparsemax(x, k=2),
    "entmax15": compat.entmax15,
    "sparsemax_bisect": compat.sparsemax_bisect,
    "entmax_bisect": compat.entmax_bisect,
    "entmax_bisect, 1.1": lambda x: compat.entmax_bisect(x, 1.1),
    "normmax_bisect": compat.normmax_bisect,
    "budget_bisect": compat.budget_bisect,
    "native sparsemax": sparse_attn.sparsemax,
    "native entmax15": sparse_attn.entmax15,
    "native entmax": sparse_attn.entmax,
    "native normmax": sparse_attn.normmax,
    "native budget_sparsemax": sparse_attn.budget_sparsemax,
}
LOSSES = {
    "sparsemax_loss": compat.sparsemax_loss,
    "entmax15_loss": compat.entmax15_loss,
    "sparsemax_bisect_loss": compat.sparsemax_bisect_loss,
    "entmax_bisect_loss": compat.entmax_bisect_loss,
    "normmax_bisect_loss": compat.normmax_bisect_loss,
}
each_mapping = pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# α-entmax in compat and in sparse_attn.
each_entmax = pytest.mark.parametrize("entmax", [compat.entmax_bisect, sparse_attn.entmax], ids=["compat", "native"])


@each_mapping
@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_a_fully_masked_row(mapping, lowest):
    # Mappings by sorting raise "index -1 is out of bounds"; mappings by bisection return NaN. #9, #17, #19
    x = torch.full((2, 5), lowest)
    x[1, 2:] = torch.tensor([0.5, -0.5, 0.1])
    x.requires_grad_()
    p = mapping(x)
    assert (p[0] == 0).all()
    torch.testing.assert_close(p[1, 2:], mapping(x[1, 2:]))
    assert (p[1, :2] == 0).all()
    (slope,) = grad(p[1, 2] + p[0].sum(), x)
    assert slope.isfinite().all()
    assert (slope[0] == 0).all()


@each_mapping
def test_large_scores(mapping):
    # Bisection does not subtract the maximum: these scores give NaN; an offset of 1e5 causes an error of 2e-3.
    largest = {torch.float32: 3e7, torch.float16: 4096.0, torch.bfloat16: 300.0}
    for dtype, size in largest.items():
        p = mapping(torch.tensor([size, size, 0.0, -size], dtype=dtype))
        assert torch.equal(p, mapping(torch.tensor([0.0, 0, -1e4, -2e4])).to(dtype))
    x = torch.randn(5, 7).mul(64).round().div(64)  # the sum with 1e5 is exact
    torch.testing.assert_close(mapping(x + 1e5), mapping(x), atol=2e-7, rtol=0)


@each_mapping
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(mapping, dtype):
    # The package computes in half precision: errors are up to 8e-2, and sums differ from 1 by up to 0.1. PR #31
    x = torch.randn(5, 101).to(dtype)
    assert mapping(x).dtype == dtype
    assert torch.equal(mapping(x), mapping(x.float()).to(dtype))  # one rounding


@each_mapping
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_autocast(mapping, device):
    # The package has no autocast rule: it computes in the dtype of the input; softmax on a GPU computes in float32.
    x = torch.randn(3, 5, device=device).bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert mapping(x).dtype == torch.softmax(x, -1).dtype


@each_entmax
def test_alpha_1(entmax):
    # The package returns the uniform distribution without an error, and NaN as gradient for α. #16, #23, #24, #36
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    for alpha in (1, 1.0, torch.tensor(1.0, dtype=torch.float64)):
        torch.testing.assert_close(entmax(x, alpha), torch.softmax(x, -1))
    alpha = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(entmax, (x, alpha))
    torch.testing.assert_close(
        compat.entmax_bisect_loss(x, torch.arange(5), 1), F.cross_entropy(x, torch.arange(5), reduction="none")
    )


@each_entmax
@pytest.mark.parametrize("alpha", [1.0001, 1.001, 1.01])
def test_alpha_near_1(entmax, alpha):
    # In float32, the error of the gradient for α is 0.1 % at 1.01, 2 % at 1.001 and a factor of 12 at 1.0001.
    def slope(dtype):
        given = torch.tensor(torch.tensor(alpha).item(), dtype=dtype, requires_grad=True)
        return grad((entmax(x.to(dtype), given) * weight.to(dtype)).sum(), given)[0].double()

    x, weight = torch.randn(2, 101)
    torch.testing.assert_close(slope(torch.float32), slope(torch.float64), rtol=1e-4, atol=0)
    # In bfloat16, the gradient has the wrong sign at 1.01.
    given = torch.tensor(alpha, requires_grad=True)
    (half,) = grad((entmax(x.bfloat16(), given) * weight).sum(), given)
    (full,) = grad((entmax(x.bfloat16().float(), given) * weight).sum(), given)
    torch.testing.assert_close(half, full, rtol=1e-2, atol=0)


def test_one_alpha_per_head():
    # α of shape (H,) raises "the expanded size of the tensor must match". #10, #15, #29, #39
    alpha = torch.tensor([1.0, 1.3, 2.0])
    query, key, value = torch.randn(3, 2, 3, 5, 7).unbind()
    scores = query @ key.mT / math.sqrt(7)
    out = sparse_attn.entmax_attention(query, key, value, alpha=alpha)
    torch.testing.assert_close(out, compat.entmax_bisect(scores, alpha.view(-1, 1, 1)) @ value)
    # A mapping cannot know the dimension of the heads: its error message shows the shape to use.
    for entmax in (compat.entmax_bisect, sparse_attn.entmax):
        with pytest.raises(ValueError, match=r"for one alpha per entry of dim 1 use alpha.view\(-1, 1, 1\)"):
            entmax(scores, alpha)


@pytest.mark.parametrize("layer", [compat.EntmaxBisect, sparse_attn.Entmax], ids=["compat", "native"])
def test_a_parameter_as_alpha_of_a_module(layer):
    # The package raises "cannot assign parameters before Module.__init__() call".
    layer = layer(alpha=nn.Parameter(torch.tensor(1.5)))
    (alpha,) = layer.parameters()
    layer(torch.randn(5, 7)).square().sum().backward()
    assert alpha.grad != 0


@each_mapping
def test_integer_input(mapping):
    # `entmax_bisect` returns the uniform distribution without an error.
    with pytest.raises(TypeError, match=r"x must have a floating dtype .* got torch.int64"):
        mapping(torch.tensor([3, 1, 2]))


@pytest.mark.parametrize("mapping", [compat.sparsemax, compat.entmax15])
@pytest.mark.parametrize("dim", [-3, -2, -1])
def test_k_with_negative_dims(mapping, dim):
    # For a negative dim other than -1, the package raises if more than k entries have weight.
    x = torch.randn(3, 5, 7) / 10
    torch.testing.assert_close(mapping(x, dim=dim, k=2), mapping(x, dim=dim))


@pytest.mark.parametrize("name", [name for name in (*MAPPINGS, *LOSSES) if "native" not in name])
def test_compiled_with_fullgraph(name):
    # Training with `fullgraph=True` fails for every function; `k` and the loss classes also fail without it.
    torch._dynamo.reset()
    x = torch.randn(5, 7, requires_grad=True)
    target = torch.arange(5)
    weight = torch.randn(5, 7)

    def train(x):
        return (MAPPINGS[name](x) * weight).sum() if name in MAPPINGS else LOSSES[name](x, target).sum()

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grad(compiled(x), x), grad(train(x), x))


@each_mapping
def test_torch_func(mapping):
    # Every transform of torch.func fails.
    x, tangent = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(vmap(mapping)(x), mapping(x))
    upstream = torch.randn(7, dtype=torch.float64)
    slopes = vmap(func_grad(lambda row: mapping(row) @ upstream))(x)
    x.requires_grad_()
    torch.testing.assert_close(slopes, grad((mapping(x) @ upstream).sum(), x)[0])
    _, pushed = jvp(mapping, (x,), (tangent,))
    torch.testing.assert_close(pushed @ upstream, (slopes * tangent).sum(-1))


@each_mapping
def test_forward_mode(mapping):
    # The package raises "does not implement a formula for forward mode".
    x, tangent = torch.randn(2, 5, 7, dtype=torch.float64)
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(mapping(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6
    torch.testing.assert_close(pushed, (mapping(x + step * tangent) - mapping(x - step * tangent)) / (2 * step))


@each_loss
def test_torch_func_of_losses(loss):
    # torch.func fails for the losses.
    x, target = torch.randn(5, 7, dtype=torch.float64), torch.arange(5)
    slopes = vmap(func_grad(lambda row, label: loss(row[None], label[None]).sum()))(x, target)
    x.requires_grad_()
    torch.testing.assert_close(slopes, grad(loss(x, target).sum(), x)[0])


@each_mapping
def test_second_derivatives(mapping):
    # Second derivatives are NaN at exact zeros, or wrong without an error.
    x = 2 * torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert (mapping(x) == 0).any() or mapping is MAPPINGS["entmax_bisect, 1.1"]
    assert gradgradcheck(mapping, (x,))


@each_entmax
def test_second_derivatives_through_alpha(entmax):
    # Second derivatives through α are wrong, without an error.
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([[1.0], [1.4], [2.0]], dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(entmax, (x, alpha))


@each_loss
def test_hessian_products_of_the_losses(loss):
    # Hessian products are zero without an error, since the gradient is a constant for autograd.
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: loss(x, torch.arange(3)), (x,))


@each_entmax
def test_alpha_changed_in_place_between_forward_and_backward(entmax):
    # The gradient is then wrong, without an error.
    alpha = torch.full((3, 1), 1.3, requires_grad=True)
    loss = entmax(torch.randn(3, 5, requires_grad=True), alpha).square().sum()
    with torch.no_grad():
        alpha += 0.1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


LOSS_MODULES = [
    compat.SparsemaxLoss,
    compat.Entmax15Loss,
    compat.SparsemaxBisectLoss,
    compat.EntmaxBisectLoss,
    compat.NormmaxBisectLoss,
    SparsemaxLoss,
    Entmax15Loss,
    EntmaxLoss,
]


@pytest.mark.parametrize("module", LOSS_MODULES)
@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignore_index_and_mean_of_losses(module, ignore_index, reduction):
    # A negative ignore_index raises "out of bounds", and the reduction "mean" is refused. PR #8
    x, target = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 1, 6, 3, 4])
    kept = torch.tensor([True, True, False, True, True])
    each = module(reduction="none")(x, target)
    left_out = target.where(kept, ignore_index)
    loss = module(ignore_index=ignore_index, reduction=reduction)(x, left_out)
    expected = {"none": each.where(kept, 0), "sum": each[kept].sum(), "mean": each[kept].mean()}
    torch.testing.assert_close(loss, expected[reduction])
    assert (grad(loss.sum(), x)[0][2] == 0).all()


@pytest.mark.parametrize("loss", [compat.entmax_bisect_loss, compat.normmax_bisect_loss])
def test_alpha_of_losses(loss):
    # α gets no gradient, and with one α per row, n rows give an (n, n) loss.
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([[1.2], [1.4], [1.5], [2.0], [2.5]], dtype=torch.float64, requires_grad=True)
    losses = loss(x, torch.arange(5), alpha)
    assert losses.shape == (5,)
    for row, one in enumerate(losses):
        torch.testing.assert_close(one, loss(x, torch.arange(5), alpha[row].item())[row])
    assert gradcheck(lambda x, alpha: loss(x, torch.arange(5), alpha), (x, alpha))


@each_loss
def test_a_logit_of_minus_infinity(loss):
    # The loss is NaN.
    x = torch.tensor([[1.0, -math.inf, 0.5]], requires_grad=True)
    losses = loss(x, torch.tensor([0]))
    torch.testing.assert_close(losses, loss(x[:, [0, 2]], torch.tensor([0])))
    assert grad(losses.sum(), x)[0].isfinite().all()
    assert loss(x, torch.tensor([1])).item() == math.inf


def test_other_arguments_of_a_loss():
    # The package accepts only scores (n, C) and classes (n,): no class weights, label smoothing or class probabilities.
    x, target = torch.randn(3, 7, 5), torch.randint(7, (3, 5))
    given = {"weight": torch.rand(7), "label_smoothing": 0.1}
    for labels in (target, torch.softmax(torch.randn(3, 7, 5), 1)):
        torch.testing.assert_close(entmax_loss(x, labels, alpha=1.0, **given), F.cross_entropy(x, labels, **given))
        assert entmax_loss(x, labels, **given) > 0
    assert compat.EntmaxBisectLoss(reduction="none")(x, target).shape == (3, 5)


@pytest.mark.parametrize("budgeted", [compat.budget_bisect, sparse_attn.budget_sparsemax], ids=["compat", "native"])
def test_budget(budgeted):
    # The budget gets no gradient; an entry of -inf gives NaN; a budget above the row size gives all ones. #35
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    budget = torch.tensor([[0.7], [2.0], [4.2]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(budgeted, (x, budget))
    p = budgeted(torch.tensor([0.2, -math.inf, 0.0, 0.5]), 2)
    assert p[1] == 0
    torch.testing.assert_close(p.sum(), torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"budget must be in \(0, 5\], got 6"):
        budgeted(x, 6)


def test_attention_and_a_learnt_alpha():
    # The package has no attention and no learnt α.
    x = torch.randn(2, 5, 12)
    adaptive = sparse_attn.AdaptiveSparseMultiheadAttention(12, 3, batch_first=True)
    out, _ = adaptive(x, x, x)
    out.square().sum().backward()
    assert adaptive.alpha.shape == (3,)
    assert (adaptive.raw_alpha.grad != 0).all()
    weights = sparse_attn.TopKMultiheadAttention(12, 3, k=2, batch_first=True)(x, x, x, average_attn_weights=False)[1]
    assert ((weights > 0).sum(-1) == 2).all()
