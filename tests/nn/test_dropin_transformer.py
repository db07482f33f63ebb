"""torch's transformers with our attention at α = 1, or with all keys kept, equal the originals in several modes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from inspect import signature
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from switches import fast_path
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from sparse_attn import TopKMultiheadAttention, replace_attention

N, L, S, H, E, WIDTH = 3, 5, 7, 2, 26, 17
MASKS = ("none", "bool", "float", "causal bool", "causal float", "hint")
PADDING = ("none", "bool", "float")

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),  # from torch's own encoder
    # torch's layer warns if the padding mask is boolean and the attention mask is float.
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
]

SWAPS: dict[str, dict[str, Any]] = {
    "learnt": {"alpha_init": 1.0},
    "fixed": {"alpha_init": 1.0, "learn_alpha": False},
    "top": {"layer": TopKMultiheadAttention, "k": S + 2},  # keeps all keys
}
BLOCK: dict[str, tuple[Any, ...]] = {
    "dropout": (0.0, 0.3),
    "activation": ("relu", "gelu", F.silu),
    "layer_norm_eps": (1e-5, 1e-3),
    "batch_first": (True, False),
    "norm_first": (False, True),
    "bias": (True, False),
}
SOURCE = {"src_mask": MASKS, "src_key_padding_mask": PADDING}
TARGET = {
    "tgt_mask": MASKS,
    "memory_mask": MASKS,
    "tgt_key_padding_mask": PADDING,
    "memory_key_padding_mask": PADDING,
}
STACK: dict[str, dict[str, tuple[Any, ...]]] = {
    "TransformerEncoderLayer": {**BLOCK, **SOURCE, "batched": (True, False)},
    "TransformerDecoderLayer": {**BLOCK, **TARGET, "batched": (True, False)},
    "TransformerEncoder": {
        **BLOCK,
        **SOURCE,
        "batched": (True, False),
        "num_layers": (1, 2),
        "norm": (False, True),
        "enable_nested_tensor": (True, False),
        "mask_check": (True, False),
    },
    "TransformerDecoder": {**BLOCK, **TARGET, "batched": (True, False), "num_layers": (1, 2), "norm": (False, True)},
    "Transformer": {
        **BLOCK,
        **SOURCE,
        **TARGET,
        "batched": (True, False),
        "num_encoder_layers": (1, 2),
        "num_decoder_layers": (1, 2),
        "custom_encoder": (False, True),
        "custom_decoder": (False, True),
    },
}


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], Any]]] = {
    "train": (nn.Module.train, nullcontext),
    "eval": (nn.Module.eval, nullcontext),
    "frozen, eval": (lambda model: model.eval().requires_grad_(False), nullcontext),
    "no_grad": (nn.Module.eval, torch.no_grad),
    "inference_mode": (nn.Module.eval, torch.inference_mode),
    "deepcopy": (lambda model: copy.deepcopy(model).eval(), nullcontext),
    "pickle": (lambda model: pickle.loads(pickle.dumps(model.eval())), torch.no_grad),
}
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 2e-2}


def constructor_arguments(kind: str, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    factory = {"device": "cpu", "dtype": dtype}
    sizes = {"d_model": E, "nhead": H, "dim_feedforward": WIDTH}
    block = {**sizes, **{name: case[name] for name in BLOCK}, **factory}
    if kind.endswith("Layer"):
        return block

    def norm() -> nn.Module:
        return nn.LayerNorm(E, eps=case["layer_norm_eps"], bias=case["bias"], **factory)

    def stack(part: str, count: int) -> nn.Module:
        return getattr(nn, part)(getattr(nn, part + "Layer")(**block), count)

    if kind == "Transformer":
        counts = {name: case[name] for name in ("num_encoder_layers", "num_decoder_layers")}
        return {
            **block,
            **counts,
            "custom_encoder": stack("TransformerEncoder", 1) if case["custom_encoder"] else None,
            "custom_decoder": stack("TransformerDecoder", 1) if case["custom_decoder"] else None,
        }
    arguments = {"num_layers": case["num_layers"], "norm": norm() if case["norm"] else None}
    if kind == "TransformerDecoder":
        return {"decoder_layer": nn.TransformerDecoderLayer(**block), **arguments}
    switches = {name: case[name] for name in ("enable_nested_tensor", "mask_check")}
    return {"encoder_layer": nn.TransformerEncoderLayer(**block), **arguments, **switches}


def forward_arguments(kind: str, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def tensor(length: int) -> Tensor:
        x = torch.randn(N, length, E).to(dtype)
        return x[0] if not case["batched"] else x if case["batch_first"] else x.transpose(0, 1)

    def mask(name: str, queries: int, keys: int) -> dict[str, Any]:
        how, kind_of = (
            case[name],
            "is_causal" if name == "src_mask" and kind != "Transformer" else name[:3] + "_is_causal",
        )
        kind_of = {"mem_is_causal": "memory_is_causal"}.get(kind_of, kind_of)
        hidden = torch.rand(queries, keys) < 0.3
        hidden[:, 0] = False
        if how.startswith(("causal", "hint")):
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        value: Tensor | None = hidden
        if how in ("float", "causal float", "hint"):
            bias = torch.randn(queries, keys) if how == "float" else torch.zeros(queries, keys)
            value = bias.masked_fill(hidden, -torch.inf).to(dtype)
        return {name: None if how == "none" else value, kind_of: how == "hint"}

    def padding(name: str, keys: int) -> dict[str, Any]:
        hidden = torch.arange(keys).expand(N, keys) >= torch.tensor([[keys], [3], [4]])
        value = hidden if case[name] == "bool" else torch.zeros(N, keys).masked_fill(hidden, -torch.inf).to(dtype)
        return {name: None if case[name] == "none" else value if case["batched"] else value[1]}

    if "Encoder" in kind:
        found = {"src": tensor(S), **mask("src_mask", S, S), **padding("src_key_padding_mask", S)}
        return found if kind.endswith("Layer") else {("mask" if k == "src_mask" else k): v for k, v in found.items()}
    target = {
        **mask("tgt_mask", L, L),
        **mask("memory_mask", L, S),
        **padding("tgt_key_padding_mask", L),
        **padding("memory_key_padding_mask", S),
    }
    if "Decoder" in kind:
        return {"tgt": tensor(L), "memory": tensor(S), **target}
    return {
        "src": tensor(S),
        "tgt": tensor(L),
        **mask("src_mask", S, S),
        **padding("src_key_padding_mask", S),
        **target,
    }


def twins(kind: str, case: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    dense = getattr(nn, kind)(**constructor_arguments(kind, case, dtype))
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in dense.modules():
        if isinstance(module, nn.Dropout):  # dropout draws in the order of memory, which can differ between the models
            module.p = 0.0
    sparse = copy.deepcopy(dense)
    replace_attention(sparse, **SWAPS[case["swap"]])
    return dense, sparse


def results(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and all gradients that exist except the gradients of α."""
    leaves = {name: arguments[name].detach() for name in ("src", "tgt", "memory") if name in arguments}
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    torch.manual_seed(5)
    output = model(**{**arguments, **leaves})
    found = {"output": output}
    if output.requires_grad:
        leaves |= {n: p for n, p in model.named_parameters() if p.requires_grad and "raw_alpha" not in n}
        loss = (output.double() * torch.linspace(-1, 2, output.numel()).view(output.shape)).sum()
        found |= zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, case: object) -> None:
    assert list(actual) == list(expected), case
    assert bool(expected["output"].isfinite().all()), ("torch's", case)
    for name, tensor in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (tensor.shape, tensor.dtype), (name, case)
        error, scale = (actual[name].double() - tensor.double()).norm().item(), tensor.double().norm().item()
        assert error <= tolerance * max(scale, 1e-3), (name, error, scale, case)


