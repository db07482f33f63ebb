import copy

import pytest
import torch
from torch import nn

from sparse_attn import replace_attention
from sparse_attn.analysis import count_head_changes, head_worth
from sparse_attn.optim import set_alpha

HEADS, SIZE = 3, 5


@pytest.fixture
def model() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HEADS * SIZE, HEADS, 7, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    replace_attention(model, alpha_init=[1.2, 1.5, 1.8])
    return model


def loss_of(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(x).cos().mean())


def test_each_change_of_a_head_equals_a_change_by_hand(model: nn.Module) -> None:
    x = 3 * torch.randn(2, 11, HEADS * SIZE)
    steps: list[None] = []
    worth = head_worth(model, lambda: loss_of(model, x), progress=lambda: steps.append(None))
    assert len(steps) == count_head_changes(model) == 1 + 3 * 2 * HEADS
    before = loss_of(model, x)
    for index in range(2):
        name = f"layers.{index}.self_attn"
        for head in range(HEADS):
            changed = copy.deepcopy(model)
            attention = changed.get_submodule(name)
            alpha = attention.alpha.detach().clone()
            for change, value in {"dense": 1.0, "sparse": 2.0}.items():
                alpha[head] = value
                set_alpha(changed, {name: alpha})
                assert float(worth[change][name][head]) == pytest.approx(loss_of(changed, x) - before, abs=1e-7)
            changed = copy.deepcopy(model)
            weight = changed.get_submodule(name).out_proj.weight
            with torch.no_grad():
                weight.view(-1, HEADS, SIZE)[:, head] = 0
            assert float(worth["off"][name][head]) == pytest.approx(loss_of(changed, x) - before, abs=1e-7)
            assert float(worth["off"][name][head]) != 0


def test_head_worth_restores_the_model_after_success_and_after_an_error(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fail() -> float:
        calls.append(None)
        if len(calls) == 9:
            raise RuntimeError("no more")
        return 0.0

    def assert_unchanged() -> None:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())

    head_worth(model, lambda: 0.0)
    assert_unchanged()
    with pytest.raises(RuntimeError, match="no more"):
        head_worth(model, fail)
    assert_unchanged()


def test_layers_of_torch_can_only_be_switched_off() -> None:
    layer = nn.TransformerEncoderLayer(HEADS * SIZE, HEADS, 7, batch_first=True).eval()
    x = torch.randn(2, 11, HEADS * SIZE)
    worth = head_worth(layer, lambda: loss_of(layer, x))
    assert worth["off"].keys() == {"self_attn"} and not worth["dense"] and not worth["sparse"]


def test_a_change_of_alpha_is_refused_if_every_alpha_is_fixed() -> None:
    layer = nn.TransformerEncoderLayer(HEADS * SIZE, HEADS, 7, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    replace_attention(model, alpha_init=1.5, learn_alpha=False)
    set_alpha(model, 1.25)  # the number becomes a buffer
    with pytest.raises(ValueError, match="some with a learnt α"):
        head_worth(model, lambda: 0.0, ["dense"])


def test_invalid_input_raises_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="changes must be among off, dense, sparse, got 'on'"):
        head_worth(model, lambda: 0.0, ["on"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"changes must be a list of changes such as \['off'\], got the string 'off'"):
        head_worth(model, lambda: 0.0, "off")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must have nn\.MultiheadAttention layers, .* got Linear without such"):
        head_worth(nn.Linear(2, 2), lambda: 0.0)


def test_a_weight_that_is_computed_anew_in_each_call_cannot_be_switched_off(model: nn.Module) -> None:
    # A change of such a weight has no effect. Without an error, every head would seem to be worth nothing.
    nn.utils.parametrizations.weight_norm(model.layers[1].self_attn.out_proj)
    with pytest.raises(ValueError, match=r"out_proj of .layers\.1\.self_attn. must be a linear layer"):
        head_worth(model, lambda: 0.0, ["off"])
    assert head_worth(model, lambda: 0.0, ["dense"])["dense"].keys() == {"layers.0.self_attn", "layers.1.self_attn"}
