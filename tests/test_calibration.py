"""`calibrate` finds α for a density or for a bound on the loss in models of torch, and leaves the model unchanged."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    TopKMultiheadAttention,
    calibrate,
    record_attention,
    replace_attention,
)

BATCHES = [torch.randn(3, 31, 12, generator=torch.Generator().manual_seed(number)) for number in range(3)]
LAYERS = {"layers.0.self_attn": 4, "layers.1.self_attn": 4}


def encoder(scale: float = 4.0) -> nn.TransformerEncoder:
    """An encoder whose scores are large enough for a sparse mapping to leave keys out."""
    torch.manual_seed(5)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 17, batch_first=True), 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.in_proj_weight.mul_(scale)
    return model


def only_topk() -> nn.Module:
    model = encoder()
    replace_attention(model, TopKMultiheadAttention, k=2)
    return model


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean squared difference between the output and the output of the dense model."""
    return (model(batch) - dense_output(batch)).square().mean()


def dense_output(batch: Tensor) -> Tensor:
    return encoder().eval()(batch)


def measured(alpha: dict[str, list[float]]) -> tuple[dict[str, list[float]], float]:
    """Density of every head and mean loss with these α, measured with public functions."""
    model = encoder().eval()
    replace_attention(model, alpha_init=alpha)
    with torch.no_grad():
        losses = [float(loss(model, batch)) for batch in BATCHES]
        with record_attention(model) as record:
            for batch in BATCHES:
                model(batch)
    used = {name: heads.density.tolist() for name, heads in record.items()}
    return used, sum(losses) / len(losses)


@pytest.mark.parametrize("density", [0.6, 0.25, 0.1])
def test_every_head_has_the_wanted_density(density):
    found = calibrate(encoder(), BATCHES, density=density, loss=loss, progress=False)
    assert {name: len(alpha) for name, alpha in found.items()} == LAYERS
    used, after = measured(found)
    assert found.loss_before == pytest.approx(0, abs=1e-10) and found.loss_after == pytest.approx(after, rel=1e-4)
    for name, densities in found.density.items():
        assert densities == pytest.approx(used[name], abs=1e-3)
        assert densities == pytest.approx([density] * 4, abs=0.01)
    assert len({alpha for values in found.values() for alpha in values}) == 8


def test_heads_of_a_layer_can_share_their_alpha():
    found = calibrate(encoder(), BATCHES, density=0.3, per="layer", loss=loss, progress=False)
    for name, alpha in found.items():
        assert len(set(alpha)) == 1
        assert sum(found.density[name]) / 4 == pytest.approx(0.3, abs=0.01)
        assert max(found.density[name]) - min(found.density[name]) > 0.01


def test_a_density_out_of_reach_gives_alpha_max_and_density_one_gives_alpha_one():
    found = calibrate(encoder(0.1), BATCHES, density=0.01, loss=loss, alpha_max=1.3, progress=False)
    assert {alpha for values in found.values() for alpha in values} == {1.3}
    dense = calibrate(encoder(), BATCHES, density=1, loss=loss, progress=False)
    assert {alpha for values in dense.values() for alpha in values} == {1.0}
    assert dense.loss_after == pytest.approx(0, abs=1e-10)


def test_a_bound_on_the_loss_gives_the_lowest_density_that_keeps_it():
    results = [
        calibrate(encoder(), BATCHES, loss_increase=bound, loss=loss, progress=False) for bound in (0.0, 0.02, 0.1, 1e9)
    ]
    means = [sum(map(sum, result.density.values())) / 8 for result in results]
    assert means == sorted(means, reverse=True) and means[0] > 2 * means[2]
    for result, bound in zip(results, (0.0, 0.02, 0.1, 1e9), strict=True):
        assert result.loss_after <= bound + 1e-10
    # At a density lower by a fifth, the loss is too large.
    sparser = calibrate(encoder(), BATCHES, density=0.8 * means[2], loss=loss, progress=False)
    assert sparser.loss_after > 0.1


