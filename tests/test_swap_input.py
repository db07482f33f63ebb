"""Models and arguments that replace_attention and restore_attention refuse before any change."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantizable as quantizable
import torch.ao.nn.quantized.dynamic as quantized_dynamic
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparse_attn import AdaptiveSparseMultiheadAttention, replace_attention, restore_attention
from sparse_attn.nn import ALiBi

E, H = 22, 2
BACK_AND_FORTH = {"replace": replace_attention, "restore": restore_attention}


def layer_for(way: str, **kwargs: Any) -> nn.MultiheadAttention:
    """A layer that the tested function exchanges."""
    return (nn.MultiheadAttention if way == "replace" else AdaptiveSparseMultiheadAttention)(E, H, **kwargs)


def everything(model: nn.Module) -> list[Any]:
    """Every object of a model by name and identity, with the entries of its modules' dicts."""
    return [
        (name, id(module), key, id(value), [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else [])
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
    ]


class Wrapped(torch.Tensor):
    """A subclass of torch.Tensor; torchao's quantised and torch's sharded tensors are such subclasses."""


def pruned(layer: nn.MultiheadAttention) -> None:
    prune.random_unstructured(layer, "in_proj_weight", 0.5)


def weight_normed(layer: nn.MultiheadAttention) -> None:
    parametrizations.weight_norm(layer, "in_proj_weight")


def quantised_projection(layer: nn.MultiheadAttention) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the classes of its own quantised layers
        layer.out_proj = quantized_dynamic.Linear(E, E)


def in_int8(layer: nn.MultiheadAttention) -> None:
    layer.in_proj_weight = nn.Parameter(torch.zeros(3 * E, E, dtype=torch.int8), requires_grad=False)


def of_a_tensor_subclass(layer: nn.MultiheadAttention) -> None:
    weight = layer.out_proj.weight.detach().as_subclass(Wrapped)
    layer.out_proj.weight = nn.Parameter(weight)


def on_two_devices(layer: nn.MultiheadAttention) -> None:
    layer.out_proj.to("meta")


def patched(layer: nn.MultiheadAttention) -> None:
    layer.forward = types.MethodType(type(layer).forward, layer)  # type: ignore[method-assign]


def one_weight_less(layer: nn.MultiheadAttention) -> None:
    weight = layer.in_proj_weight.detach()
    del layer.in_proj_weight
    layer.in_proj_weight = weight  # a tensor instead of a parameter, as after merging an adapter


def with_a_buffer(layer: nn.MultiheadAttention) -> None:
    layer.register_buffer("slopes", torch.ones(H))


def with_a_module(layer: nn.MultiheadAttention) -> None:
    layer.adapter = nn.Linear(E, E)


SPOILT: list[tuple[Callable[[nn.MultiheadAttention], None], str]] = [
    (pruned, r"parameters in_proj_bias \(66,\), in_proj_weight \(66, 22\) of .*got .*in_proj_weight_orig.*pruning"),
    (weight_normed, r"before it is parametrised, .*got a torch\.nn\.utils\.parametrize\.Parametrized"),
    (quantised_projection, r"ordinary floating-point parameters, got an out_proj of torch\.ao\.nn\.quantized"),
    (in_int8, r"ordinary floating-point parameters, got in_proj_weight of torch\.int8; swap before quantising"),
    (of_a_tensor_subclass, r"ordinary floating-point parameters, got out_proj\.weight of Wrapped; swap before"),
    (on_two_devices, "must be on one device, got parameters on cpu and meta"),
    (patched, "must have the forward of its class, got one set on the layer itself"),
    (one_weight_less, r"must have the parameters .*got in_proj_bias \(66,\); .*unmerge adapters"),
    (with_a_buffer, r"must have the parameters .*, got .*in_proj_weight \(66, 22\), slopes \(2,\);"),
    (with_a_module, r"must have only what nn\.MultiheadAttention can express, got adapter; leave it out by filter_fn"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
@pytest.mark.parametrize("way", BACK_AND_FORTH)
def test_a_layer_that_cannot_be_exchanged_is_refused(
    way: str, spoil: Callable[[nn.MultiheadAttention], None], message: str
) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 13, batch_first=True), 1)
    if way == "restore":
        replace_attention(encoder)
    model = nn.ModuleDict({"good": encoder, "bad": layer_for(way)})
    spoil(model["bad"])
    before = everything(model)
    with pytest.raises(ValueError, match=f"layer 'bad' .*{message}"):
        BACK_AND_FORTH[way](model)
    assert everything(model) == before
    chosen = BACK_AND_FORTH[way](model, filter_fn=lambda name, _: name != "bad")
    assert list(chosen) == ["good.layers.0.self_attn"]


def test_a_quantisable_layer_is_refused() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(E, H), quantizable.MultiheadAttention(E, H)])
    before = everything(model)
    with pytest.raises(ValueError, match=r"layer '1' must be swapped before .*torch\.ao\.nn\.quantizable"):
        replace_attention(model)
    assert everything(model) == before


