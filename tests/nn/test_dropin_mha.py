"""All arguments of `nn.MultiheadAttention` in several modes: at α = 1 or with all keys kept, results equal torch's.

`test_multihead.py` tests the product of most arguments in one mode; here, in each mode, the cases contain every pair
of values of any two arguments. Gradients are compared where they exist.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from inspect import Parameter, signature
from itertools import product
from typing import Any

import pytest
import torch
from switches import fast_path
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, TopKMultiheadAttention

N, L, S, H, E, KDIM, VDIM = 3, 5, 7, 2, 26, 11, 17

LAYERS: dict[str, Callable[..., nn.MultiheadAttention]] = {
    "learnt": lambda **kwargs: AdaptiveSparseMultiheadAttention(**kwargs, alpha_init=1.0),
    "fixed": lambda **kwargs: AdaptiveSparseMultiheadAttention(**kwargs, alpha_init=1.0, learn_alpha=False),
    "top": lambda **kwargs: TopKMultiheadAttention(**kwargs, k=S + 2),  # keeps all keys
}
# Sizes of keys and values. torch's projection depends on whether query, key and value are one, two or three tensors.
INPUTS = {
    "one tensor": (None, None),
    "memory": (None, None),
    "three tensors": (None, None),
    "kdim": (KDIM, None),
    "vdim": (None, VDIM),
    "kdim and vdim": (KDIM, VDIM),
    "kdim = embed_dim": (E, E),
}
MASKS = ("none", "bool", "float", "bool 3-D", "float 3-D", "causal bool", "causal float", "hint bool", "hint float")
CONSTRUCTION: dict[str, tuple[Any, ...]] = {
    "layer": tuple(LAYERS),
    "inputs": tuple(INPUTS),
    "shape": ("batch first", "length first", "unbatched"),
    "bias": (True, False),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "dropout": (0.0, 0.4),
}
CALL: dict[str, tuple[Any, ...]] = {
    "mask": MASKS,
    "padding": ("none", "bool", "float"),
    "need_weights": (True, False),
    "average_attn_weights": (True, False),
}


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], Any]]] = {
    "train": (nn.Module.train, nullcontext),
    "eval": (nn.Module.eval, nullcontext),
    "frozen": (lambda layer: frozen(layer.train()), nullcontext),
    "frozen, eval": (lambda layer: frozen(layer.eval()), nullcontext),
    "no_grad": (nn.Module.eval, torch.no_grad),
    "inference_mode": (nn.Module.eval, torch.inference_mode),
    "no_grad, train": (nn.Module.train, torch.no_grad),
    "copied": (lambda layer: copy.deepcopy(pickle.loads(pickle.dumps(layer))), nullcontext),
}
DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def constructor_arguments(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    kdim, vdim = INPUTS[case["inputs"]]
    return {
        "embed_dim": E,
        "num_heads": H,
        **{name: case[name] for name in ("dropout", "bias", "add_bias_kv", "add_zero_attn")},
        "kdim": kdim,
        "vdim": vdim,
        "batch_first": case["shape"] == "batch first",
        "device": "cpu",
        "dtype": dtype,
    }


def forward_arguments(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    kdim, vdim = (E if size is None else size for size in INPUTS[case["inputs"]])

    def tensor(length: int, size: int) -> Tensor:
        shape = {"batch first": (N, length, size), "length first": (length, N, size), "unbatched": (length, size)}
        return torch.randn(shape[case["shape"]]).to(dtype)

    query = tensor(L, E)
    if case["inputs"] == "one tensor":
        key, value, keys = query, query, L
    else:
        key, keys = tensor(S, kdim), S
        value = key if case["inputs"] == "memory" else tensor(S, vdim)
    kind, batch = case["mask"], 1 if case["shape"] == "unbatched" else N
    mask = torch.rand((batch * H, L, keys) if kind.endswith("3-D") else (L, keys)) < 0.4
    mask[..., 0] = False  # torch's layer returns NaN for a query without visible keys
    if kind.startswith(("causal", "hint")):
        mask = torch.ones(L, keys, dtype=torch.bool).triu(1)
    if "float" in kind:
        bias = torch.zeros(mask.shape) if kind.startswith(("causal", "hint")) else torch.randn(mask.shape)
        mask = bias.masked_fill(mask, -torch.inf).to(dtype)
    padding = torch.zeros(N, keys, dtype=torch.bool)
    padding[0, 3:] = padding[2, 4:] = True
    if case["padding"] == "float":
        padding = torch.randn(N, keys).masked_fill(padding, -torch.inf).to(dtype)
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_padding_mask": None if case["padding"] == "none" else padding[0] if batch == 1 else padding,
        "need_weights": case["need_weights"],
        "attn_mask": None if kind == "none" else mask,
        "average_attn_weights": case["average_attn_weights"],
        # With extra keys and `is_causal`, torch's own paths disagree: see ARCHITECTURE.md.
        "is_causal": kind.startswith("hint") and not (case["add_bias_kv"] or case["add_zero_attn"]),
    }


def twins(case: dict[str, Any], dtype: torch.dtype) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """torch's layer and ours with the same parameters, none of them zero."""
    arguments = constructor_arguments(case, dtype)
    dense, sparse = nn.MultiheadAttention(**arguments), LAYERS[case["layer"]](**arguments)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def results(layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Output, weights if they are returned, and all gradients except the gradient of α."""
    tensors = {id(arguments[name]): name for name in ("query", "key", "value")}
    leaves = {name: arguments[name].detach() for name in tensors.values()}
    if torch.is_grad_enabled():
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    inputs = {name: leaves[tensors[id(arguments[name])]] for name in ("query", "key", "value")}
    torch.manual_seed(5)
    output, weights = layer(**{**arguments, **inputs})
    found = {"output": output} | ({} if weights is None else {"weights": weights})
    if torch.is_grad_enabled():
        leaves |= {n: p for n, p in layer.named_parameters() if p.requires_grad and "raw_alpha" not in n}
        loss = sum((x.double() * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum() for x in found.values())
        found |= zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, case: object) -> None:
    assert list(actual) == list(expected), case
    for name, tensor in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (tensor.shape, tensor.dtype), (name, case)
        error = (actual[name].double() - tensor.double()).abs().max().item()
        scale = max(1.0, tensor.double().abs().max().item())
        assert error <= tolerance * scale, (name, error, scale, case)


def test_the_cases_have_every_argument_of_torch() -> None:
    """A new argument of torch must be added to the cases."""
    case = {name: values[0] for name, values in {**CONSTRUCTION, **CALL}.items()}
    assert list(signature(nn.MultiheadAttention).parameters) == list(constructor_arguments(case, torch.float32))
    forward = list(signature(nn.MultiheadAttention.forward).parameters)[1:]
    assert forward == list(forward_arguments(case, torch.float32))


@pytest.mark.parametrize("layer", [AdaptiveSparseMultiheadAttention, TopKMultiheadAttention])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_arguments_have_torchs_order_and_defaults_and_our_own_are_keyword_only(layer: type, method: str) -> None:
    theirs = signature(getattr(nn.MultiheadAttention, method)).parameters.values()
    ours = list(signature(getattr(layer, method)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in ours[: len(theirs)]]
    assert all(p.kind is Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


# torch's layer warns if the padding mask is boolean and the attention mask is float.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_every_argument_in_every_way_of_running(way: str, all_pairs: Callable[..., Any]) -> None:
    change, context = WAYS[way]
    factors = {**CONSTRUCTION, **CALL, "fast path": (True, False), "dtype": tuple(DTYPES)}
    for number, case in enumerate(all_pairs(factors)):
        torch.manual_seed(number)
        dtype = case["dtype"]
        dense, sparse = (change(module) for module in twins(case, dtype))
        if sparse.training and not case["need_weights"]:
            dense.dropout = sparse.dropout = 0.0  # kernels without a matrix of weights draw other random numbers
        arguments = forward_arguments(case, dtype)
        with fast_path(case["fast path"]), context():
            expected, actual = results(dense, arguments), results(sparse, arguments)
        assert_close(actual, expected, DTYPES[dtype], case)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "frozen, eval"])
@pytest.mark.parametrize("mask", ["none", "bool", "bool 3-D", "causal bool", "hint bool"])
def test_calls_that_torch_computes_with_its_fused_kernel_agree(
    layer: str, way: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fused = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(1) or fused(*args))
    change, context = WAYS[way]
    values = {name: values[0] for name, values in {**CONSTRUCTION, **CALL}.items()}
    for padding, need_weights, average in product(("none", "bool"), (True, False), (True, False)):
        case = {**values, "layer": layer, "mask": mask, "padding": padding}
        case |= {"need_weights": need_weights, "average_attn_weights": average}
        dense, sparse = (change(module) for module in twins(case, torch.float64))
        arguments = forward_arguments(case, torch.float64)
        with context(), torch.set_grad_enabled(False):
            expected = dense(**arguments)
            assert len(calls) == 1, case  # a call by torch's layer
            actual = sparse(**arguments)
            assert len(calls) == 1, case  # and none by our layer
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=str(case))
        calls.clear()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_nested_tensors_are_refused(layer: str) -> None:
    values = {name: values[0] for name, values in {**CONSTRUCTION, **CALL}.items()}
    dense, sparse = (module.eval() for module in twins({**values, "layer": layer}, torch.float32))
    nested = torch.nested.nested_tensor([torch.randn(L, E), torch.randn(S, E)])
    with torch.no_grad():
        assert dense(nested, nested, nested, need_weights=False)[0].is_nested
        with pytest.raises(TypeError, match="must be dense tensors, got a nested tensor"):
            sparse(nested, nested, nested, need_weights=False)
    with pytest.raises(AssertionError), fast_path(False):
        dense(nested, nested, nested, need_weights=False)


# If torch raises an error, our layer must raise an error, too.


WRONG: list[dict[str, Any]] = [
    *({"embed_dim": size} for size in (0, -H, "8", None, 2.5)),
    *({"num_heads": heads} for heads in (0, 3, None)),
    *({"kdim": 0.5}, {"dtype": torch.int64}, {"device": "nowhere"}, {"embed_dims": 3}),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_constructors_raise_for_the_same_arguments_as_torch(layer: str, wrong: dict[str, Any]) -> None:
    arguments = {"embed_dim": E, "num_heads": H, **wrong}
    for build in (nn.MultiheadAttention, LAYERS[layer]):
        with pytest.raises((ValueError, TypeError, AssertionError, RuntimeError)):
            build(**arguments)


def spoilt(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments with one changed tensor: an axis longer, shorter, removed, added or swapped, or another dtype."""
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        changed = [torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis) for axis in range(tensor.dim())]
        changed += [tensor.narrow(axis, 0, tensor.shape[axis] - 1) for axis in range(tensor.dim())]
        changed += [tensor[0], tensor[None], tensor.to(torch.int64), tensor.transpose(0, -1)]
        for wrong in changed:
            yield f"{name} {wrong.dtype} {tuple(wrong.shape)}", {**arguments, name: wrong}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", CONSTRUCTION["shape"])
