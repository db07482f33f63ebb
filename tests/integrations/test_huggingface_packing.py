"""Packed sequences in transformers give the values of separate sequences, without a mask of the scores' size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import saved_sizes
from old_torch import since_torch
from torch import Tensor

from sparse_attn.integrations.huggingface import register
from sparse_attn.integrations.huggingface.packing import LazyMask
from sparse_attn.observe import observe_weights

transformers = pytest.importorskip("transformers")

DECODERS = ["gpt2", "opt", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss"]
LENGTHS = (7, 1, 11, 3)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 37, (length,), generator=generator) for length in LENGTHS]


def packed(*, cumulative: bool = False, positions: bool = True) -> dict[str, Any]:
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=cumulative, return_position_ids=positions
    )
    inputs = collator([{"input_ids": ids.tolist()} for ids in sequences()])
    inputs.pop("labels")
    return inputs


def one_by_one(model: Any) -> Tensor:
    return torch.cat([model(input_ids=ids[None]).logits for ids in sequences()], 1)


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logits * torch.linspace(-9, 9, logits.numel()).sin().view(logits.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def masks_computed(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the lazy masks that were computed."""
    shapes: list[tuple[int, ...]] = []
    dense = LazyMask.dense
    monkeypatch.setattr(LazyMask, "dense", lambda mask: shapes.append(tuple(mask.shape)) or dense(mask))
    return shapes


@pytest.mark.parametrize("inputs", [{}, {"cumulative": True}], ids=["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("implementation", ["entmax", "topk"])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences_equal_separate_sequences(name, implementation, cache, inputs, build, masks_computed):
    model = build(name, implementation)
    got = model(**packed(**inputs), use_cache=cache).logits
    assert not masks_computed
    expected = one_by_one(model)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    wanted = gradients(model, expected)
    largest = max(x.abs().max() for x in wanted.values()).item()
    for key, gradient in gradients(model, got).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4 * largest, msg=key)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "positions",
    [[0, 0, 1, 1, 2, 2, 3], [0, 2, 4, 6, 8, 10, 12], [3, 4, 5, 0, 1, 2, 3], [1, 1, 1, 0, 1, 2, 3]],
    ids=["repeated", "strided", "not from 0", "padded"],
)
def test_position_ids_that_are_not_packed_mean_the_same_as_in_eager_attention(positions, cache, masked, build):
    register("dense", alpha=1.0)
    inputs = {"input_ids": torch.arange(5, 12)[None], "position_ids": torch.tensor([positions]), "use_cache": cache}
    if masked:
        inputs["attention_mask"] = torch.ones(1, 7, dtype=torch.long)
    got, expected = (build("llama", name)(**inputs).logits for name in ("dense", "eager"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_sequences_equal_a_padded_batch_in_training(name, build):
    model, width = build(name, "entmax").train(), max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids))) for ids in sequences()])
    kept = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    padded = model(input_ids=ids, attention_mask=kept.long(), use_cache=False).logits[kept]
    got = model(**packed(), use_cache=False).logits[0]
    torch.testing.assert_close(got, padded, rtol=1e-4, atol=1e-4)


