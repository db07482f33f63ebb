"""A learnt α per head in transformers models: α is added, trained and removed.

Models that cannot have α, and wrong arguments, are refused.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from old_torch import since_torch
from torch import Tensor

from sparse_attn import alpha_per_head
from sparse_attn.integrations.huggingface import add_alpha, load_alpha, remove_alpha
from sparse_attn.nn.alpha import HeadAlpha

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", {"bert.encoder.layer.0.attention.self": 3, "bert.encoder.layer.1.attention.self": 3}),
        ("modernbert", {f"model.layers.{layer}.attn": 3 for layer in range(3)}),
        ("gpt2", {"transformer.h.0.attn": 3, "transformer.h.1.attn": 3}),
        ("llama", {"model.layers.0.self_attn": 6, "model.layers.1.self_attn": 6}),
        ("vit", {"vit.layers.0.attention": 3, "vit.layers.1.attention": 3}),
        ("albert", {"albert.encoder.albert_layer_groups.0.albert_layers.0.attention": 3}),  # one layer, called twice
        (
            "t5",
            {f"encoder.block.{layer}.layer.0.SelfAttention": 3 for layer in range(2)}
            | {f"decoder.block.{layer}.layer.0.SelfAttention": 3 for layer in range(2)}
            | {f"decoder.block.{layer}.layer.1.EncDecAttention": 3 for layer in range(2)},
        ),
        (
            "bart",
            {f"model.encoder.layers.{layer}.self_attn": 3 for layer in range(2)}
            | {f"model.decoder.layers.{layer}.self_attn": 2 for layer in range(2)}
            | {f"model.decoder.layers.{layer}.encoder_attn": 2 for layer in range(2)},
        ),
    ],
)
def test_every_head_has_an_alpha_with_a_gradient(name, heads, build, batch):
    model = build(name, "entmax")
    expected = model(**batch(name)).logits
    added = add_alpha(model)
    assert {key: alpha.num_heads for key, alpha in added.items()} == heads
    output = model(**batch(name)).logits
    torch.testing.assert_close(output, expected)  # the initial α is 1.5
    output.square().sum().backward()
    for key, alpha in added.items():
        assert model.get_submodule(key).sparse_alpha is alpha
        assert (alpha.raw_alpha.grad != 0).all()


def test_gradients_of_alpha_equal_finite_differences(build, batch):
    model = build("gpt2", "entmax").double()
    inputs = batch("gpt2")
    alphas = [alpha.raw_alpha for alpha in add_alpha(model, alpha_init=1.3).values()]
    assert {alpha.dtype for alpha in alphas} == {torch.float32}
    model.double()
    assert {alpha.dtype for alpha in alphas} == {torch.float64}
    upstream = torch.randn(2, 11, 37, dtype=torch.double)
    loss = lambda: (model(**inputs).logits * upstream).sum()  # noqa: E731
    loss().backward()
    for alpha in alphas:
        for head in range(3):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    alpha[head] += step
                    values.append(loss().item())
                    alpha[head] -= step
            torch.testing.assert_close(alpha.grad[head].item(), (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def test_alpha_one_keeps_a_dense_model_and_can_leave_the_bound(build, batch):
    inputs, dense = batch("bert"), build("bert", "eager")
    model = build("bert", "entmax")
    alphas = add_alpha(model, alpha_init=1.0)
    output = model(**inputs).logits
    torch.testing.assert_close(output, dense(**inputs).logits, rtol=1e-5, atol=2e-5)
    optimizer = torch.optim.SGD([alpha.raw_alpha for alpha in alphas.values()], lr=1e-2)
    # One step on the loss and one on its negative. The two gradients of a head differ, so the steps do not cancel; in
    # this model, α of the first layer ends above its bound.
    for sign in (1, -1):
        optimizer.zero_grad()
        (sign * model(**inputs).logits.square().sum()).backward()
        optimizer.step()
    assert any((alpha.alpha > 1).any() for alpha in alphas.values())
    assert all((alpha.alpha >= 1).all() for alpha in alphas.values())


def test_only_selected_modules_get_alpha_with_their_initial_values(build):
    model = build("bart", "entmax")
    chosen = add_alpha(model, alpha_init=[1.25, 1.75], filter_fn=lambda name, _: name.endswith("encoder_attn"))
    assert list(chosen) == ["model.decoder.layers.0.encoder_attn", "model.decoder.layers.1.encoder_attn"]
    assert list(alpha_per_head(model)) == list(chosen)
    for values in alpha_per_head(model).values():
        assert values.tolist() == [1.25, 1.75]


def test_a_second_call_has_no_effect(build):
    model = build("gpt2", "entmax")
    first = add_alpha(model, alpha_init=1.25)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    second = add_alpha(model, alpha_init=1.75)
    assert list(second) == list(first)
    assert all(second[name] is alpha for name, alpha in first.items())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_removal_restores_the_model(build, batch, with_alpha):
    model, inputs = build("bert", "eager"), batch("bert")
    before, keys = model(**inputs).logits, list(model.state_dict())
    config = model.config.to_dict()
    model.set_attn_implementation("entmax")
    with_alpha(model)
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
    remove_alpha(model)
    model.set_attn_implementation("eager")
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(ValueError, match="model must have a learnt α from add_alpha, got BertForMaskedLM without"):
        remove_alpha(model)


def test_alpha_is_copied_and_pickled(build, batch, with_alpha):
    model, inputs = with_alpha(build("gpt2", "entmax")), batch("gpt2")
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected)


def test_half_precision_models_have_alpha_in_float32(build, batch, with_alpha):
    before, after = with_alpha(build("llama", "entmax")), build("llama", "entmax").bfloat16()
    values = list(alpha_per_head(before).values())
    before.bfloat16()
    add_alpha(after)
    for model in (before, after):
        model(**batch("llama")).logits.float().square().sum().backward()
        for name in alpha_per_head(model):
            raw = model.get_submodule(name).sparse_alpha.raw_alpha
            assert raw.dtype == raw.grad.dtype == torch.float32
            assert (raw.grad != 0).any()
    assert all(torch.equal(got, want) for got, want in zip(alpha_per_head(before).values(), values, strict=True))


def test_activation_checkpointing_gives_the_same_gradients(build, batch, with_alpha):
    inputs, gradients = batch("llama"), []
    for checkpointed in (False, True):
        model = with_alpha(build("llama", "entmax")).train()
        torch.manual_seed(7)
        for name, parameter in model.named_parameters():
            if name.endswith("raw_alpha"):
                torch.nn.init.uniform_(parameter, 1.1, 1.9)
        if checkpointed:
            renamed = hasattr(model, "activation_checkpointing_enable")  # as in transformers 5.23
            model.activation_checkpointing_enable() if renamed else model.gradient_checkpointing_enable()
        model(**inputs).logits.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# A warning of torch itself while it compiles an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@since_torch(2, 8, "the compiler refuses the models of transformers, dense ones too")
def test_compiled_models_have_gradients_for_alpha(build, batch):
    model, inputs = build("gpt2", "entmax", n_layer=1), {"input_ids": batch("gpt2")["input_ids"], "use_cache": False}
    (alpha,) = add_alpha(model).values()
    expected = model(**inputs).logits
    (wanted,) = torch.autograd.grad(expected.square().sum(), alpha.raw_alpha)
    got = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), alpha.raw_alpha)[0], wanted)


def test_models_offloaded_by_accelerate_can_have_alpha(build, batch):
    accelerate = pytest.importorskip("accelerate")
    expected = build("llama", "entmax")(**batch("llama")).logits
    model = accelerate.cpu_offload(build("llama", "entmax"), execution_device="cpu")
    alphas = add_alpha(model)
    assert next(model.model.layers[0].self_attn.parameters()).is_meta
    assert {alpha.raw_alpha.device.type for alpha in alphas.values()} == {"cpu"}
    torch.testing.assert_close(model(**batch("llama")).logits, expected)


def test_parts_of_a_model_with_another_attn_implementation_get_no_alpha():
    text = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    image = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 15, "patch_size": 5}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image))
    model.set_attn_implementation({"text_config": "entmax"})
    assert list(add_alpha(model)) == ["text_model.encoder.layers.0.self_attn"]
    model.set_attn_implementation("entmax")
    assert [alpha.num_heads for alpha in add_alpha(model).values()] == [3, 2]


def losses_of(model, text: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of predicting the next character, with batches of 8 passages."""
    losses = []
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        starts = torch.randint(len(text) - 33, (8,), generator=generator)
        passages = torch.stack([text[start : start + 33] for start in starts])
        logits = model(passages[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), passages[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fine_tuning_on_real_text_moves_alpha(tmp_path):
    # Training is first dense, then sparse.
    prose = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    letters = sorted(set(prose))
    text = torch.tensor([letters.index(letter) for letter in prose])
    config = transformers.LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    dense = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    before = losses_of(dense, text, torch.optim.AdamW(dense.parameters(), lr=1e-2), 60)
    dense.save_pretrained(tmp_path)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="entmax")
    alphas = [alpha.raw_alpha for alpha in add_alpha(model, alpha_init=1.0).values()]
    rest = [parameter for parameter in model.parameters() if all(parameter is not alpha for alpha in alphas)]
    groups = [{"params": rest}, {"params": alphas, "lr": 3e-2, "weight_decay": 0.0}]
    after = losses_of(model.train(), text, torch.optim.AdamW(groups, lr=1e-2), 60)

    def level(losses: list[float]) -> float:
        return sum(losses) / len(losses)

    assert level(after[:5]) < level(before[-20:]) + 0.3  # training continues from the loss of the dense model
    assert level(after[-20:]) < level(before[-20:]) - 0.1
    values = torch.cat(list(alpha_per_head(model).values()))
    assert ((values >= 1) & (values <= 2)).all()
    assert (values > 1.05).sum() >= 2
    weights = model.eval()(text[: 8 * 64].view(8, 64), output_attentions=True).attentions
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    assert any((layer[..., causal] == 0).any() for layer in weights)


def refused_models(build):
    return {
        "linear": torch.nn.Linear(2, 3),
        "sdpa": build("bert", "sdpa"),
        "sparsemax": build("bert", "sparsemax"),
        "no interface": transformers.BloomModel(
            transformers.BloomConfig(vocab_size=37, hidden_size=24, n_head=3, n_layer=1)
        ),
    }


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("linear", TypeError, "model must be a transformers.PreTrainedModel, got Linear"),
        (
            "sdpa",
            ValueError,
            r"must have attn_implementation 'entmax', got 'sdpa'; call register\(\) and model.set_att",
        ),
        ("sparsemax", ValueError, r"got 'sparsemax'; call .* model.set_attn_implementation\(\"entmax\"\) first"),
        ("no interface", ValueError, "through transformers' attention interface, got no such module in BloomModel"),
    ],
)
def test_models_that_cannot_learn_alpha_are_refused(name, error, message, build, tmp_path):
    model = refused_models(build)[name]
    with pytest.raises(error, match=message):
        add_alpha(model)
    with pytest.raises(error, match=message):
        load_alpha(model, tmp_path)
    assert not alpha_per_head(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"filter_fn": lambda name, module: False},
            ValueError,
            "filter_fn must accept at least one .* got none of bert",
        ),
        (
            {"filter_fn": "layer.0"},
            TypeError,
            "filter_fn must be a function of name and module, or None, got 'layer.0'",
        ),
        ({"alpha_range": (2.0, 1.0)}, ValueError, r"alpha_range must be \(low, high\) with 0 < low < high"),
        ({"alpha_range": 2.0}, TypeError, "alpha_range must be two numbers"),
        ({"alpha_init": 2.5}, ValueError, r"alpha_init must be in alpha_range \[1, 2\], got 2.5"),
        (
            {"alpha_init": [1.0, 1.5]},
            ValueError,
            r"alpha_init must be a number or one per head \(3,\), got shape \(2,\)",
        ),
    ],
)
def test_wrong_arguments_change_nothing(arguments, error, message, build):
    model = build("bert", "entmax")
    keys, config = list(model.state_dict()), model.config.to_dict()
    with pytest.raises(error, match=message):
        add_alpha(model, **arguments)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config


