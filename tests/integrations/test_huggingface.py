"""Transformers models with our attention functions: weights, gradients, masks, caches; ``register`` and errors."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from memory import saved_sizes
from torch import Tensor

from sparse_attn import entmax, topk_softmax
from sparse_attn.integrations.huggingface import register
from sparse_attn.observe import observe_weights

transformers = pytest.importorskip("transformers")

ENCODERS = ["bert", "roberta", "albert", "modernbert"]
DECODERS = ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss"]
BOTH = ["t5", "bart", "whisper"]
IMAGES = ["vit", "clip"]
SPARSE = ["entmax", "sparsemax", "entmax15", "topk"]


@pytest.fixture(autouse=True)
def alpha_one() -> None:
    register("alpha_one", alpha=1.0)


def result(output) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def real(inputs: dict[str, Tensor], output: Tensor) -> Tensor:
    """Returns a mask of the positions of an output that are not padding."""
    mask = inputs.get("attention_mask")
    return (
        torch.ones(output.shape[:-1], dtype=torch.bool) if mask is None or "decoder_input_ids" in inputs else mask > 0
    )


@pytest.mark.parametrize("name", ENCODERS + DECODERS + BOTH + IMAGES)
def test_alpha_one_equals_eager_attention_with_gradients(name, build, batch):
    inputs = batch(name)
    eager, ours = build(name, "eager"), build(name, "alpha_one")
    expected, got = result(eager(**inputs)), result(ours(**inputs))
    kept = real(inputs, expected)
    torch.testing.assert_close(got[kept], expected[kept], rtol=1e-5, atol=2e-5)
    upstream = torch.randn_like(expected[kept])
    (expected[kept] * upstream).sum().backward()
    (got[kept] * upstream).sum().backward()
    gradients = {key: parameter.grad for key, parameter in eager.named_parameters() if parameter.grad is not None}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for key, parameter in ours.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5 * largest.item(), msg=key)


@pytest.mark.parametrize("name", ["pegasus_x", "nllb_moe", "splinter"])
def test_models_without_an_is_causal_attribute_equal_eager_attention(name, build, batch):
    inputs = {
        key: ids for key, ids in batch(name).items() if key != "attention_mask"
    }  # without padding, no mask is needed
    expected, got = result(build(name, "eager")(**inputs)), result(build(name, "alpha_one")(**inputs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_no_mask_is_built_if_the_modules_have_is_causal(build, batch):
    model, seen = build("gpt2", "entmax"), []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        for block in model.transformer.h
    ]
    model(batch("gpt2")["input_ids"])
    assert len(seen) == len(hooks) and all(kwargs["attention_mask"] is None for kwargs in seen)


@pytest.mark.parametrize(
    ("implementation", "mapping"),
    [
        ("entmax", lambda scores: entmax(scores, 1.5)),
        ("entmax15", lambda scores: entmax(scores, 1.5)),
        ("sparsemax", lambda scores: entmax(scores, 2.0)),
        ("topk", lambda scores: topk_softmax(scores, 8)),
    ],
)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_weights_of_the_first_layer_are_the_mapping_of_its_scores(name, implementation, mapping, build, batch):
    # The scores are known up to a constant per row, which does not change the weights.
    inputs = batch(name)
    softmax = build(name, "eager").double()(**inputs, output_attentions=True).attentions[0]
    weights = build(name, implementation).double()(**inputs, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights, mapping(softmax.log()), rtol=1e-9, atol=1e-12)
    assert (weights == 0).sum() > (softmax == 0).sum()


@pytest.mark.parametrize("implementation", SPARSE)
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_a_decoder_does_not_see_future_positions(name, implementation, build, batch):
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    inputs = {name: ids for name, ids in batch(name).items() if name in (key, "input_ids")}  # without a padding mask
    changed = {**inputs, key: inputs[key].clone()}
    changed[key][:, 5:] = torch.randint(3, 37, changed[key][:, 5:].shape)
    model = build(name, implementation)
    before, after = result(model(**inputs)), result(model(**changed))
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("implementation", ["entmax", "topk"])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS, "t5", "bart"])
def test_padding_is_not_visible(name, implementation, build, batch):
    inputs = batch(name)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][1, -4:] = torch.randint(3, 37, (4,))
    model = build(name, implementation)
    before, after = result(model(**inputs)), result(model(**changed))
    kept = real(inputs, before)
    torch.testing.assert_close(before[kept], after[kept])
    if "decoder_input_ids" not in inputs:
        assert not torch.allclose(before[~kept], after[~kept])
    assert before.isfinite().all()


def test_sliding_window_is_kept(build, batch):
    ids = batch("mistral")["input_ids"]
    weights = torch.stack(build("mistral", "entmax")(ids, output_attentions=True).attentions)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    seen = (distance >= 0) & (distance < 5)
    assert (weights[..., ~seen] == 0).all()
    assert (weights[..., seen] > 0).float().mean() > 0.3
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_four_dimensional_masks_are_applied(build, batch):
    ids = batch("gpt2")["input_ids"]
    taken = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, 11, 11)
    added = torch.zeros(2, 1, 11, 11).masked_fill(~taken, torch.finfo(torch.float32).min)
    model = build("gpt2", "entmax")
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, attention_mask=taken).logits, expected)
    torch.testing.assert_close(model(ids, attention_mask=added).logits, expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("implementation", ["entmax", "topk"])
@pytest.mark.parametrize("name", [*DECODERS, *BOTH])
def test_generation_with_a_cache_equals_generation_without(name, implementation, beams, build, batch):
    inputs = batch(name)
    inputs.pop("decoder_input_ids", None)
    if name in DECODERS:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # prompts are padded on the left
    model = build(name, implementation)
    how = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    how |= {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    cached, fresh = (model.generate(**inputs, **how, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, fresh.sequences)
    for got, expected in zip(cached.scores, fresh.scores, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_generation_with_a_static_cache(build, batch):
    # From the first step on, there are as many keys as the cache has positions, some of them empty.
    model, inputs = build("llama", "entmax"), {"input_ids": batch("llama")["input_ids"]}
    how = {"max_new_tokens": 5, "do_sample": False}
    static = model.generate(**inputs, **how, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**inputs, **how))


def test_dropout_drops_weights_only_in_training(build, batch):
    inputs = {"input_ids": batch("bert")["input_ids"]}
    model = build("bert", "entmax", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    weights = model(**inputs, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    dropped = model.train()(**inputs, output_attentions=True).attentions[0]
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], 2 * weights[kept])
    assert 0.3 < kept[weights > 0].float().mean() < 0.7


@pytest.mark.parametrize("name", ENCODERS + DECODERS + BOTH + IMAGES)
def test_weights_are_returned_if_requested(name, build, batch):
    model, inputs = build(name, "sparsemax"), batch(name)
    silent, asked = model(**inputs), model(**inputs, output_attentions=True)
    # Two implementations of attention round differently, and later layers increase this difference.
    torch.testing.assert_close(result(asked), result(silent), atol=1e-4, rtol=1e-3)
    kinds = [key for key in asked if "attentions" in key and asked[key]]
    assert kinds == [key for key in kinds if silent.get(key) is None] != []
    for weights in (layer for kind in kinds for layer in asked[kind]):
        seen = weights.sum(-1) > 0  # a query at padding can be without a visible key
        if name == "gpt_oss":  # the sink has the remaining weight
            assert weights.sum(-1).max() <= 1 + 1e-5 and weights.sum(-1)[seen].min() < 0.9
        else:
            torch.testing.assert_close(weights.sum(-1)[seen], torch.ones(int(seen.sum())))
        assert (weights == 0).any()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_observers_receive_the_weights(name, build, batch):
    model, inputs, seen = build(name, "entmax"), batch(name), []
    expected = model(**inputs, output_attentions=True)
    with observe_weights(lambda module, weights, *_: seen.append((module, weights))):
        output = model(**inputs)
    model(**inputs)
    names = {module: key for key, module in model.named_modules()}
    assert all("ttention" in names[module] for module, _ in seen)
    if name == "bert":
        for (_, weights), returned in zip(seen, expected.attentions, strict=True):
            torch.testing.assert_close(weights, returned)
    assert len(seen) == (2 if name == "bert" else 6)
    assert all(value is None for key, value in output.items() if "attentions" in key)


def test_weights_are_not_computed_unless_requested(build):
    # So many scores, 1,031 x 1,031 per head, are not computed as one matrix.
    model = build("gpt2", "entmax", n_layer=1, n_positions=1031, n_embd=6)
    with saved_sizes() as sizes:
        model.transformer(torch.randint(0, 37, (1, 1031))).last_hidden_state.sum().backward()
    assert 0 < max(sizes) < 1031 * 1031


def test_half_precision(build, batch):
    inputs = batch("llama")
    expected = build("llama", "entmax")(**inputs).logits
    got = build("llama", "entmax").bfloat16()(**inputs).logits
    assert got.dtype == torch.bfloat16
    kept = real(inputs, expected)
    # A number in bfloat16 has eight significant bits, and the model has two layers.
    assert (got[kept] - expected[kept]).norm() < 0.05 * expected[kept].norm()


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20),
    reason="set_attn_implementation does not reach the parts of T5 before transformers 5.20",
)
def test_implementation_can_be_set_and_set_back(build, batch):
    model, inputs = build("t5", "eager"), batch("t5")
    expected = model(**inputs).logits
    model.set_attn_implementation("sparsemax")
    sparse = model(**inputs).logits
    torch.testing.assert_close(sparse, build("t5", "sparsemax")(**inputs).logits)
    assert not torch.allclose(sparse, expected, atol=1e-2)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Bloom", {"hidden_size": 8, "n_layer": 1, "n_head": 2}),
        ("CodeGen", {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 5, "rotary_dim": 2}),
    ],
)
def test_a_model_without_the_interface_is_refused(name, sizes):
    """Such a model would add the boolean mask to its scores, and every position would see later positions."""
    config = getattr(transformers, f"{name}Config")(vocab_size=7, bos_token_id=1, eos_token_id=2, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="entmax")
    if hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip(f"{name} has the interface in this version of transformers")
    with pytest.raises(ValueError, match=f"must be one that a model of {name}Config supports, .* got 'entmax'"):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long))


def test_sinks_passed_to_a_model_without_sinks_are_refused(build, batch):
    model = build("llama", "entmax")
    with pytest.raises(ValueError, match=r"sinks must be None in sparse attention, got one from LlamaAttention"):
        model(batch("llama")["input_ids"], sinks=torch.zeros(2, 6, 11, 1))


def test_sinks_of_a_wrong_shape_raise_an_error(build, batch):
    model = build("gpt_oss", "entmax")
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"sinks must have shape \(H,\) = \(6,\), got \(5,\)"):
        model(batch("gpt_oss")["input_ids"])


def test_one_of_our_names_can_be_registered_alone(monkeypatch):
    interfaces = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    for interface in interfaces:
        for name in SPARSE:
            monkeypatch.delitem(interface._global_mapping, name)
    register("sparsemax")
    for interface in interfaces:
        assert set(SPARSE) & set(interface._global_mapping) == {"sparsemax"}


def test_an_own_name_with_alpha_two_gives_the_results_of_sparsemax():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    model = transformers.BertModel._from_config(config, attn_implementation="sparsemax").eval()
    ids = torch.arange(3, 14)[None]
    sparse = model(ids).last_hidden_state
    model.set_attn_implementation("entmax15")
    register("two", alpha=2.0)
    assert not torch.equal(model(ids).last_hidden_state, sparse)
    model.set_attn_implementation("two")
    assert torch.equal(model(ids).last_hidden_state, sparse)


def test_a_second_registration_has_no_effect():
    functions = transformers.AttentionInterface._global_mapping
    before = {name: functions[name] for name in SPARSE}
    register()
    assert {name: functions[name] for name in SPARSE} == before
    masks = transformers.AttentionMaskInterface._global_mapping
    assert set(SPARSE) <= set(masks)


@pytest.mark.parametrize(
    ("arguments", "mapping"),
    [
        ({"k": 3}, lambda scores: topk_softmax(scores, 3)),
        ({"alpha": 1.25}, lambda scores: entmax(scores, 1.25)),
        ({"alpha": 2.0, "k": 2}, lambda scores: entmax(keep(scores, 2), 2.0)),
        ({}, lambda scores: entmax(scores, 1.5)),
    ],
)
def test_own_names_can_be_registered(arguments, mapping, build, batch):
    register("mine", **arguments)
    inputs = batch("bert")
    softmax = build("bert", "eager").double()(**inputs, output_attentions=True).attentions[0]
    weights = build("bert", "mine").double()(**inputs, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights, mapping(softmax.log()), rtol=1e-9, atol=1e-12)


def keep(scores: Tensor, k: int) -> Tensor:
    return scores.masked_fill(scores < scores.topk(k).values[..., -1:], -math.inf)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "sdpa"}, ValueError, "name must be a Python identifier that transformers does not use itself"),
        ({"name": "flash_entmax"}, ValueError, "contains neither 'eager', 'sdpa', 'flash' nor 'flex', got 'flash_"),
        ({"name": "top k"}, ValueError, "got 'top k'"),
        ({"name": 3}, TypeError, "name must be a str, got int"),
        ({"alpha": 1.25}, ValueError, "name must be given with alpha or k, got alpha=1.25 and k=None without"),
        ({"name": "wrong", "alpha": 0.0}, ValueError, r"alpha must be in \(0, inf\), got 0.0"),
        ({"name": "wrong", "alpha": "2"}, TypeError, "alpha must be a number, got str"),
        ({"name": "wrong", "alpha": torch.tensor(2.0)}, TypeError, "alpha must be a number, got Tensor"),
        ({"name": "wrong", "k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"name": "wrong", "k": 2.5}, TypeError, "k must be an int, got float"),
    ],
)
def test_invalid_arguments_of_register_raise_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        register(**arguments)
    assert "wrong" not in transformers.AttentionInterface._global_mapping


def test_error_without_transformers_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install sparse-attn\[hf\]"):
        register()