def state_of(model: nn.Module) -> tuple[Any, ...]:
    modules = dict(model.named_modules())
    hooks = [len(module._forward_hooks) for module in modules.values()]
    modes = [module.training for module in modules.values()]
    variables = [sorted(vars(module)) for module in modules.values()]
    nested = getattr(model, "use_nested_tensor", None)
    return modules, [id(p) for p in model.parameters()], hooks, modes, variables, nested


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, RuntimeError])
def test_calibrate_leaves_the_model_unchanged(stop):
    model = encoder()
    model.layers[0].eval()
    before, values, calls = state_of(model), [p.clone() for p in model.parameters()], []

    def counted(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(model.training)
        if stop is not None and len(calls) == 5:
            raise stop
        return loss(model, batch)

    if stop is None:
        calibrate(model, BATCHES, density=0.3, loss=counted, progress=False)
    else:
        with pytest.raises(stop):
            calibrate(model, BATCHES, density=0.3, loss=counted, progress=False)
    assert not any(calls)
    assert state_of(model) == before
    assert all(torch.equal(x, y) for x, y in zip(values, model.parameters(), strict=True))


def test_adaptive_layers_keep_their_alpha():
    model = encoder()
    replace_attention(model, alpha_init=1.7)
    before = state_of(model)
    found = calibrate(model, BATCHES, density=0.3, loss=loss, progress=False)
    assert state_of(model) == before and model.layers[0].self_attn.alpha.tolist() == pytest.approx([1.7] * 4)
    expected = calibrate(encoder(), BATCHES, density=0.3, loss=loss, progress=False)
    for name, alpha in expected.items():
        assert found[name] == pytest.approx(alpha, abs=1e-5)


def test_an_interrupted_call_continues(tmp_path, capsys):
    state, calls, allowed = tmp_path / "state.json", 0, 10

    def counted(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > allowed:
            raise KeyboardInterrupt
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        calibrate(encoder(), BATCHES, density=0.3, loss=counted, state=state)
    # The calls are three passes of three batches, one more batch, and the call that raises. Each finished pass has
    # printed one line.
    assert calls == 11 and capsys.readouterr().err.count("\n") == 3
    calls, allowed = 0, 10**6
    found = calibrate(encoder(), BATCHES, density=0.3, loss=counted, state=state, progress=False)
    assert calls == 3 * 5 and list(tmp_path.iterdir()) == [state]
    assert found == calibrate(encoder(), BATCHES, density=0.3, loss=loss, progress=False)
    calls = 0
    again = calibrate(encoder(), BATCHES, density=0.3, loss=counted, state=state, progress=False)
    assert calls == 0 and again == found and again.density == found.density
    with pytest.raises(ValueError, match=r"must come from a call with density=0.2 like this one, got .* density=0.3"):
        calibrate(encoder(), BATCHES, density=0.2, loss=loss, state=state)
    saved = json.loads(state.read_text())
    other_call, other_pass = saved["call"] | {"batches": 3}, {"loss": 1.0}
    for content in ({}, [], {**saved, "call": "x"}, {**saved, "call": other_call}, {**saved, "passes": [other_pass]}):
        state.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"^state must be a file that calibrate wrote, got '.*state.json'"):
            calibrate(encoder(), BATCHES, density=0.3, loss=loss, state=state)
    with pytest.raises(ValueError, match=r"^state must be a file, got the folder '.*'$"):
        calibrate(encoder(), BATCHES, density=0.3, loss=loss, state=tmp_path)


def test_the_result_can_be_saved_as_json_and_given_to_replace_attention(tmp_path):
    found = calibrate(encoder(), BATCHES, density=0.3, loss=loss, progress=False)
    file = tmp_path / "alpha.json"
    file.write_text(json.dumps(found))
    model = encoder()
    new = replace_attention(model, alpha_init=json.loads(file.read_text()))
    for name, layer in new.items():
        assert layer.alpha.tolist() == pytest.approx(found[name], abs=1e-6)
    message = "alpha_init must have a value for the layer 'layers.1.self_attn', got values for layers.0.self_attn"
    with pytest.raises(ValueError, match=message):
        replace_attention(encoder(), alpha_init={"layers.0.self_attn": 1.5})


class CausalModel(nn.Module):
    """One causal attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AdaptiveSparseMultiheadAttention(12, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, is_causal=True, need_weights=False)[0]


def test_only_visible_keys_count_in_causal_layers():
    torch.manual_seed(1)
    found = calibrate(
        CausalModel(), [4 * batch for batch in BATCHES], density=0.5, loss=lambda m, x: m(x).sum(), progress=False
    )
    assert found.density["attention"] == pytest.approx([0.5] * 4, abs=0.01)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density must be in \(0, 1\], got 0"),
        ({"density": 1.5}, ValueError, r"density must be in \(0, 1\], got 1.5"),
        ({"density": "0.2"}, TypeError, "density must be a number, got '0.2'"),
        ({"density": None}, ValueError, "exactly one of density and loss_increase must be given, got None and None"),
        ({"loss_increase": 0.1}, ValueError, "exactly one of density and loss_increase must be given, got 0.3 and 0.1"),
        (
            {"density": None, "loss_increase": -1},
            ValueError,
            "loss_increase must be a finite number of at least 0, got",
        ),
        ({"per": "model"}, ValueError, "per must be 'head' or 'layer', got 'model'"),
        ({"alpha_max": 1.0}, ValueError, r"alpha_max must be in \(1, inf\), got 1.0"),
        ({"batches": []}, ValueError, "batches must hold at least one batch, got none"),
        ({"batches": iter(BATCHES)}, TypeError, "batches must be iterable several times, .* got list_iterator"),
        ({"batches": 3}, TypeError, "batches must be iterable several times, .* got int"),
        ({"loss": "mse"}, TypeError, "loss must be a function of model and batch, got str"),
        ({"loss": None}, TypeError, "batches must hold dicts .* unless loss is given, got Tensor"),
        ({"loss": lambda model, batch: model(batch)}, TypeError, r"loss must return .* one number, got shape \(3, 31"),
        (
            {"loss": lambda model, batch: model(batch).sum() * math.nan},
            ValueError,
            "loss must be .* the sum nan over 3",
        ),
        ({"model": only_topk()}, ValueError, "model must have layers of .* got neither in TransformerEncoder"),
        ({"model": nn.Linear(3, 5)}, ValueError, "model must hold at least one nn.MultiheadAttention, got none in Lin"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"batches": {"x": BATCHES[0]}}, TypeError, "batches must be a list of batches or a DataLoader, got one dict"),
        ({"progress": "no"}, TypeError, "progress must be True or False, got 'no'"),
        ({"state": "/no/such/folder/state"}, ValueError, "state must be a file in a folder that exists"),
        ({"state": {"passes": []}}, TypeError, "^state must be the path of a file or None, got dict$"),
        ({"state": "/"}, ValueError, "^state must be a file, got the folder '/'$"),
    ],
)
def test_wrong_input_raises_an_error(change, error, message):
    arguments = {"model": encoder(), "batches": BATCHES, "density": 0.3, "loss": loss} | change
    model = arguments.pop("model")
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        calibrate(model, arguments.pop("batches"), **arguments)
    assert before is None or state_of(model) == before
