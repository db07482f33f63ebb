"""Exported and compiled attention accepts lengths other than the length of the first input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn import AdaptiveSparseMultiheadAttention, TopKMultiheadAttention, entmax_attention, topk_attention

# Warnings of torch itself, when an autograd function is compiled.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

E = 6


class Attends(nn.Module):
    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class LayerAttends(nn.Module):
    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x, x, x, need_weights=False, is_causal=True)[0]
        return output


MODELS: dict[str, Callable[[], nn.Module]] = {
    "entmax_attention": lambda: Attends(lambda x: entmax_attention(x, x, x, is_causal=True)),
    "topk_attention": lambda: Attends(lambda x: topk_attention(x, x, x, 7)),
    "adaptive layer": lambda: LayerAttends(AdaptiveSparseMultiheadAttention(E, 2, batch_first=True)),
    "top-k layer": lambda: LayerAttends(TopKMultiheadAttention(E, 2, k=7, batch_first=True)),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
@pytest.mark.parametrize(
    "length", [torch.export.Dim("S", min=2, max=4096), torch.export.Dim.AUTO], ids=["2-4096", "auto"]
)
def test_an_exported_program_accepts_other_lengths(make: Callable[[], nn.Module], length: object) -> None:
    model = make()
    program = torch.export.export(model, (torch.randn(1, 17, E),), dynamic_shapes=({1: length},)).module()
    for size in (2, 5, 601):
        x = torch.randn(1, size, E)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)


@every_model
def test_one_compiled_graph_accepts_several_lengths(make: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    model, counter = make(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for size in (17, 601, 5):
            x = torch.randn(1, size, E)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_a_query_without_visible_keys_has_a_gradient_of_zero_in_an_exported_program() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    program = torch.export.export(
        Attends(lambda x: entmax_attention(x, x, x, 1.0, mask)), (torch.randn(2, 3),)
    ).module()
    x = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(program(x).sum(), x)
    assert torch.equal(gradient, torch.tensor([[1.0], [0.0]]).expand(2, 3))