@pytest.mark.parametrize("inputs", ["one tensor", "three tensors", "kdim and vdim"])
def test_calls_raise_for_the_same_inputs_as_torch_and_agree_for_others(layer: str, shape: str, inputs: str) -> None:
    values = {name: values[0] for name, values in {**CONSTRUCTION, **CALL}.items()}
    refused = agreed = 0
    for mask, padding, need_weights in product(("none", "bool", "float 3-D"), ("none", "bool"), (True, False)):
        case = {**values, "layer": layer, "shape": shape, "inputs": inputs}
        case |= {"mask": mask, "padding": padding, "need_weights": need_weights}
        dense, sparse = twins(case, torch.float64)
        for what, arguments in spoilt(forward_arguments(case, torch.float64)):
            try:
                expected = dense(**arguments)
            except (ValueError, TypeError, AssertionError, RuntimeError):
                with pytest.raises((ValueError, TypeError)):
                    pytest.fail(f"{what} was accepted: {sparse(**arguments)[0].shape}")
                refused += 1
            else:
                if not expected[0].isfinite().all():
                    continue  # a query without visible keys: torch returns NaN, our layer does not
                torch.testing.assert_close(sparse(**arguments), expected, rtol=1e-9, atol=1e-11, msg=f"{what} {case}")
                agreed += 1
    assert refused > 100 and agreed > 10


