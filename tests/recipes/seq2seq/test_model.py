"""The seq2seq transformer: attention, positions, padding, future tokens, a cache, embeddings, invalid arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.seq2seq.attention import ATTENTION_KINDS, attention_factory
from recipes.seq2seq.model import POSITIONS, Seq2SeqTransformer, sinusoids
from sparse_attn import (
    NAPE,
    AdaptiveSparseMultiheadAttention,
    ALiBi,
    RotaryPositions,
    TopKMultiheadAttention,
    alpha_per_head,
)

N, S, T, SOURCE, TARGET = 3, 7, 5, 11, 13
PLACES = ("encoder_attention", "decoder_attention", "cross_attention")
ALPHA = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0, "entmax": 1.25, "adaptive": 1.25}


def model_of(kind: str | None = None, **kwargs: Any) -> Seq2SeqTransformer:
    """A small float64 model in eval mode, with attention of one kind everywhere."""
    kinds = {} if kind is None else dict.fromkeys(PLACES, kind)
    sizes = {"dim": 22, "num_heads": 2, "ff_dim": 17, "alpha": 1.25, "k": 2}
    return Seq2SeqTransformer(SOURCE, TARGET, **{**sizes, **kinds, **kwargs}).double().eval()


def ids() -> tuple[Tensor, Tensor]:
    """Source and target ids; the first row has no padding, the others have some."""
    source, target = torch.randint(4, SOURCE, (N, S)), torch.randint(4, TARGET, (N, T))
    target[:, 0] = 1
    source[1, 4:] = source[2, 1:] = 0
    target[1, 3:] = target[2, 2:] = 0
    return source, target


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_every_kind_in_every_place_builds_and_has_gradients(kind: str, place: str) -> None:
    model = model_of(**{place: kind}).train()
    source, target = ids()
    logits = model(source, target)
    assert logits.shape == (N, T, TARGET)
    logits[target != 0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
    name = {
        "encoder_attention": "encoder.layers.{}.self_attn",
        "decoder_attention": "decoder.layers.{}.self_attn",
    }
    chosen = [model.get_submodule(name.get(place, "decoder.layers.{}.multihead_attn").format(i)) for i in (0, 1)]
    for layer in chosen:
        if kind == "topk":
            assert isinstance(layer, TopKMultiheadAttention) and layer.k == 2
        else:
            assert isinstance(layer, AdaptiveSparseMultiheadAttention)
            assert layer.alpha.tolist() == [ALPHA[kind]] * 2
            assert (layer.raw_alpha is not None) == (kind == "adaptive")
    others = {id(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)} - {id(m) for m in chosen}
    assert len(others) == 4
    assert (
        sum(id(m) in others and getattr(m, "raw_alpha", None) is not None for m in model.modules()) == 4
    )  # adaptive attention is the default


def test_attention_modules_have_the_names_that_reports_rely_on() -> None:
    assert list(alpha_per_head(model_of(encoder_layers=1, decoder_layers=2))) == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]


def test_a_factory_passes_on_its_arguments() -> None:
    for kind in ATTENTION_KINDS:
        layer = attention_factory(kind)(22, 2, dropout=0.3, batch_first=True)
        assert (layer.embed_dim, layer.num_heads, layer.dropout, layer.batch_first) == (22, 2, 0.3, True)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_ids_and_embeddings_at_padding_do_not_change_real_outputs(kind: str) -> None:
    model = model_of(kind)
    source, target = ids()
    expected = model(source, target)[target != 0]
    with torch.no_grad():
        for embedding in (model.source_embedding, model.target_embedding):
            embedding.tokens.weight[0] = 100 * torch.randn(22)
    torch.testing.assert_close(model(source, target)[target != 0], expected, rtol=0, atol=1e-12)
    other = torch.where(target == 0, torch.randint_like(target, 4, TARGET), target)
    torch.testing.assert_close(model(source, other)[target != 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_more_padding_does_not_change_real_outputs(kind: str) -> None:
    model = model_of(kind)
    source, target = ids()
    expected = model(source, target)
    longer = nn.functional.pad(source, (0, 3)), nn.functional.pad(target, (0, 2))
    torch.testing.assert_close(model(*longer)[:, :T][target != 0], expected[target != 0], rtol=0, atol=1e-12)
    for row in range(N):
        alone = source[row][source[row] != 0][None], target[row][target[row] != 0][None]
        real = expected[row][target[row] != 0][None]
        torch.testing.assert_close(model(*alone), real, rtol=0, atol=1e-12)


def test_a_row_of_padding_only_has_finite_outputs_and_gradients() -> None:
    model = model_of().train()
    source, target = ids()
    source[1] = 0
    logits = model(source, target)
    logits.square().sum().backward()
    assert bool(logits.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_logits_depend_on_the_last_source_token_and_not_on_later_target_tokens(kind: str) -> None:
    model = model_of(kind)
    source, target = ids()
    expected = model(source, target)
    for i in range(1, T):
        other = target.clone()
        other[0, i:] = (other[0, i:] - 3) % 9 + 4
        actual = model(source, other)
        torch.testing.assert_close(actual[0, :i], expected[0, :i], rtol=0, atol=1e-12)
        assert bool((actual[0, i] != expected[0, i]).any())
    other = source.clone()
    other[0, -1] = (other[0, -1] - 3) % 7 + 4
    assert bool((model(other, target)[0] != expected[0]).any())


def test_every_block_is_normalised_before_and_added_after() -> None:
    model = model_of()
    norms = [m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and "layers" in name]
    assert len(norms) == 2 * 2 + 2 * 3
    for norm in norms:  # a norm inside the residual stream would change the result
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    seen: list[tuple[Tensor, ...]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.zeros_(module.out_proj.weight)
            module.register_forward_pre_hook(lambda module, args: seen.append(args))
        elif name.endswith("linear2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    source, target = ids()
    # If every branch returns zero, the residual stream reaches the final norm unchanged.
    memory, x = model.source_embedding(source), model.target_embedding(target)
    torch.testing.assert_close(model.encode(source), model.encoder.norm(memory))
    torch.testing.assert_close(model(source, target), model.output(model.decoder.norm(x)))
    # Each attention layer got the normalised stream; the encoder ran twice.
    encoder, decoder = model.encoder.layers, model.decoder.layers
    queries = [encoder[0].norm1(memory), encoder[1].norm1(memory)] * 2
    queries += [norm(x) for layer in decoder for norm in (layer.norm1, layer.norm2)]
    for args, query in zip(seen, queries, strict=True):
        torch.testing.assert_close(args[0], query)
    torch.testing.assert_close(seen[-1][1], model.encode(source))  # the keys of cross-attention are the memory


def by_steps(model: Seq2SeqTransformer, source: Tensor, target: Tensor, sizes: list[int]) -> Tensor:
    memory, caches = model.encode(source), model.new_caches()
    blocks = target.split(sizes, 1)
    return torch.cat([model.decode(block, memory, source == 0, caches) for block in blocks], 1)


@pytest.mark.parametrize("sizes", [[1] * T, [2, 3]], ids=str)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_decoding_by_steps_with_a_cache_equals_the_full_pass(kind: str, sizes: list[int]) -> None:
    model = model_of(kind)
    source, target = ids()
    real = target != 0
    # Position encodings are computed in float32. Their last bit can depend on how many positions one call computes.
    torch.testing.assert_close(
        by_steps(model, source, target, sizes)[real], model(source, target)[real], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("length_scaling", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_and_scaling_reach_attention_and_steps_agree_with_the_full_pass(
    positions: str, length_scaling: bool
) -> None:
    model = model_of("adaptive", dim=20, num_heads=2, positions=positions, length_scaling=length_scaling)
    layers = [*model.encoder.layers, *model.decoder.layers]
    kinds = {"rotary": RotaryPositions, "alibi": ALiBi, "nape": NAPE}
    assert {type(layer.self_attn.positions) for layer in layers} == {kinds.get(positions, type(None))}
    assert all(layer.multihead_attn.positions is None for layer in model.decoder.layers)
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    assert {module.length_scaling is not None for module in attentions} == {length_scaling}
    source, target = ids()
    expected = model(source, target)
    real = target != 0
    torch.testing.assert_close(by_steps(model, source, target, [1] * T)[real], expected[real], rtol=0, atol=1e-6)
    swapped = source[:, [1, 0, *range(2, S)]]
    assert not torch.allclose(model(swapped, target)[0], expected[0])  # the order matters


def test_positions_are_sines_followed_by_cosines() -> None:
    for dim in (6, 7):
        half = (dim + 1) // 2
        for position, row in zip(range(3, 3 + T), sinusoids(3, T, dim), strict=True):
            angles = [position / 10000 ** (i / half) for i in range(half)]
            expected = torch.cat([torch.tensor(angles).sin(), torch.tensor(angles).cos()])[:dim]
            torch.testing.assert_close(row, expected)


def test_dropout_is_applied_only_in_training() -> None:
    model = model_of(dropout=0.5)
    source, target = ids()
    torch.testing.assert_close(model(source, target), model(source, target), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(source, target), model(source, target))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder_attention": "dense"}, "attention must be one of softmax, .*, adaptive, topk, got 'dense'"),
        ({"cross_attention": "Softmax"}, "attention must be one of softmax, .*, adaptive, topk, got 'Softmax'"),
        ({"dim": 22, "num_heads": 4}, "dim must be a multiple of num_heads, got dim=22 and num_heads=4"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"ff_dim": 0}, "ff_dim must be at least 1, got 0"),
        ({"encoder_layers": 0}, "encoder_layers must be at least 1, got 0"),
        ({"decoder_layers": -1}, "decoder_layers must be at least 1, got -1"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"alpha": 2.5}, r"alpha must be in \[1, 2\], the range in which adaptive attention learns α, got 2.5"),
        ({"encoder_attention": "entmax", "alpha": 0.0}, r"alpha must be in \(0, inf\), got 0"),
        ({"decoder_attention": "topk", "k": 0}, "k must be at least 1, got 0"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"positions": "learnt"}, "positions must be one of sinusoidal, rotary, alibi, nape, got 'learnt'"),
        (
            {"share_embeddings": True},
            f"share_embeddings needs one vocabulary for source and target, got {SOURCE} and {TARGET} tokens",
        ),
        ({"output": "dense"}, "output must be one of softmax, sparsemax, entmax15, entmax, got 'dense'"),
    ],
)
def test_an_invalid_argument_raises_an_error(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**kwargs)


def test_the_language_is_in_every_source_embedding_and_takes_part_in_training():
    model = Seq2SeqTransformer(11, 13, dim=16, num_heads=2, ff_dim=32, language_dim=3, dropout=0.0)
    source = torch.tensor([[5, 7, 8, 2], [6, 7, 8, 2]])
    first, second = model.source_embedding(source)
    # Embeddings of the same characters in two languages differ only in the last three entries.
    assert torch.equal(first[1:, :13], second[1:, :13])
    assert (first[1:, 13:] != second[1:, 13:]).all()
    model(source, torch.tensor([[1, 4], [1, 4]])).sum().backward()
    assert (model.source_embedding.language.weight.grad[[5, 6]] != 0).any(-1).all()


def test_features_without_positions_have_no_order_and_do_not_count_in_other_positions():
    options = {"dim": 16, "num_heads": 2, "ff_dim": 32, "feature_ids": [9, 10], "feature_positions": False}
    model = Seq2SeqTransformer(11, 13, **options).eval()
    # Ids 9 and 10 are features, 2 ends the source.
    first = model.source_embedding(torch.tensor([[5, 6, 9, 10, 2], [9, 10, 5, 6, 2]]))
    torch.testing.assert_close(first[0, [0, 1, 2, 3, 4]], first[1, [2, 3, 0, 1, 4]])
    longer = model.source_embedding(torch.tensor([[5, 6, 7, 8, 9, 2]]))
    assert torch.equal(longer[0, 4], first[0, 2]) and torch.equal(longer[0, :2], first[0, :2])
    assert not torch.equal(longer[0, 5], first[0, 4])
    with pytest.raises(ValueError, match=r"^feature_positions=False needs positions='sinusoidal', got 'rotary'$"):
        Seq2SeqTransformer(11, 13, **options, positions="rotary")


@pytest.mark.parametrize("language_dim", [-1, 16])
def test_a_language_dim_out_of_range_raises_an_error(language_dim):
    with pytest.raises(ValueError, match=rf"^language_dim must be from 0 to dim - 1 = 15, got {language_dim}$"):
        Seq2SeqTransformer(11, 13, dim=16, num_heads=2, language_dim=language_dim)


def test_shared_embeddings_are_one_matrix_whose_gradient_is_the_sum_of_three_gradients():
    sizes = {"dim": 22, "num_heads": 2, "ff_dim": 17, "dropout": 0.0}
    apart = Seq2SeqTransformer(SOURCE, SOURCE, **sizes).double()
    shared = Seq2SeqTransformer(SOURCE, SOURCE, **sizes, share_embeddings=True).double()
    matrices = ["source_embedding.tokens.weight", "target_embedding.tokens.weight", "output.weight"]
    assert len({shared.get_parameter(name).data_ptr() for name in matrices}) == 1
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in shared.parameters()) == 2 * SOURCE * 22
    apart.load_state_dict(shared.state_dict())
    source, target = ids()
    target = target % SOURCE
    logits = [model(source, target) for model in (apart, shared)]
    assert torch.equal(*logits)
    for found in logits:
        found.square().sum().backward()
    total = sum(apart.get_parameter(name).grad for name in matrices)
    assert torch.allclose(shared.output.weight.grad, total)
    assert shared.output.weight.grad.abs().sum() > 0


def test_shared_embeddings_with_a_language_dim_are_refused():
    with pytest.raises(ValueError, match=r"^share_embeddings needs language_dim=0, got language_dim=3$"):
        Seq2SeqTransformer(11, 11, dim=16, num_heads=2, language_dim=3, share_embeddings=True)
