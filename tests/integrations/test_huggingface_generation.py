"""Generation: caches, padding, drafts and compilation do not change the tokens.

A quantized cache can change the tokens. At α = 1, the tokens then equal those of eager attention with this cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from old_torch import since_torch
from torch import Tensor
from torch._dynamo.utils import counters

from sparse_attn.integrations.huggingface import add_alpha, register
from sparse_attn.observe import observe_weights

transformers = pytest.importorskip("transformers")

FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gemma3", "gpt_oss", "mixtral", "qwen3_5", "mllama", "t5", "bart"]
ENCODED = ["t5", "bart"]
# Two models cannot use drafts. The linear attention of qwen3_5 keeps a state, which cannot be restored if a draft is
# rejected. For mllama, transformers makes a mask that does not fit the number of keys, even for its own attention.
DRAFTED = [name for name in FAMILIES if name not in ("qwen3_5", "mllama")]
DECODERS = [name for name in FAMILIES if name not in (*ENCODED, "mllama")]
QUANTIZED = ["gpt2", "llama", "qwen3", "mixtral", "opt"]  # transformers quantizes the cache of full attention only
QUANTIZED_BY = {"fp8": {}, "quanto": {"nbits": 4, "q_group_size": 4, "residual_length": 2}}
NEW = 6


def prompts(name: str) -> list[dict[str, Tensor]]:
    """Two inputs of different lengths."""
    generator = torch.Generator().manual_seed(11)
    found = [{"input_ids": torch.randint(3, 37, (1, length), generator=generator)} for length in (11, 8)]
    if name == "mllama":
        for prompt in found:
            prompt["input_ids"][0, 1] = 37  # the image
            prompt["pixel_values"] = torch.randn(1, 1, 1, 3, 8, 8, generator=generator)
            prompt |= {"aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long)}
            prompt |= {"aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long)}
            seen = torch.ones(1, prompt["input_ids"].shape[1], 1, 1, dtype=torch.long)
            seen[:, :1] = 0
            prompt["cross_attention_mask"] = seen
    return found


def batch(name: str) -> dict[str, Tensor]:
    """Both inputs as one batch, padded on the left, or on the right for an encoder."""
    side = (0, 3) if name in ENCODED else (3, 0)
    first, second = prompts(name)
    ids = [first["input_ids"], torch.nn.functional.pad(second["input_ids"], side)]
    masks = [torch.ones_like(first["input_ids"]), torch.nn.functional.pad(torch.ones_like(second["input_ids"]), side)]
    both = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
    for key in set(first) - {"input_ids"}:
        rows = first[key], second[key]
        if key == "cross_attention_mask":
            rows = first[key], torch.nn.functional.pad(second[key], (0, 0, 0, 0, *side))
        both[key] = torch.cat(rows)
    return both


def written(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    """The generated tokens, for an encoder-decoder with the start token."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    tokens = model.generate(**inputs, **settings)
    return tokens if model.config.is_encoder_decoder else tokens[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_with_a_cache_equals_single_prompts_without(name, how, build):
    model = build(name, "entmax")
    expected = [written(model, prompt, use_cache=False, **how) for prompt in prompts(name)]
    assert torch.equal(written(model, batch(name), **how), torch.cat(expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_with_a_cache_draws_the_same_tokens(name, build):
    model, drawn = build(name, "topk"), []
    for use_cache in (True, False):
        torch.manual_seed(13)
        drawn.append(written(model, prompts(name)[0], do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", DRAFTED)
def test_assisted_generation_equals_greedy_decoding(name, build):
    if name in ("gemma2", "gemma3") and transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 makes a mask that does not fit the number of keys; its own attention fails too")
    model, prompt = build(name, "entmax"), prompts(name)[0]
    expected = written(model, prompt)
    assistant = build(name, "sparsemax")
    with torch.no_grad():  # noise, so that the drafts of the assistant are often right, but not always
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    assert torch.equal(written(model, prompt, assistant_model=assistant), expected)
    if name not in ENCODED:
        assert torch.equal(written(model, prompt, prompt_lookup_num_tokens=2), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_cache_gives_the_result_of_a_dynamic_cache(name, build):
    if name == "mllama":
        pytest.skip("mllama has no static cache")
    model, both = build(name, "entmax"), batch(name)
    static = written(model, both, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, written(model, both))


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_cache_gives_the_tokens_of_eager_attention_with_that_cache(name, backend, build):
    if backend == "quanto":
        pytest.importorskip("optimum.quanto")
    elif not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no cache of 8 bits")
    register("dense", alpha=1.0)
    cache = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **QUANTIZED_BY[backend]}}
    model, both = build(name, "entmax"), batch(name)
    fast = written(model, both, **cache)
    with observe_weights(lambda *_: None):  # for an observer, torch's own operations compute the weights as one matrix
        assert torch.equal(fast, written(model, both, **cache))
    assert torch.equal(written(build(name, "dense"), both, **cache), written(build(name, "eager"), both, **cache))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_continuing_from_a_cache_gives_the_result_of_one_generation(name, masked, build):
    model, prompt = build(name, "entmax"), prompts(name)[0]
    expected = written(model, prompt, max_new_tokens=NEW, use_cache=False)
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(**prompt, max_new_tokens=2, **how)
    more = {"attention_mask": torch.ones_like(first.sequences)} if masked else {}
    cache = "cache" if "cache" in first else "past_key_values"  # the second name is used up to transformers 5.23
    more[cache] = first[cache]
    rest = model.generate(first.sequences, max_new_tokens=NEW - 2, **how, **more)
    assert torch.equal(rest.sequences[:, 11:], expected)


def test_text_attends_to_the_image_with_the_mapping(build):
    model, prompt = build("mllama", "entmax"), prompts("mllama")[0]
    seen: list[Tensor] = []
    with observe_weights(lambda module, weights, *_: seen.append(weights)):
        logits = model(**prompt).logits
    # The text model has 3 layers, and the image model too.
    assert sum(bool((weights == 0).any()) for weights in seen) == len(seen) == 6
    prompt["pixel_values"] = prompt["pixel_values"].flip(-1)
    assert not torch.allclose(model(**prompt).logits, logits, atol=1e-3)


def test_continuous_batching_is_refused_before_it_begins(build):
    # For continuous batching, transformers accepts only its own attention. The error must leave the model unchanged.
    model, ids = build("llama", "entmax"), prompts("llama")[0]["input_ids"]
    before, changed = model(ids).logits, ids.clone()
    changed[:, 5:] = 7
    settings = transformers.GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    with pytest.raises(ValueError, match=r"entmax.* is not supported") as error:
        model.generate_batch([ids[0].tolist()], generation_config=settings)
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == "entmax"
    assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(model(changed).logits[:, :5], before[:, :5])


def test_a_paged_cache_is_refused(build):
    layer, (query, key, value) = build("llama", "entmax").model.layers[0].self_attn, torch.randn(3, 2, 3, 11, 8)
    attend = transformers.AttentionInterface()["entmax"]
    with pytest.raises(ValueError, match=r"cache must be None in sparse attention, got one .* \(the paged cache"):
        attend(layer, query, key, value, None, cache=object())


# torch itself causes this warning while it compiles an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@since_torch(
    2, 9, "a model of transformers is compiled again after eager calls (torch 2.8), or is refused (older ones)"
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # no sliding cache; with one, each length is compiled
def test_compiled_generation_is_compiled_once(name, build):
    model = build(name, "entmax")
    alphas = add_alpha(model, alpha_init=1.3)
    settings = transformers.CompileConfig(fullgraph=True, backend="aot_eager", dynamic=False, mode="default")
    settings._compile_all_devices = True
    both = {key: value[:, 3:] for key, value in batch(name).items()}

    def compiled(length: int) -> Tensor:
        inputs = {key: value[:, -length:] for key, value in both.items()}
        how = {"cache_implementation": "static", "compile_config": settings, "max_new_tokens": 12 - length}
        return written(model, inputs, **how)

    torch.compiler.reset()
    counters.clear()
    for length in (8, 8, 6, 4):
        with observe_weights(lambda *_: None):  # eager calls in between must not cause a compilation
            expected = written(model, {key: x[:, -length:] for key, x in both.items()}, max_new_tokens=12 - length)
        assert torch.equal(compiled(length), expected)
        assert counters["stats"]["unique_graphs"] == 1, length
        with torch.no_grad():  # α changes, as in training
            for alpha in alphas.values():
                alpha.raw_alpha += 0.1
    torch.compiler.reset()
