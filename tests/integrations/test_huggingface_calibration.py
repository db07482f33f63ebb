"""The α that `calibrate` finds for models of transformers give the requested density or loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import calibrate, record_attention
from sparse_attn.integrations.huggingface import add_alpha

transformers = pytest.importorskip("transformers")


def batches(name: str) -> list[dict[str, Tensor]]:
    found = []
    for seed in (3, 5):
        ids = torch.randint(3, 37, (2, 23), generator=torch.Generator().manual_seed(seed))
        found.append({"input_ids": ids, "labels": ids[:, :7].contiguous() if name == "t5" else ids})
    return found


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma2", "gpt_oss", "t5"])
@pytest.mark.parametrize("before", ["sdpa", "eager", "entmax"])
def test_the_calibrated_model_has_the_requested_density(name, before, build):
    if before == "sdpa" and name in ("gemma2", "gpt_oss"):
        pytest.skip("transformers has no sdpa for this model")
    model = build(name, before)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    variables = {key: sorted(vars(module)) for key, module in model.named_modules()}
    found = calibrate(model, batches(name), density=0.3, progress=False)
    assert {config._attn_implementation for config in configs.values()} == {before}
    assert variables == {key: sorted(vars(module)) for key, module in model.named_modules()}
    model.set_attn_implementation("entmax")
    if {config._attn_implementation for config in configs.values()} != {"entmax"}:
        pytest.skip("in this version of transformers, set_attn_implementation leaves out the parts of T5")
    names = list(add_alpha(model, alpha_init=found))
    assert names == list(found)
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in batches(name)]
        with record_attention(model) as record:
            for batch in batches(name):
                model(**batch)
    assert found.loss_after == pytest.approx(sum(losses) / 2, rel=1e-4)
    # The record counts a query with all its weight on the sink as padding. With few keys, the density moves in steps.
    exact, near = (0.02 if name == "gpt_oss" else 5e-3), (0.1 if name == "t5" else 0.02)
    for layer, heads in record.items():
        assert heads.density.tolist() == pytest.approx(found.density[layer], abs=exact)
        for alpha, density in zip(found[layer], found.density[layer], strict=True):
            # Capped scores can be so near each other that even with α = 2 too many keys have weight.
            assert density == pytest.approx(0.3, abs=near) or (name == "gemma2" and alpha == 2 and density > 0.3)


def test_the_dense_loss_is_the_loss_of_the_model_and_the_increase_is_limited(build):
    model = build("llama", "sdpa")
    with torch.no_grad():
        expected = sum(float(model(**batch).loss) for batch in batches("llama")) / 2
    found = calibrate(model, batches("llama"), loss_increase=0.05, progress=False)
    assert found.loss_before == pytest.approx(expected, rel=1e-5)
    assert found.loss_after <= found.loss_before + 0.05


def test_alpha_found_for_another_model_is_refused(build):
    found = calibrate(build("gpt2", "eager"), batches("gpt2"), density=0.5, progress=False)
    model = build("llama", "entmax")
    with pytest.raises(ValueError, match=r"alpha_init must have a value for the layer 'model.layers.0.self_attn', got"):
        add_alpha(model, alpha_init=found)
    assert not any("sparse_alpha" in key for key, _ in model.named_parameters())


def test_models_without_the_interface_and_batches_without_labels_are_refused():
    config = transformers.BloomConfig(vocab_size=37, hidden_size=24, n_layer=1, n_head=3)
    with pytest.raises(ValueError, match="model must attend through transformers' attention interface, got no such"):
        calibrate(transformers.BloomForCausalLM(config), batches("bloom"), density=0.5)
    sizes = {"vocab_size": 37, "n_embd": 24, "n_layer": 1, "n_head": 3}
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    unlabelled = [{"input_ids": batches("gpt2")[0]["input_ids"]}]
    with pytest.raises(
        ValueError, match="batches must hold labels, or loss must be given: GPT2LMHeadModel returned no"
    ):
        calibrate(model, unlabelled, density=0.5)
    assert model.config._attn_implementation == "sdpa"
