"""The mappings under torch's transforms, compiled and exported: the same values and derivatives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import onnxruntime
import pytest
import torch
from old_torch import since_torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    Entmax,
    budget_sparsemax,
    entmax,
    entmax15,
    normmax,
    replace_attention,
    sparse_softmax,
    sparsemax,
    topk_softmax,
)

# Warnings of torch itself, at the first use of these transforms in a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

# name -> the mapping of scores (N, d) and a parameter (N, 1), and the values of the parameter (None: no parameter).
# ALPHAS has one α of each kind that the kernels distinguish. The entry "entmax" has them all in one tensor, the entries
# "entmax 0.7", ... have one number each.
ALPHAS = [[0.7], [1.0], [1.0001], [1.5], [1.75], [2.0], [2.7]]
N = len(ALPHAS)
MAPPINGS: dict[str, tuple[Callable[..., Tensor], list[list[float]] | None]] = {
    "entmax": (entmax, ALPHAS),
    "normmax": (normmax, [[1.1], [1.5], [2.0], [2.5], [3.0], [3.5], [4.0]]),
    "budget_sparsemax": (budget_sparsemax, [[0.3], [1.3], [1.7], [2.2], [3.1], [3.8], [4.5]]),
    **{f"entmax {alpha}": (partial(entmax, alpha=alpha), None) for (alpha,) in ALPHAS},
    "normmax 3": (partial(normmax, alpha=3.0), None),
    "budget_sparsemax 1.7": (partial(budget_sparsemax, budget=1.7), None),
    "topk_softmax": (partial(topk_softmax, k=2), None),
    "sparse_softmax": (partial(sparse_softmax, k=3), None),
}
every_mapping = pytest.mark.parametrize(("mapping", "values"), MAPPINGS.values(), ids=MAPPINGS)


def arguments(values: list[list[float]] | None) -> tuple[Tensor, ...]:
    x = torch.randn(N, 5, dtype=torch.float64)
    return (x,) if values is None else (x, torch.tensor(values, dtype=torch.float64))


def require(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in inputs)


@every_mapping
def test_derivatives_of_first_and_second_order_in_both_modes(mapping, values):
    inputs = require(arguments(values))
    assert torch.autograd.gradcheck(
        mapping, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(mapping, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@every_mapping
@pytest.mark.parametrize("argument", [0, 1], ids=["scores", "parameter"])
def test_jacobians_and_hessians_agree_in_every_order_of_modes(mapping, values, argument):
    inputs = arguments(values)
    if argument == len(inputs):
        pytest.skip("no such argument")
    forward, reverse = (jacobian(mapping, argnums=argument)(*inputs) for jacobian in (jacfwd, jacrev))
    torch.testing.assert_close(forward, reverse)

    def cubes(*inputs: Tensor) -> Tensor:
        return mapping(*inputs).pow(3).sum()

    expected = torch.autograd.functional.hessian(cubes, inputs)[argument][argument]
    modes = [(jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd), (jacrev, jacrev)]
    for outer, inner in modes:
        torch.testing.assert_close(outer(inner(cubes, argnums=argument), argnums=argument)(*inputs), expected)
    torch.testing.assert_close(hessian(cubes, argnums=argument)(*inputs), expected)


@every_mapping
def test_vmap_equals_a_loop(mapping, values):
    inputs = arguments(values)
    rows = [mapping(*(x[i] for x in inputs)) for i in range(N)]
    torch.testing.assert_close(vmap(mapping)(*inputs), torch.stack(rows))
    last = tuple(x.movedim(0, -1) for x in inputs)
    torch.testing.assert_close(vmap(mapping, in_dims=-1, out_dims=-1)(*last), torch.stack(rows, -1))
    per_row = vmap(grad(lambda *inputs: mapping(*inputs).square().sum()))(*inputs)
    torch.testing.assert_close(per_row, grad(lambda *inputs: mapping(*inputs).square().sum())(*inputs))
    if len(inputs) == 2:  # one row with many parameters, and many rows with one parameter
        x, parameter = inputs
        over_parameter = vmap(mapping, in_dims=(None, 0))(x[0], parameter)
        torch.testing.assert_close(over_parameter, torch.stack([mapping(x[0], one) for one in parameter]))
        over_rows = vmap(mapping, in_dims=(0, None))(x, parameter[0])
        torch.testing.assert_close(over_rows, torch.stack([mapping(row, parameter[0]) for row in x]))


def test_vmap_over_heads_of_batched_scores():
    x, alpha = torch.randn(2, 3, 5, 7), torch.tensor([1.0, 1.4, 2.0])
    per_head = vmap(entmax, in_dims=(1, 0), out_dims=1)(x, alpha)
    torch.testing.assert_close(per_head, entmax(x, alpha.view(-1, 1, 1)))
    assert torch.equal(vmap(partial(entmax, dim=0))(x), entmax(x, dim=1))


@every_mapping
def test_forward_mode_by_dual_numbers(mapping, values):
    inputs = arguments(values)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(mapping(*duals)).tangent
    torch.testing.assert_close(tangent, jvp(mapping, inputs, tangents)[1])
    step = 1e-6
    above, below = (mapping(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(tangent, (above - below) / (2 * step), atol=1e-6, rtol=1e-5)


@every_mapping
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_without_breaks_trains_like_eager_code(mapping, values, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(mapping, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = arguments(values)
    for rows in (N, 4, 5):  # other shapes after the first
        some = require(tuple(x[:rows] for x in inputs))
        upstream = torch.randn(rows, 5, dtype=torch.float64)
        got, expected = (f(*some) for f in (compiled, mapping))
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(y, some, upstream) for y in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), mapping(*inputs))


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(lambda x: f(x).square().sum())), jacrev, jacfwd])
@pytest.mark.parametrize("mapping", [entmax15, lambda x: entmax(x, 1.3), lambda x: topk_softmax(x, 2)])
def test_torch_func_inside_a_compiled_function(mapping, transform):
    torch._dynamo.reset()
    x = torch.randn(3, 5, dtype=torch.float64)
    compiled = torch.compile(lambda x: transform(mapping)(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), transform(mapping)(x))


def test_inductor_compiles_the_mapping():
    torch._dynamo.reset()
    inputs = require((torch.randn(N, 5), torch.tensor(ALPHAS)))
    compiled = torch.compile(lambda x, alpha: entmax(x * 2, alpha).square(), fullgraph=True)
    upstream = torch.randn(N, 5)
    got, expected = compiled(*inputs), entmax(inputs[0] * 2, inputs[1]).square()
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_learnt_alpha_causes_no_recompilation():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = AdaptiveSparseMultiheadAttention(6, 2, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = torch.randn(2, 5, 6)
    seen = set()
    for _ in range(4):
        compiled(x, x, x)[1].square().sum().backward()
        optimizer.step()
        seen.add(layer.alpha[0].item())
    assert len(seen) == 4 and counter.frame_count == 1


@pytest.mark.parametrize(
    ("mapping", "wrong", "message"),
    [
        (entmax, -1.0, r"alpha must be in \(0, inf\), got -1"),
        (normmax, 0.75, r"alpha must be in \(1, inf\), got 0.75"),
        (budget_sparsemax, 3.5, r"budget must be in \(0, 3\], got 3.5"),
    ],
)
def test_a_parameter_outside_its_range_is_refused_when_compiled_and_under_vmap(mapping, wrong, message):
    torch._dynamo.reset()
    compiled = torch.compile(mapping, fullgraph=True, dynamic=True, backend="aot_eager")
    x, parameter = torch.randn(2, 3), torch.tensor([2.0, wrong])
    with pytest.raises(ValueError, match=f"^{message}$"):
        compiled(x, parameter[:, None])
    with pytest.raises(ValueError, match=f"^{message}$"):
        vmap(mapping)(x, parameter)
    with pytest.raises(ValueError, match=f"^{message}$"):
        vmap(grad(lambda x, parameter: mapping(x, parameter).square().sum(), argnums=1))(x, parameter)


class EveryMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([1.0001, 1.0, 2.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            entmax(x, self.alpha.view(-1, 1)),
            entmax(x, 0.7),
            entmax(x, 1.0),
            entmax(x, 1.001),
            entmax15(x),
            sparsemax(x),
            entmax(x, 3.0),
            normmax(x, 2.5),
            budget_sparsemax(x, 1.7),
            topk_softmax(x, 2),
            sparse_softmax(x, 3),
        )


def hard_rows() -> Tensor:
    """Scores (2, 3, 7) with masked entries, a masked row and ties."""
    x = torch.randn(2, 3, 7)
    x[0, 1, 3:] = -torch.inf
    x[1, 0] = -torch.inf
    x[1, 2] = 0.5
    return x


DYNAMIC = ({0: torch.export.Dim.DYNAMIC},)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_compute_and_train_like_eager_code(strict):
    model, x = EveryMapping(), hard_rows()
    program = torch.export.export(model, (x,), dynamic_shapes=DYNAMIC, strict=strict)
    assert not [
        node for node in program.graph.nodes if "sparse_attn" in str(node.target)
    ]  # the program does not need this library
    for inputs in (x, torch.cat([x, 3 * x])):
        for got, expected in zip(program.module()(inputs), model(inputs), strict=True):
            torch.testing.assert_close(got, expected, atol=3e-7, rtol=1e-6)
    exported = program.module()
    for trained in (exported, model):
        (trained(x)[0] * torch.arange(7)).sum().backward()
    (alpha,) = exported.parameters()
    torch.testing.assert_close(alpha.grad, model.alpha.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # warnings of the exporter itself
def test_onnx_runtime_computes_the_same_values(tmp_path):
    model, x = EveryMapping().eval(), hard_rows()
    torch.onnx.export(model, (x,), tmp_path / "mappings.onnx", dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "mappings.onnx")
    (name,) = (entry.name for entry in session.get_inputs())
    for inputs in (x, torch.cat([x, 3 * x])):
        for got, expected in zip(session.run(None, {name: inputs.numpy()}), model(inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected.detach(), atol=3e-7, rtol=1e-6)


@since_torch(2, 8, "an exported ONNX model of attention accepts only the batch size and length of its export")
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_runs_a_swapped_encoder(tmp_path):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 11, batch_first=True), 1)
    replace_attention(encoder, alpha_init=[1.0, 1.7])
    encoder.eval()
    x = torch.randn(2, 5, 6)
    dynamic = {"src": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    torch.onnx.export(encoder, (x,), tmp_path / "encoder.onnx", dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    for inputs in (x, torch.randn(3, 7, 6)):
        (got,) = session.run(None, {"src": inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), encoder(inputs).detach(), atol=1e-6, rtol=1e-5)


class CausalDecoder(nn.Module):
    """A decoder with masks. Without ``tgt_is_causal``, torch's decoder reads the mask and cannot be exported."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 11, batch_first=True), 1)

    def forward(self, tgt, memory, tgt_mask, memory_mask):
        return self.decoder(tgt, memory, tgt_mask, memory_mask, tgt_is_causal=True)