def test_a_second_range_is_refused(build):
    model = build("bert", "entmax")
    add_alpha(model, filter_fn=lambda name, module: ".0." in name)
    with pytest.raises(
        ValueError, match=r"alpha_range must be the one that the model has, \(1.0, 2.0\), got \(1.0, 4.0\)"
    ):
        add_alpha(model, alpha_range=(1.0, 4.0))
    assert len(alpha_per_head(model)) == 1


def test_a_model_on_the_meta_device_is_refused(build):
    model = build("gpt2", "entmax").to("meta")
    with pytest.raises(ValueError, match=r"model must have its weights, got 'transformer.h.0.attn' on the meta device"):
        add_alpha(model)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*tensor creation functions .* are deprecated:UserWarning")
def test_quantised_projections_are_refused(build, batch):
    model = torch.ao.quantization.quantize_dynamic(build("bert", "entmax"), {torch.nn.Linear}, dtype=torch.qint8)
    expected = model(**batch("bert")).logits
    message = r"weights in parameters, got 'bert.encoder.layer.0.attention.self' of BertSelfAttention without para"
    with pytest.raises(ValueError, match=message):
        add_alpha(model)
    assert not alpha_per_head(model)
    assert torch.equal(model(**batch("bert")).logits, expected)


def test_a_module_without_a_number_of_heads_is_refused(build):
    model = build("bert", "entmax")
    first = model.bert.encoder.layer[0].attention.self
    del first.num_attention_heads
    first.config = transformers.PreTrainedConfig(attn_implementation="entmax")
    with pytest.raises(
        ValueError, match=r"got 'bert\.encoder\.layer\.0\.attention\.self' of BertSelfAttention without"
    ):
        add_alpha(model)
    assert not alpha_per_head(model)
    assert len(add_alpha(model, filter_fn=lambda name, module: module is not first)) == 1


def test_error_without_transformers_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install sparse-attn\[hf\]"):
        add_alpha(torch.nn.Linear(2, 3))


def test_head_alpha_is_a_bounded_float32_parameter():
    alpha = HeadAlpha(3, alpha_init=[1.0, 1.5, 2.0]).bfloat16()
    assert alpha.num_heads == 3
    assert alpha.raw_alpha.dtype == torch.float32
    with torch.no_grad():
        alpha.raw_alpha += torch.tensor([-1.0, 0.1, 1.0])
    assert alpha.alpha.tolist() == pytest.approx([1.0, 1.6, 2.0])
