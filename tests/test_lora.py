"""α in layers whose projections have adapters: torch's parametrisations and peft's adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from encoders import sparse_encoder
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_attn import AdaptiveSparseMultiheadAttention, alpha_per_head
from sparse_attn.nn.alpha import HeadAlpha, WideAlpha
from sparse_attn.optim import alpha_param_groups, alpha_penalty, set_alpha, unfreeze_alpha

N, L, H, E, F = 3, 5, 2, 14, 11


encoder = partial(sparse_encoder, E, H, F)


class LowRank(nn.Module):
    """Adds a learnt matrix of rank 2 to a weight."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def test_a_layer_with_a_parametrised_in_projection_computes_and_trains() -> None:
    model = encoder(layers=1)
    layer = model.layers[0].self_attn
    plain = copy.deepcopy(model)
    model.requires_grad_(False)
    change = LowRank(3 * E, E)
    parametrize.register_parametrization(layer, "in_proj_weight", change)
    unfreeze_alpha(model)
    plain.layers[0].self_attn.in_proj_weight = nn.Parameter(layer.in_proj_weight.detach().clone())
    x = torch.randn(N, L, E)
    torch.testing.assert_close(model(x), plain(x))
    groups = alpha_param_groups(model, lr=0.1, weight_decay=0.5)
    assert [len(group["params"]) for group in groups] == [2, 1]
    model(x).pow(3).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for group in groups for p in group["params"])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    parametrize.remove_parametrizations(layer, "in_proj_weight")
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


class Block(nn.Module):
    """A user's block, which calls an attention layer and reads no attribute of this layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, alpha_init=1.25)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (encoder, {"target_modules": ["out_proj", "linear1"]}),
        (Block, {"target_modules": ["out_proj"]}),
        (Block, {"target_modules": ["out_proj"], "target_parameters": ["attention.in_proj_weight"]}),
    ],
    ids=["encoder", "block", "block with in_proj_weight"],
)
def test_lora_trains_adapters_and_alpha_and_can_be_merged(
    make: Callable[[], nn.Module], targets: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, init_lora_weights=False, **targets))
    assert not any(module.raw_alpha.requires_grad for module in model.modules() if isinstance(module, WideAlpha))
    unfreeze_alpha(model)
    x = torch.randn(N, L, E)
    before, output = alpha_per_head(model), model(x)
    optimizer = torch.optim.SGD(alpha_param_groups(model, lr=1e-3))
    output.pow(3).sum().backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(grad.any()) for grad in learning.values())
    kinds = {"lora_A", "lora_B", "raw_alpha"}
    assert all(len(kinds & set(name.split("."))) == 1 for name in learning)
    optimizer.step()
    assert all(bool((alpha != before[name]).all()) for name, alpha in alpha_per_head(model).items())

    model.eval()
    with torch.no_grad():
        trained = model(x)
        assert bool((trained != output).any())
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), trained)


class Projected(nn.Module):
    """A projection for adapters, an attention layer of this library, and a module that holds a `HeadAlpha`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(E, E)
        self.inner = nn.Sequential(AdaptiveSparseMultiheadAttention(E, H, alpha_init=1.25))
        self.other = nn.Module()
        self.other.sparse_alpha = HeadAlpha(H, alpha_init=1.25)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.inner[0](x, x, x)[0] * self.other.sparse_alpha.alpha.sum()


@pytest.mark.parametrize("saved", [["sparse_alpha", "inner.0"], ["sparse_alpha", "inner"]])
def test_inactive_copies_of_modules_in_peft_are_left_out(saved: list[str]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["linear"], modules_to_save=saved)
    model = peft.get_peft_model(Projected(), config)
    prefix = "base_model.model."
    assert list(alpha_per_head(model)) == [prefix + "inner.0", prefix + "other"]
    dead = [p for name, p in model.named_parameters() if "original_module" in name and "raw_alpha" in name]
    assert len(dead) == 2

    unfreeze_alpha(model)
    assert not any(p.requires_grad for p in dead)
    assert len(alpha_param_groups(model, lr=0.1)[-1]["params"]) == 2
    alpha_penalty(model).backward()
    live = [p for name, p in model.named_parameters() if "modules_to_save" in name and "raw_alpha" in name]
    assert [p.grad.tolist() for p in live if p.grad is not None] == [[-0.25] * H] * 2

    kept = alpha_per_head(model)
    set_alpha(model, 1.75)
    assert all(p.tolist() == [1.75] * H for p in live) and all(p.tolist() == [1.25] * H for p in dead)
    set_alpha(model, kept)
    assert all(p.tolist() == [1.25] * H for p in live)

    model.add_adapter("second", config)
    set_alpha(model, 1.5)
    model.set_adapter("second")
    assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())
    set_alpha(model, 1.875)
    with model.disable_adapter():
        assert all(alpha.tolist() == [1.25] * H for alpha in alpha_per_head(model).values())
    model.set_adapter("default")
    assert all(alpha.tolist() == [1.5] * H for alpha in alpha_per_head(model).values())
    merged = model.merge_and_unload()
    assert {name: alpha.tolist() for name, alpha in alpha_per_head(merged).items()} == {
        "inner.0": [1.5] * H,
        "other": [1.5] * H,
    }


def test_lora_on_a_whole_attention_is_refused_by_peft() -> None:
    # peft's wrapper of nn.MultiheadAttention reads `_qkv_same_embed_dim`, which our layers set to False.
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        peft.get_peft_model(encoder(), peft.LoraConfig(r=2, target_modules=["self_attn"]))
