"""A trained dense model that is made sparse and then dense again keeps its function and its parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    TopKMultiheadAttention,
    alpha_per_head,
    replace_attention,
    restore_attention,
)
from sparse_attn.nn import SparseMultiheadAttention

N, L, S, H, E, F = 3, 5, 7, 2, 22, 13

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),  # torch's own encoder warns
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


class OwnBlock(nn.Module):
    """A block with cross-attention whose keys and values have other sizes than the queries, and with extra keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            E, H, add_bias_kv=True, add_zero_attn=True, kdim=E + 1, vdim=E + 3, bias=False
        )
        self.widen = nn.ModuleList([nn.Linear(E, E + 1), nn.Linear(E, E + 3)])

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        key, value = (widen(source.transpose(0, 1)) for widen in self.widen)
        return target + self.attention(target.transpose(0, 1), key, value)[0].transpose(0, 1)


def layer_arguments(**kwargs: Any) -> dict[str, Any]:
    return {"dim_feedforward": F, "dropout": 0.1, "batch_first": True, **kwargs}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **layer_arguments()), 2),
    "norm first": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, **layer_arguments(norm_first=True)), 2
    ),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, **layer_arguments()), 2),
    "transformer": lambda: nn.Transformer(E, H, 2, 1, F, batch_first=True),
    "own block": OwnBlock,
}


def inputs_of(model: nn.Module) -> tuple[Tensor, ...]:
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    if isinstance(model, nn.TransformerEncoder):
        return (source,)
    return (source, target) if isinstance(model, nn.Transformer) else (target, source)


def trained(model: nn.Module) -> nn.Module:
    """The model after a few training steps, in evaluation mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs = inputs_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs).pow(3).sum().backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def everything(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Attributes of every module: parameters, buffers and submodules by identity, other values by value.

    Attention layers are exchanged, so these layers and the modules in them are compared by name.
    """
    for name, module in model.named_modules():
        attention = isinstance(module, nn.MultiheadAttention)
        yield name, "type", type(module)
        for key, value in vars(module).items():
            if key == "_modules":
                yield (
                    name,
                    key,
                    [k if attention or isinstance(m, nn.MultiheadAttention) else (k, id(m)) for k, m in value.items()],
                )
            elif key in ("_parameters", "_buffers"):
                yield name, key, {k: id(v) if v is not None else None for k, v in value.items()}
            elif isinstance(value, dict | set):
                yield name, key, sorted(map(str, value))
            elif not isinstance(value, nn.Module | Tensor) and not callable(value):
                yield name, key, value


@pytest.mark.parametrize("kind", MODELS)
def test_a_trained_model_keeps_its_function_when_replaced_at_alpha_one_and_restored(kind: str) -> None:
    model = trained(MODELS[kind]())
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = model(*inputs)
    state = copy.deepcopy(model.state_dict())
    before = list(everything(model))
    parameters = dict(model.named_parameters())

    new = replace_attention(model, alpha_init=1.0)
    assert len(new) == sum(name.endswith("out_proj.weight") for name in parameters)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-6)

    restored = restore_attention(model)
    assert list(restored) == list(new)
    for name, layer in restored.items():
        assert type(layer) is nn.MultiheadAttention and model.get_submodule(name) is layer
    assert list(everything(model)) == before
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)


def test_restored_layers_keep_the_trained_parameters() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **layer_arguments(dropout=0.0)), 2)
    plain = copy.deepcopy(model)
    replace_attention(model, alpha_init=1.5)
    trained(model)
    learnt = {name: p.detach().clone() for name, p in model.named_parameters() if "raw_alpha" not in name}
    restore_attention(model)
    assert alpha_per_head(model) == {} and not any("alpha" in name for name in model.state_dict())
    torch.testing.assert_close(dict(model.named_parameters()), learnt, rtol=0, atol=0)
    plain.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(N, S, E)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_fused_kernel_and_nested_tensors_are_used_again(
    copied: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **layer_arguments()), 2)
    replace_attention(model)
    assert not model.use_nested_tensor
    model = copied(model)
    restore_attention(model)
    assert model.use_nested_tensor
    padding = torch.arange(S).expand(N, S) >= torch.tensor([[S], [4], [2]])
    x = torch.randn(N, S, E)
    expected = model.eval()(x, src_key_padding_mask=padding)  # with gradients, torch takes the slow path
    monkeypatch.setattr(nn.MultiheadAttention, "forward", None)  # never called
    with torch.no_grad():
        output = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], expected[~padding], rtol=1e-5, atol=1e-6)