@pytest.mark.parametrize("way", BACK_AND_FORTH)
def test_a_model_without_layers_to_exchange_is_refused(way: str) -> None:
    class Other(nn.MultiheadAttention):
        pass

    swap = BACK_AND_FORTH[way]
    with pytest.raises(ValueError, match=r"model must hold at least one nn\.MultiheadAttention, got none in Linear"):
        swap(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="got only '0', of a derived class, in Sequential"):
        swap(nn.Sequential(Other(E, H)))
    model = nn.Sequential(layer_for(way))
    before = everything(model)
    with pytest.raises(ValueError, match="that filter_fn accepts, got only '0', each rejected by filter_fn or"):
        swap(model, filter_fn=lambda name, _: False)
    with pytest.raises(TypeError, match="filter_fn must be a function of name and module, or None, got '0'"):
        swap(model, filter_fn="0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must be a module that contains .*, got such a layer itself"):
        swap(model[0])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        swap("model")  # type: ignore[arg-type]
    assert everything(model) == before


@pytest.mark.parametrize("way", BACK_AND_FORTH)
def test_layers_on_different_devices_are_exchanged_on_their_devices(way: str) -> None:
    model = nn.ModuleList([layer_for(way, device="meta"), layer_for(way)])
    new = BACK_AND_FORTH[way](model)
    assert [{p.device.type for p in layer.parameters()} for layer in new.values()] == [{"meta"}, {"cpu"}]
    assert [type(layer) for layer in model] == [type(layer_for("restore" if way == "replace" else "replace"))] * 2


@pytest.mark.parametrize("way", BACK_AND_FORTH)
def test_a_model_wrapped_for_distributed_training_is_refused(way: str) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(layer_for(way)))
        before = everything(model)
        with pytest.raises(ValueError, match="must not be wrapped in DistributedDataParallel, which knows only"):
            BACK_AND_FORTH[way](model)
        assert everything(model) == before
    finally:
        torch.distributed.destroy_process_group()


class Gated(AdaptiveSparseMultiheadAttention):
    """A user's layer with features beyond torch's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(()))


class Normed(AdaptiveSparseMultiheadAttention):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.LayerNorm(E)


BEYOND: list[tuple[type[AdaptiveSparseMultiheadAttention], dict[str, Any], str]] = [
    (Gated, {}, r"got gate \(\), in_proj_bias"),
    (Normed, {}, "only what nn.MultiheadAttention can express, got norm"),
    (AdaptiveSparseMultiheadAttention, {"num_kv_heads": 1}, "can express, got num_kv_heads"),
    (AdaptiveSparseMultiheadAttention, {"window": 3}, "can express, got window"),
    (AdaptiveSparseMultiheadAttention, {"qk_norm": True}, "can express, got q_norm, k_norm"),
    (AdaptiveSparseMultiheadAttention, {"length_scaling": True}, "can express, got length_scaling"),
    (AdaptiveSparseMultiheadAttention, {"positions": ALiBi(H)}, "can express, got positions"),
]


@pytest.mark.parametrize(("kind", "kwargs", "message"), BEYOND)
def test_layers_that_torch_cannot_express_are_not_restored(
    kind: type[AdaptiveSparseMultiheadAttention], kwargs: dict[str, Any], message: str
) -> None:
    model = nn.ModuleList([AdaptiveSparseMultiheadAttention(E, H), kind(E, H, **kwargs)])
    before = everything(model)
    with pytest.raises(ValueError, match=f"layer '1' must have .*{message}"):
        restore_attention(model)
    assert everything(model) == before


def test_a_layer_whose_adapter_torchs_layer_would_not_call_is_not_restored() -> None:
    model = nn.ModuleList([AdaptiveSparseMultiheadAttention(E, H)])
    model[0].out_proj = nn.Sequential(model[0].out_proj, nn.Linear(E, E))
    before = everything(model)
    with pytest.raises(
        ValueError, match=r"layer '0' must have an out_proj that is an nn\.Linear, .*got Sequential; merge"
    ):
        restore_attention(model)
    assert everything(model) == before


class Halved(AdaptiveSparseMultiheadAttention):
    """A user's layer with a bias of another shape."""

    def __init__(self, *args: Any, halve: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_proj_bias = nn.Parameter(torch.zeros(3))


def test_layer_arguments_that_change_the_parameters_are_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    before = everything(model)
    message = r"must keep the parameters of '0', in_proj_bias \(66,\), .*got {'halve': True}, which require .*\(3,\)"
    with pytest.raises(ValueError, match=message):
        replace_attention(model, Halved, halve=True)
    assert everything(model) == before


def test_the_error_for_a_checkpoint_of_another_model_names_the_parameters() -> None:
    """torch's error names the parameters that do not fit, including α."""
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    replace_attention(model, alpha_init=1.25)
    state = nn.Sequential(AdaptiveSparseMultiheadAttention(E, 11)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.raw_alpha: .*\[11\].*\[2\]"):
        model.load_state_dict(state)
    restore_attention(model)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0\.raw_alpha\""):
        model.load_state_dict(state)


@pytest.mark.parametrize("name", ["device", "dropout"])
def test_arguments_of_the_replaced_layer_are_refused(name: str) -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(
        TypeError, match=f"layer_kwargs must not hold arguments of .* from each replaced layer, got {name}$"
    ):
        replace_attention(model, **{name: 0.5})