def test_each_row_of_a_batch_is_packed_separately(build):
    model, ids = build("mistral", "entmax"), torch.cat(sequences())
    rows, positions = torch.stack([ids, ids.flip(0)]), packed()["position_ids"]
    second = torch.cat([torch.arange(5), torch.arange(17)])[None]
    got = model(input_ids=rows, position_ids=torch.cat([positions, second]), use_cache=False).logits
    torch.testing.assert_close(got[:1], one_by_one(model), rtol=1e-4, atol=1e-4)
    parts = [model(input_ids=part[None]).logits[0] for part in rows[1].split([5, 17])]
    torch.testing.assert_close(got[1], torch.cat(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_returned_weights_are_within_sequences(name, build):
    model, owners = build(name, "entmax"), torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    seen: list[Tensor] = []
    with observe_weights(lambda module, weights, *_: seen.append(weights)):
        output = model(**packed(cumulative=True), output_attentions=True)
    torch.testing.assert_close(output.logits, one_by_one(model), rtol=1e-4, atol=1e-4)
    for weights in (*output.attentions, *seen):
        assert (weights[..., owners[:, None] != owners] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_cu_seq_lens_alone_keep_sequences_apart_also_in_encoders(build):
    for name in ("bert", "gpt2"):
        model, ids = build(name, "entmax"), torch.cat(sequences())[None]
        lengths = {key: value for key, value in packed(cumulative=True).items() if "seq_lens" in key}
        changed = ids.clone()
        changed[:, :7] = torch.randint(3, 37, (1, 7))  # in a causal model, only earlier tokens can have an effect
        before, after = model(input_ids=ids, **lengths).logits, model(input_ids=changed, **lengths).logits
        torch.testing.assert_close(before[:, 7:], after[:, 7:])
        assert not torch.allclose(before[:, :7], after[:, :7])


def test_lengths_are_combined_with_a_given_mask(build):
    model, inputs = build("llama", "entmax"), packed(cumulative=True)
    mask = torch.ones(22, 22, dtype=torch.bool).tril()[None, None]
    expected = one_by_one(model)
    for written in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        torch.testing.assert_close(model(**inputs, attention_mask=written).logits, expected, rtol=1e-4, atol=1e-4)


def test_no_tensor_of_the_size_of_the_scores_is_kept(build):
    model = build("mistral", "entmax", num_hidden_layers=1, sliding_window=300)
    length = 1031
    positions = torch.cat([torch.arange(500), torch.arange(531)])[None]
    with saved_sizes() as sizes:
        model.model(torch.randint(3, 37, (1, length)), position_ids=positions, use_cache=False)[0].sum().backward()
    assert 0 < max(sizes) < length * length


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_models_can_use_a_lazy_mask_as_an_ordinary_mask(name, build, masks_computed):
    # Modules that read a lazy mask get the entries of an ordinary mask.
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    model = build(name, "entmax")
    embedded = torch.randn(2, 11, 24)
    for create in (create_causal_mask, create_sliding_window_causal_mask):
        for positions in (None, torch.cat([torch.arange(4), torch.arange(7)])[None]):
            # Arguments are passed by position, because transformers 5.24 renamed them.
            arguments = (model.config, embedded, None, None, positions)
            mask = create(*arguments)
            model.config._attn_implementation = "eager"
            expected = create(*arguments) == 0
            model.config._attn_implementation = "entmax"
            if mask is None:  # without packed sequences, modules apply `is_causal`
                assert create is create_causal_mask and positions is None
                continue
            assert isinstance(mask, LazyMask) and not masks_computed and mask.dtype == torch.bool
            assert "LazyMask" in repr(mask) and mask.shape == (2, 1, 11, 11)
            assert torch.equal(mask & True, expected) and torch.equal(mask[:, :, :3], expected[:, :, :3])
            assert masks_computed
            masks_computed.clear()


def test_compiled_layers_take_a_lazy_mask(build):
    model, inputs = build("mistral", "entmax"), packed()
    expected = model(**inputs, use_cache=False).logits
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    with torch.no_grad():
        got = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@since_torch(2, 8, "the compiler refuses the models of transformers, dense ones too")
def test_a_compiled_model_separates_packed_sequences(build):
    model, inputs = build("mistral", "entmax"), packed()
    expected = one_by_one(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, build):
    model = build("mistral", "entmax").train()
    wanted = gradients(model, model(**packed(), use_cache=False).logits)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for key, gradient in gradients(model, model(**packed(), use_cache=False).logits).items():
        torch.testing.assert_close(gradient, wanted[key], msg=key)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ({"cu_seq_lens_q": [0, 22]}, ValueError, "cu_seq_lens_q and cu_seq_lens_k must be given together"),
        (
            {"cu_seq_lens_q": [0, 9], "cu_seq_lens_k": [0, 22]},
            ValueError,
            "cu_seq_lens_q must end with the total length",
        ),
        ({"cu_seq_lens_q": [0, 22], "cu_seq_lens_k": [1, 22]}, ValueError, "cu_seq_lens_k must begin with 0, got 1"),
        ({"cu_seq_lens_q": [0, 22], "cu_seq_lens_k": [0, 4, 22]}, ValueError, "must be equal in causal attention"),
        ({"cu_seq_lens_q": [0.0, 22.0], "cu_seq_lens_k": [0, 22]}, TypeError, "cu_seq_lens_q must be a tensor"),
    ],
)
def test_wrong_lengths_raise_an_error(lengths, error, message, build):
    ids = torch.cat(sequences())[None]
    with pytest.raises(error, match=message):
        build("llama", "entmax")(input_ids=ids, **{name: torch.tensor(values) for name, values in lengths.items()})