@pytest.mark.parametrize("kind", STACK)
def test_the_cases_have_every_argument_of_torch(kind: str) -> None:
    """A new argument of torch must be added to the cases."""
    case = {name: values[0] for name, values in STACK[kind].items()}
    constructor = signature(getattr(nn, kind)).parameters
    assert sorted(constructor) == sorted(constructor_arguments(kind, case, torch.float32))
    forward = list(signature(getattr(nn, kind).forward).parameters)[1:]
    assert sorted(forward) == sorted(forward_arguments(kind, case, torch.float32))


@pytest.mark.parametrize("kind", STACK)
def test_every_argument_in_every_way_of_running(kind: str, all_pairs: Callable[..., Any]) -> None:
    ways = {"way": tuple(WAYS), "swap": tuple(SWAPS), "fast path": (True, False), "dtype": tuple(DTYPES)}
    for number, case in enumerate(all_pairs({**STACK[kind], **ways})):
        torch.manual_seed(number)
        change, context = WAYS[case["way"]]
        dense, sparse = (change(model) for model in twins(kind, case, case["dtype"]))
        assert not any(type(module) is nn.MultiheadAttention for module in sparse.modules())
        arguments = forward_arguments(kind, case, case["dtype"])
        # In torch's fused kernel, every non-zero entry of a float mask hides a key. Cases with such a mask run without
        # this kernel.
        honoured = case.get("src_mask") != "float"
        with fast_path(case["fast path"] and honoured), context():
            expected, actual = results(dense, arguments), results(sparse, arguments)
        assert_close(actual, expected, DTYPES[case["dtype"]], case)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerEncoder", "Transformer"])
