"""A learnt α per head in checkpoints of transformers and of adapters."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_attn import alpha_per_head
from sparse_attn.integrations.huggingface import add_alpha, load_alpha

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "modernbert", "gpt2", "llama", "t5", "bart", "vit"])
def test_alpha_is_saved_and_loaded(name, build, batch, tmp_path, with_alpha):
    # The checkpoint is sharded. For "vit", transformers saves the names of older versions, not the names in the model.
    model = with_alpha(build(name, "entmax"), alpha_range=(1.0, 1.9))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="entmax")
    assert not alpha_per_head(loaded)
    alphas = load_alpha(loaded, tmp_path)
    assert list(alphas) == list(alpha_per_head(model))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert {alpha.alpha_range for alpha in alphas.values()} == {(1.0, 1.9)}
    inputs = batch(name)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert list(load_alpha(loaded, str(tmp_path))) == list(alphas)  # a second call is allowed


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_alpha_loads_into_a_model_with_another_task_head(name, build, tmp_path, with_alpha):
    model = with_alpha(build(name, "entmax"))
    values = list(alpha_per_head(model).values())
    for kind in (type(model.base_model), type(model)):
        model.save_pretrained(tmp_path / kind.__name__)
        model = kind.from_pretrained(tmp_path / kind.__name__, attn_implementation="entmax")
        load_alpha(model, tmp_path / kind.__name__)
        for got, expected in zip(alpha_per_head(model).values(), values, strict=True):
            assert torch.equal(got, expected)


def test_a_module_in_two_places_has_one_alpha(build, tmp_path, with_alpha):
    class Tied(transformers.LlamaForCausalLM):
        # A checkpoint then holds only the names of layer 1.
        _tied_weights_keys = {r"model\.layers\.0\.(.*)": r"model.layers.1.\1"}  # noqa: RUF012

        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0] = self.model.layers[1]

    model = with_alpha(Tied._from_config(build("llama", "entmax").config, attn_implementation="entmax"))
    model.save_pretrained(tmp_path)
    loaded = Tied.from_pretrained(tmp_path, attn_implementation="entmax")
    (alpha,) = load_alpha(loaded, tmp_path).values()
    assert loaded.model.layers[0].self_attn.sparse_alpha is loaded.model.layers[1].self_attn.sparse_alpha is alpha
    assert torch.equal(alpha.raw_alpha, model.model.layers[0].self_attn.sparse_alpha.raw_alpha)


def test_a_dense_checkpoint_gets_alpha_from_add_alpha_only(build, batch, tmp_path):
    build("bert", "eager").save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="entmax")
    with pytest.raises(ValueError, match=r"path must be a checkpoint with learnt α, got '.*' without α; add_alpha"):
        load_alpha(model, tmp_path)
    assert not alpha_per_head(model)
    add_alpha(model, alpha_init=1.0)
    inputs = batch("bert")
    expected = build("bert", "eager")(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads this attribute
def test_alpha_is_saved_and_merged_with_lora_on_the_projections(build, batch, tmp_path):
    peft = pytest.importorskip("peft")
    inputs = batch("llama")
    model = build("llama", "entmax")
    names = list(add_alpha(model))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["sparse_alpha"])
    model = peft.get_peft_model(model, config).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**inputs).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    expected, values = model(**inputs).logits, alpha_per_head(model)
    assert list(values) == ["base_model.model." + name for name in names]
    assert all((value != 1.5).all() for value in values.values())

    model.save_pretrained(tmp_path)
    fresh = build("llama", "entmax")
    add_alpha(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert list(alpha_per_head(merged)) == names


@pytest.mark.parametrize("noted", [None, "sparse", [2.0, 1.0]])
def test_a_checkpoint_without_a_range_of_alpha_is_refused(noted, build, tmp_path, with_alpha):
    with_alpha(build("gpt2", "entmax")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sparse_attn_alpha_range": noted}))
    fresh = build("gpt2", "entmax")
    with pytest.raises(ValueError, match=r"path must be .* config.json has 'sparse_attn_alpha_range', two numbers"):
        load_alpha(fresh, tmp_path)
    assert not alpha_per_head(fresh)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_with_unknown_tensors_of_alpha_is_refused(shards, build, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    build("gpt2", "entmax").save_pretrained(tmp_path)
    file, key = tmp_path / "model.safetensors", "transformer.h.0.attn.sparse_alpha.per_query"
    safetensors.save_file({key: torch.ones(3)}, file, metadata={"format": "pt"})
    if shards == 2:
        file = file.rename(tmp_path / "model-00002-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": {key: file.name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"path must be .* of this version of sparse-attn, got '{key}' in '.*', which"
    ):
        load_alpha(build("gpt2", "entmax"), tmp_path)


def test_a_checkpoint_with_a_nan_alpha_is_refused(build, tmp_path, with_alpha):
    model = with_alpha(build("gpt2", "entmax"))
    with torch.no_grad():
        model.transformer.h[1].attn.sparse_alpha.raw_alpha[1] = float("nan")
    model.save_pretrained(tmp_path)
    fresh = build("gpt2", "entmax")
    with pytest.raises(ValueError, match=r"finite α, got \[.*nan.*\] for 'transformer.h.1.attn'"):
        load_alpha(fresh, tmp_path)
    assert not alpha_per_head(fresh)


def test_checkpoints_of_another_model_and_empty_folders_are_refused(build, tmp_path, with_alpha):
    with_alpha(build("gpt2", "entmax")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got α of shape \(3,\) for 'transformer.h.0.attn' with 4 heads"):
        load_alpha(build("gpt2", "entmax", n_head=4), tmp_path)
    shallow = build("gpt2", "entmax", n_layer=1)
    with pytest.raises(
        ValueError, match=r"got α at 'transformer.h.1.attn.sparse_alpha.raw_alpha', where GPT2LMHeadModel"
    ):
        load_alpha(shallow, tmp_path)
    assert not alpha_per_head(shallow)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"does not appear to have a file named model\.safetensors"):
        load_alpha(build("gpt2", "entmax"), tmp_path / "empty")
