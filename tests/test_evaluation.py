"""Evaluation mode is undone module by module; a pass measures the loss and the density of each head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import record_attention, replace_attention
from sparse_attn.evaluation import Passes, SavedPasses, evaluating, measured_attention


def test_every_module_gets_its_own_mode_back_after_an_error():
    models = [nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())) for _ in range(2)]
    models[0][1].eval()
    models[1].eval()[0].train()
    before = [[module.training for module in model.modules()] for model in models]
    with pytest.raises(RuntimeError, match="stop"), evaluating(*models):
        assert not any(module.training for model in models for module in model.modules())
        raise RuntimeError("stop")
    assert [[module.training for module in model.modules()] for model in models] == before


def test_a_pass_measures_the_loss_and_the_density_of_the_alpha_in_use_and_of_each_candidate():
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(12, 3, 17, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    with torch.no_grad():
        model.layers[0].self_attn.in_proj_weight.mul_(4)
    batches, name = [torch.randn(2, 7, 12) for _ in range(3)], "layers.0.self_attn"

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    tried = [[1.1, 1.5, 2.0], [1.2, 1.6, 1.9]]
    with measured_attention(model, loss) as (heads, run_pass):
        passes = Passes(run_pass, batches, heads, SavedPasses(None, {}), progress=False)
        result = passes({name: tried[0]}, {name: tried})
    assert heads == {name: 3} and type(model.layers[0].self_attn) is nn.MultiheadAttention
    replaced = replace_attention(model)
    for alpha, density in zip(tried, result.tried[name], strict=True):
        with torch.no_grad(), record_attention(model) as record:
            replaced[name].raw_alpha.copy_(torch.tensor(alpha))
            losses = [loss(model, batch).item() for batch in batches]
        assert density == pytest.approx(record[name].density.tolist())
        if alpha is tried[0]:
            assert result.density[name] == density and result.loss == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert result.tried[name][0] != result.tried[name][1]