@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "frozen, eval"])
def test_calls_that_torch_computes_with_its_fused_kernel_agree(
    way: str, kind: str, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args[0]) or fused(*args))
    change, context = WAYS[way]
    values = {name: values[0] for name, values in STACK[kind].items()}
    nested = (True, False) if kind == "TransformerEncoder" else (True,)
    for mask, padding, enable, check in product(("none", "bool", "causal bool"), ("none", "bool"), nested, nested):
        case = {**values, "swap": swap, "src_mask": mask, "src_key_padding_mask": padding}
        case |= {"enable_nested_tensor": enable, "mask_check": check, "memory_key_padding_mask": padding}
        dense, sparse = (change(model) for model in twins(kind, case, torch.float64))
        arguments = forward_arguments(kind, case, torch.float64)
        with context(), torch.set_grad_enabled(False):
            expected = dense(**arguments)
            assert len(calls) == 1, case  # a call by torch's layer
            is_nested = kind != "TransformerEncoderLayer" and enable and padding == "bool" and mask == "none"
            assert calls[0].is_nested == is_nested, case
            actual = sparse(**arguments)
            assert len(calls) == 1, case  # and none by our layer
        if is_nested and kind == "TransformerEncoder":  # nested tensors leave zeros at padded positions
            real = ~arguments["src_key_padding_mask"]
            expected, actual = expected[real], actual[real]
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9, msg=str(case))
        calls.clear()


def spoilt(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments with one tensor changed: an axis longer or shorter by 1, removed or added, or the dtype int64."""
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor):
            changed = [torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis) for axis in range(tensor.dim())]
            changed += [tensor.narrow(axis, 0, tensor.shape[axis] - 1) for axis in range(tensor.dim())]
            for wrong in (*changed, tensor[0], tensor[None], tensor.to(torch.int64)):
                yield f"{name} {wrong.dtype} {tuple(wrong.shape)}", {**arguments, name: wrong}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("masked", ["none", "bool"])
@pytest.mark.parametrize("kind", STACK)
def test_calls_raise_for_the_same_inputs_as_torch_and_agree_for_others(kind: str, masked: str, batched: bool) -> None:
    case = {name: masked if "mask" in name else values[0] for name, values in STACK[kind].items()}
    case |= {"swap": "learnt", "batched": batched, "mask_check": True}
    dense, sparse = twins(kind, case, torch.float64)
    errors = (ValueError, TypeError, AssertionError, RuntimeError, IndexError)
    refused = agreed = 0
    for what, arguments in spoilt(forward_arguments(kind, case, torch.float64)):
        try:
            expected = dense(**arguments)
        except errors:
            with pytest.raises(errors):
                pytest.fail(f"{what} was accepted: {sparse(**arguments).shape}")
            refused += 1
        else:
            if expected.isfinite().all():  # torch returns NaN for a query without visible keys, our layer does not
                torch.testing.assert_close(sparse(**arguments), expected, rtol=1e-9, atol=1e-11, msg=f"{what} {case}")
                agreed += 1
    assert refused >= 4 and (agreed > 0 or masked == "bool"), (refused, agreed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of the compiler
@pytest.mark.parametrize("kind", ["TransformerEncoder", "TransformerDecoderLayer"])
def test_compiled_and_exported_models_equal_torchs(kind: str) -> None:
    case = {name: values[0] for name, values in STACK[kind].items()} | {"swap": "learnt"}
    case |= {name: "hint" if name == "tgt_mask" else "bool" for name in STACK[kind] if name.endswith("padding_mask")}
    dense, sparse = twins(kind, case, torch.float64)
    arguments = forward_arguments(kind, case, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    actual, expected = results(compiled, arguments), results(dense, arguments)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected, 1e-9, case)
    dense.eval(), sparse.eval()
    program = torch.export.export(sparse, (), kwargs=arguments).module()
    torch.testing.assert_close(program(**arguments), dense(**arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("swap", [*SWAPS.values(), {"layer": TopKMultiheadAttention, "k": 3}], ids=str)
def test_one_compiled_graph_accepts_several_lengths(swap: dict[str, Any]) -> None:
    """Two layers in one graph, in which lengths and other integers are symbols."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, WIDTH, 0.0, batch_first=True), 2).double()
    replace_attention(model, **swap)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    parameters = list(model.parameters())
    for length in (S - 3, S, S - 1):  # all are below the k of "top" and above the k = 3 of the last case
        x = torch.randn(N, length, E, dtype=torch.float64)
        actual, expected = compiled(x), model(x)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
        gradients = [torch.autograd.grad(output.square().sum(), parameters) for output in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
    assert graphs.frame_count == 1