@since_torch(2, 8, "an exported ONNX model of attention accepts only the batch size and length of its export")
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_runs_a_swapped_decoder_with_boolean_masks_of_other_lengths(tmp_path):
    decoder = CausalDecoder()
    replace_attention(decoder, alpha_init=[1.3, 1.7])
    decoder.eval()

    def inputs(batch, queries, keys):
        causal = torch.ones(queries, queries, dtype=torch.bool).triu(1)
        hidden = torch.rand(queries, keys) < 0.5
        hidden[:, 0] = False
        return torch.randn(batch, queries, 6), torch.randn(batch, keys, 6), causal, hidden

    path, free = tmp_path / "decoder.onnx", {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(decoder, inputs(2, 5, 7), path, dynamo=True, dynamic_shapes=[free] * 4, verbose=False)
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]
    for arguments in (inputs(2, 5, 7), inputs(3, 11, 13)):
        (got,) = session.run(None, dict(zip(names, (x.numpy() for x in arguments), strict=True)))
        torch.testing.assert_close(torch.from_numpy(got), decoder(*arguments).detach(), atol=1e-6, rtol=1e-5)


@every_mapping
def test_changing_the_parameter_in_place_before_the_backward_raises_an_error(mapping, values):
    if values is None:
        pytest.skip("no tensor to change")
    for dtype in (torch.float64, torch.float32):
        x, parameter = require(arguments(values))
        parameter = parameter.detach().to(dtype).requires_grad_()
        y = mapping(x, parameter)
        with torch.no_grad():
            parameter.mul_(1.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.square().sum().backward()


@every_mapping
def test_gradients_of_an_empty_batch_have_a_graph(mapping, values):
    inputs = require(tuple(x[:0] for x in arguments(values)))
    gradients = torch.autograd.grad(mapping(*inputs).sum(), inputs, create_graph=True)
    assert all(gradient.shape == x.shape for gradient, x in zip(gradients, inputs, strict=True))
    assert gradients[0].requires_grad
    torch.autograd.grad(gradients[0].sum(), inputs)


@every_mapping
def test_shapes_without_data(mapping, values):
    inputs = arguments(values)
    meta = mapping(*(x.to("meta") for x in inputs))
    assert meta.is_meta and meta.shape == (N, 5)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x).requires_grad_() for x in inputs]
        y = mapping(*fakes)
        assert y.shape == (N, 5)
        y.sum().backward()


def test_a_module_and_the_mappings_can_be_copied_and_pickled():
    layer = Entmax(torch.full((3, 1), 1.3), learn_alpha=True)
    x = torch.randn(3, 5)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected) and twin.raw_alpha is not layer.raw_alpha
    for mapping, values in MAPPINGS.values():
        inputs = arguments(values)
        assert torch.equal(pickle.loads(pickle.dumps(mapping))(*inputs), mapping(*inputs))