def test_nested_tensors_stay_off_if_they_were_off_or_a_layer_is_sparse() -> None:
    off = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **layer_arguments()), 2, enable_nested_tensor=False)
    replace_attention(off)
    restore_attention(off)
    assert not off.use_nested_tensor

    on = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **layer_arguments()), 2)
    for index in ("0", "1"):  # one at a time
        replace_attention(on, filter_fn=lambda name, _, index=index: name.split(".")[1] == index)
    restore_attention(on, filter_fn=lambda name, _: "1" in name)
    assert not on.use_nested_tensor
    assert isinstance(on.layers[0].self_attn, SparseMultiheadAttention)
    restore_attention(on)
    assert on.use_nested_tensor


def test_hooks_modes_frozen_and_tied_parameters_are_kept_both_ways() -> None:
    shared = nn.MultiheadAttention(E, H, kdim=13, vdim=13)
    shared.v_proj_weight = shared.k_proj_weight
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared]), "c": nn.MultiheadAttention(E, H)})
    model["c"].eval().in_proj_weight.requires_grad_(False)
    calls: list[str] = []
    handle = shared.register_forward_hook(lambda *_: calls.append("called"))
    replace_attention(model, TopKMultiheadAttention, k=2)
    restored = restore_attention(model)
    assert list(restored) == ["a", "c"]
    assert model["a"] is model["b"][0] is restored["a"]
    assert model["a"].v_proj_weight is model["a"].k_proj_weight is shared.k_proj_weight
    assert not model["c"].training and model["a"].training and not model["c"].in_proj_weight.requires_grad
    key = torch.randn(S, N, 13)
    model["a"](torch.randn(L, N, E), key, key)
    handle.remove()
    model["a"](torch.randn(L, N, E), key, key)
    assert calls == ["called"]


def test_layers_that_were_built_sparse_become_torchs_layers() -> None:
    block = nn.TransformerEncoderLayer(E, H, **layer_arguments())
    block.self_attn = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, alpha_init=1.0)
    x = torch.randn(N, S, E)
    expected = block.eval()(x)
    assert list(restore_attention(block)) == ["self_attn"]
    assert type(block.self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_devices_and_the_random_state_are_kept_and_a_second_call_has_no_effect(device: str) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **layer_arguments(device=device)), 2)
    assert restore_attention(model) == {}
    replace_attention(model)
    state = torch.get_rng_state()
    with torch.device("meta" if device == "cpu" else "cpu"):  # a default device has no effect
        restored = restore_attention(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert restore_attention(model) == {}
    assert [model.get_submodule(name) for name in restored] == list(restored.values())
    assert {parameter.device.type for parameter in model.parameters()} == {device}


def test_filter_fn_gets_names_and_modules() -> None:
    model = nn.Transformer(E, H, 1, 1, F, batch_first=True)
    new = replace_attention(model)
    seen: dict[str, nn.Module] = {}

    def choose(name: str, module: nn.MultiheadAttention) -> bool:
        seen[name] = module
        return name.startswith("encoder")

    assert list(restore_attention(model, filter_fn=choose)) == ["encoder.layers.0.self_attn"]
    assert seen == new
    assert list(alpha_per_head(model)) == ["decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of the compiler
def test_a_compiled_model_uses_the_replaced_layers() -> None:
    model = nn.TransformerEncoderLayer(E, H, **layer_arguments()).eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(N, S, E)
    with torch.no_grad():
        dense = compiled(x)
        replace_attention(model, alpha_init=2.0)
        sparse = compiled(x)
        torch.testing.assert_close(sparse, model(x))
        assert not torch.allclose(sparse, dense, atol=1e-2)
        restore_attention(compiled)
        torch.testing.assert_close(compiled(x), dense)


def lora(model: nn.Module, **targets: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **targets))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_adapters_in_pefts_wrapper_keep_working() -> None:
    model = lora(SelfAttention(), target_modules=["attention"])
    x = torch.randn(N, S, E, dtype=torch.float64)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "raw_alpha" not in name}
        return {"output": output.detach(), **found}

    expected = run()
    assert len(expected) == 5
    (new,) = replace_attention(model, alpha_init=1.0).values()
    torch.testing.assert_close(run(), expected)
    assert new.raw_alpha is not None and new.raw_alpha.grad is not None
    assert list(restore_attention(model)) == ["base_model.model.attention.base_layer"]
    torch.testing.assert_close(run(), expected)
    replace_attention(model, alpha_init=1.5)
    assert list(alpha_per_head(model.merge_and_unload())) == ["attention"]


def test_a_peft_adapter_that_torchs_layer_would_not_call_must_be_merged() -> None:
    model = SelfAttention()
    replace_attention(model, alpha_init=1.0)
    model = lora(model, target_modules=["out_proj"])
    x = torch.randn(N, S, E, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(
        ValueError, match=r"must have an out_proj that is an nn\.Linear, .*got Linear; merge an adapter first"
    ):
        restore_attention(model)
    merged = model.merge_and_unload()
    assert list(restore_attention(merged)) == ["attention"]
    torch.testing.assert_close(merged(x), expected)