# Compiled and exported


COMPILED: list[dict[str, Any]] = [
    {"layer": "learnt", "mask": "hint float", "padding": "float", "need_weights": False},
    {"layer": "top", "inputs": "kdim and vdim", "shape": "length first", "mask": "bool 3-D", "padding": "bool"},
    {"layer": "learnt", "inputs": "memory", "shape": "unbatched", "add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of the compiler
@pytest.mark.parametrize("changed", COMPILED, ids=str)
def test_a_compiled_layer_equals_torchs(changed: dict[str, Any]) -> None:
    torch._dynamo.reset()
    case = {name: values[0] for name, values in {**CONSTRUCTION, **CALL}.items()}
    case |= changed
    dense, sparse = twins(case, torch.float64)
    arguments = forward_arguments(case, torch.float64)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    actual, expected = results(compiled, arguments), results(dense, arguments)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected, 1e-10, case)
    dense.eval(), sparse.eval()
    with torch.no_grad():
        assert_close(results(compiled, arguments), results(dense, arguments), 1e-10, case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("changed", COMPILED, ids=str)
def test_an_exported_layer_equals_torchs(changed: dict[str, Any]) -> None:
    case = {name: values[0] for name, values in {**CONSTRUCTION, **CALL}.items()}
    case |= changed
    dense, sparse = (module.eval() for module in twins(case, torch.float64))
    arguments = forward_arguments(case, torch.float64)
    with torch.no_grad():
        program = torch.export.export(sparse, (), kwargs=arguments).module()
        assert_close(results(program, arguments), results(dense, arguments), 1e-10, case)
