"""Hugging Face models with an attention implementation of this library are recorded; other models are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_attn.analysis import record_attention
from sparse_attn.integrations.huggingface import add_alpha, register

transformers = pytest.importorskip("transformers")

N, L, H, E = 3, 7, 2, 22


def build(kind: str, implementation: str) -> nn.Module:
    register()
    sizes = {"vocab_size": 23, "attn_implementation": implementation}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=E, n_head=H, n_layer=2, n_positions=11, **sizes)
    else:
        config = transformers.BertConfig(
            hidden_size=E, num_attention_heads=H, num_hidden_layers=2, intermediate_size=13, **sizes
        )
    return transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()


def traces(model: nn.Module) -> list[list[tuple[str, int]]]:
    """The names of the attributes of every module, and the sizes of the dictionaries among them (such as hooks)."""
    return [
        sorted((name, len(value) if isinstance(value, dict) else 0) for name, value in vars(module).items())
        for module in model.modules()
    ]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_density_counts_only_visible_pairs_of_a_huggingface_model(kind: str) -> None:
    model = build(kind, "entmax")
    add_alpha(model, alpha_init=1.0)
    padding = (torch.arange(L) < torch.tensor([[L], [4], [2]])).long()
    tokens = torch.randint(23, (N, L))
    with torch.no_grad(), record_attention(model) as record:
        model(tokens, attention_mask=padding)
        model(tokens[:, :5])
    assert len(record) == 2
    for heads in record.values():
        assert heads.alpha is not None and heads.alpha.tolist() == [1.0] * H
        assert heads.density.tolist() == [1.0] * H
        assert heads.rows.tolist() == [N * (L + 5)] * H
        first = sum(min(query + 1, real) if kind == "gpt2" else real for real in (L, 4, 2) for query in range(L))
        second = N * (15 if kind == "gpt2" else 25)
        torch.testing.assert_close(heads.support_size, torch.full((H,), (first + second) / (N * (L + 5))))


def test_no_hooks_remain_and_outputs_are_equal() -> None:
    model = build("bert", "sparsemax")
    tokens = torch.randint(23, (N, L))
    expected = model(tokens).last_hidden_state
    before = traces(model)
    with record_attention(model) as record:
        torch.testing.assert_close(model(tokens).last_hidden_state, expected)
    assert traces(model) == before
    assert [heads.rows.tolist() for heads in record.values()] == [[N * L] * H] * 2


@pytest.mark.parametrize(
    ("implementation", "alpha"), [("entmax", 1.5), ("entmax15", 1.5), ("sparsemax", 2.0), ("topk", 1.0)]
)
@pytest.mark.parametrize("learnt", [False, True])
def test_recorded_alpha_is_the_alpha_in_use(implementation: str, alpha: float, learnt: bool) -> None:
    model = build("bert", implementation)
    if learnt:  # a learnt α has an effect only in the implementation "entmax"
        model.set_attn_implementation("entmax")
        add_alpha(model, alpha_init=[1.25, 1.75])
        model.set_attn_implementation(implementation)
    with record_attention(model) as record:
        model(torch.randint(23, (N, L)))
    expected = [1.25, 1.75] if learnt and implementation == "entmax" else [alpha] * H
    assert len(record) == 2
    for heads in record.values():
        assert heads.alpha is not None and heads.alpha.tolist() == expected


def test_a_model_with_another_attn_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="attn_implementation of this library"):
        record_attention(build("bert", "sdpa"))


def test_a_model_that_ignores_attn_implementation_is_refused() -> None:
    register()
    config = transformers.BloomConfig(vocab_size=23, hidden_size=E, n_layer=1, n_head=H)
    model = transformers.AutoModel.from_config(config, attn_implementation="entmax")
    assert model.config._attn_implementation == "entmax"
    with pytest.raises(ValueError, match="of this library, such as 'entmax'; got BloomModel, which"):
        record_attention(model)
