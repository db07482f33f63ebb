"""Replacement of attention in a model: the parameters are kept, and a refused call replaces no layer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from encoders import dense_encoder
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
F64 = {"dtype": torch.float64}

encoder = partial(dense_encoder, E, H, F)


def decoder(layers: int = 2, **kwargs: Any) -> nn.TransformerDecoder:
    layer = nn.TransformerDecoderLayer(E, H, F, dropout=0.0, **{"batch_first": True, **kwargs})
    return nn.TransformerDecoder(layer, layers)


def snapshot(model: nn.Module) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[bool]]:
    """All modules and parameters by identity, and the modes of the modules."""
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    return modules, parameters, [module.training for module in model.modules()]


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_replacement_at_alpha_one_does_not_change_torchs_transformers(
    norm_first: bool, batch_first: bool, train: bool
) -> None:
    kwargs = {"norm_first": norm_first, "batch_first": batch_first, **F64}
    source, target = (tensor(N, S, E), tensor(N, L, E)) if batch_first else (tensor(S, N, E), tensor(L, N, E))
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    both = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    cases: list[tuple[nn.Module, int, tuple[Tensor, ...], dict[str, Any]]] = [
        (encoder(**kwargs), 2, (source,), {"src_key_padding_mask": padding}),
        (decoder(**kwargs), 4, (target, source), both),
        (
            nn.Transformer(E, H, 2, 2, F, dropout=0.0, **kwargs),
            6,
            (source, target),
            {"src_key_padding_mask": padding, **both},
        ),
    ]
    for model, layers, args, masks in cases:
        model.train(train)
        expected = model(*args, **masks)
        parameters = [p for p in model.parameters()]
        expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
        new = replace_attention(model, alpha_init=1.0)
        assert len(new) == layers
        actual = model(*args, **masks)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
        grads = torch.autograd.grad(actual.square().sum(), parameters)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-8, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(model(*args, **masks), expected, rtol=1e-9, atol=1e-11)


def test_the_new_layers_are_returned_by_name_and_are_in_the_model() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "decoder": decoder(1), "head": nn.Linear(E, F)})
    new = replace_attention(model, TopKMultiheadAttention, k=3, normalizer="sparsemax")
    assert list(new) == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]
    for name, layer in new.items():
        assert model.get_submodule(name) is layer
        assert type(layer) is TopKMultiheadAttention
        assert (layer.k, layer.normalizer) == (3, "sparsemax")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 13, "vdim": 17},
        {"batch_first": True, "dropout": 0.3},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"device": "meta"},
    ],
    ids=str,
)
def test_the_parameters_are_the_same_objects_and_the_arguments_are_kept(kwargs: dict[str, Any]) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, H, **kwargs)})
    old = model["attention"]
    parameters = dict(model.named_parameters())
    replace_attention(model, alpha_init=(1.25, 1.75))
    new = model["attention"]
    found = dict(model.named_parameters())
    raw_alpha = found.pop("attention.raw_alpha")
    assert list(found) == list(parameters)
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert raw_alpha.device == new.out_proj.weight.device
    assert raw_alpha.dtype == (torch.float64 if kwargs == F64 else torch.float32)
    assert new.out_proj is old.out_proj
    for name in ("embed_dim", "num_heads", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn", "head_dim"):
        assert getattr(new, name) == getattr(old, name)


def test_an_optimizer_made_before_keeps_working() -> None:
    model = encoder(**F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    new = replace_attention(model, alpha_init=1.25)
    optimizer.add_param_group({"params": [layer.raw_alpha for layer in new.values()]})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(tensor(N, S, E)).pow(3).sum().backward()
    optimizer.step()
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unchanged == []


def test_tied_parameters_stay_tied() -> None:
    old = nn.MultiheadAttention(E, H, kdim=13, vdim=13)
    old.v_proj_weight = old.k_proj_weight
    model = nn.Sequential(old)
    replace_attention(model)
    assert model[0].v_proj_weight is model[0].k_proj_weight is old.k_proj_weight


def test_a_shared_layer_is_replaced_in_all_places_by_one_layer() -> None:
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict({"first": nn.ModuleDict({"attention": shared}), "second": nn.ModuleList([shared, shared])})
    new = replace_attention(model)
    assert list(new) == ["first.attention"]
    assert model["first"]["attention"] is model["second"][0] is model["second"][1] is new["first.attention"]


def test_a_second_call_has_no_effect() -> None:
    model = encoder()
    replace_attention(model, alpha_init=1.25)
    before = snapshot(model)
    assert replace_attention(model, alpha_init=1.75) == {}
    assert replace_attention(model, TopKMultiheadAttention, k=2) == {}
    assert snapshot(model) == before
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())


def test_a_second_call_replaces_layers_that_the_first_left_out() -> None:
    model = encoder()
    first = replace_attention(model, filter_fn=lambda name, _: name.startswith("layers.0"))
    second = replace_attention(model)
    assert list(first) == ["layers.0.self_attn"] and list(second) == ["layers.1.self_attn"]
    assert model.get_submodule("layers.0.self_attn") is first["layers.0.self_attn"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"alpha_init": 2.5}, ValueError, r"alpha_init must be in alpha_range \[1, 2\], got 2.5"),
        ({"alpha_range": (2.0, 1.0)}, ValueError, r"alpha_range must be \(low, high\) .*got \(2.0, 1.0\)"),
        ({"alpha_range": "wide"}, TypeError, r"alpha_range must be two numbers \(low, high\), got 'wide'"),
        ({"alpha_init": (1.5, 1.5)}, ValueError, r"one per head \(11,\), got shape \(2,\)"),
        ({"alpha": 1.5}, TypeError, "unexpected keyword argument 'alpha'"),
        ({"embed_dim": 3}, TypeError, "embed_dim"),
        ({"layer": TopKMultiheadAttention}, TypeError, "'k'"),
        ({"layer": TopKMultiheadAttention, "k": 0}, ValueError, "k must be at least 1, got 0"),
        (
            {"layer": nn.MultiheadAttention},
            TypeError,
            "layer must be .* another subclass of .* not SparseMultiheadAttention itself, got <class",
        ),
        (
            {"layer": "adaptive"},
            TypeError,
            "layer must be .* another subclass of .* not SparseMultiheadAttention itself, got 'adaptive'",
        ),
        ({"filter_fn": lambda name, _: "2" in name}, ValueError, "one nn.MultiheadAttention that filter_fn accepts"),
    ],
)
def test_everything_is_checked_before_anything_is_changed(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    # The layers have different numbers of heads: an alpha_init per head is valid for the first but not for the second.
    model = nn.ModuleList([nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, 11), nn.Linear(2, 3)])
    before = snapshot(model)
    with pytest.raises(error, match=message):
        replace_attention(model, **kwargs)
    assert snapshot(model) == before


def test_nested_tensors_are_switched_off_only_if_a_layer_of_the_encoder_is_replaced() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, F, batch_first=True), 2)
    with pytest.raises(ValueError, match="alpha_init"):
        replace_attention(model, alpha_init=0.5)
    replace_attention(nn.ModuleList([model, nn.MultiheadAttention(E, H)]), filter_fn=lambda name, _: name == "1")
    assert model.use_nested_tensor  # none of its layers has been replaced
    replace_attention(model)
    assert not model.use_nested_tensor


def test_subclasses_of_torchs_layer_are_not_replaced() -> None:
    class Other(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([Other(E, H), nn.MultiheadAttention(E, H)])
    assert list(replace_attention(model)) == ["1"]
    assert type(model[0]) is Other


def test_modes_and_requires_grad_are_kept() -> None:
    model = encoder(3)
    model.layers[0].eval()
    model.layers[1].self_attn.out_proj.eval()
    model.layers[2].self_attn.in_proj_weight.requires_grad_(False)
    modes = [(name, module.training) for name, module in model.named_modules()]
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    replace_attention(model)
    assert [(name, module.training) for name, module in model.named_modules()] == modes
    found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: found[name] for name in grads} == grads
    assert all(found[name] for name in found.keys() - grads.keys())  # the new parameters are α


def test_the_random_state_is_not_touched() -> None:
    model = encoder()
    before = torch.get_rng_state()
    replace_attention(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_default_device_does_not_matter() -> None:
    model = encoder()
    with torch.device("meta"):
        replace_attention(model, alpha_init=1.25)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())


def test_filter_fn_gets_names_and_modules() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "decoder": decoder(1)})
    seen: dict[str, nn.Module] = {}

    def choose(name: str, module: nn.MultiheadAttention) -> bool:
        seen[name] = module
        return "multihead_attn" in name

    expected = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    assert list(replace_attention(model, filter_fn=choose)) == ["decoder.layers.0.multihead_attn"]
    assert seen == expected and len(seen) == 4
    assert type(model["encoder"].layers[0].self_attn) is nn.MultiheadAttention


def test_an_adapter_that_replaces_the_out_projection_is_kept() -> None:
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    attention.out_proj = nn.Sequential(attention.out_proj, nn.Linear(E, E))
    model = nn.Sequential(attention)
    (new,) = replace_attention(model, alpha_init=1.0).values()
    assert new.out_proj is attention.out_proj
    x = torch.randn(N, S, E)
    new(x, x, x)[0].sum().backward()
    assert attention.out_proj[1].weight.grad is not None


def test_a_swapped_model_saves_and_loads(tmp_path: Any) -> None:
    model, fresh = encoder(), encoder()
    replace_attention(model, alpha_init=(1.25, 1.75))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    replace_attention(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)
    for name, alpha in alpha_per_head(fresh).items():
        assert isinstance(fresh.get_submodule(name), AdaptiveSparseMultiheadAttention)
        assert alpha.tolist() == [1.25, 1.75]


def test_hooks_on_the_layer_run_and_their_handles_remove_them() -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    calls: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda *_: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda *_: calls.append("before"), with_kwargs=True),
    ]
    replace_attention(model)
    x = torch.randn(2, 3, E)
    model[0](x, x, x)
    assert calls == ["before", "forward"]
    for handle in handles:
        handle.remove()
    model[0](x, x, x)
    assert len(calls) == 2


def test_state_dict_hooks_are_kept_both_ways() -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    seen: list[tuple[str, nn.Module]] = []

    def note(kind: str) -> Callable[..., None]:
        return lambda module, *_: seen.append((kind, module))

    handles = [
        model[0].register_state_dict_pre_hook(note("save")),
        model[0].register_state_dict_post_hook(note("saved")),
        model[0].register_load_state_dict_pre_hook(note("load")),
        model[0].register_load_state_dict_post_hook(note("loaded")),
    ]
    for swap in (replace_attention, restore_attention):
        swap(model)
        gc.collect()
        seen.clear()
        model.load_state_dict(model.state_dict())
        assert seen == [(kind, model[0]) for kind in ("save", "saved", "load", "loaded")]
    for handle in handles:
        handle.remove()
    model.load_state_dict(model.state_dict())
    assert len(seen) == len(handles)


def test_a_layer_without_a_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match="not SparseMultiheadAttention itself, got <class"):
        replace_attention(nn.Sequential(nn.MultiheadAttention(E, H)), SparseMultiheadAttention)
