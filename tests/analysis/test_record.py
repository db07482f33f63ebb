import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn.analysis import record_attention

N, L, S, E, H = 2, 5, 7, 12, 4


def hooks(model: nn.Module) -> list[int]:
    return [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        )
    ]


def expected_weights(layer: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Tensor:
    weights = layer(*args, **kwargs, need_weights=True, average_attn_weights=False)[1]
    assert weights is not None
    return weights


@pytest.mark.parametrize("batch_first", [False, True])
def test_weights_have_the_batch_first_whatever_the_input(batch_first: bool) -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    with record_attention(layer) as weights:
        layer(query, key, key, need_weights=False)
    assert weights[""].shape == (N, H, L, S)
    assert not weights[""].requires_grad
    torch.testing.assert_close(weights[""], expected_weights(layer, query, key, key))


def test_unbatched() -> None:
    layer = nn.MultiheadAttention(E, H)
    with record_attention(layer) as weights:
        layer(torch.randn(L, E), torch.randn(S, E), torch.randn(S, E))
    assert weights[""].shape == (H, L, S)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_the_caller_gets_what_it_asked_for(by_position: bool, need_weights: bool, average: bool) -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3:] = True

    def call() -> tuple[Tensor, Tensor | None]:
        if by_position:
            return layer(query, key, key, padding, need_weights, None, average, False)
        return layer(query, key, key, key_padding_mask=padding, need_weights=need_weights, average_attn_weights=average)

    output, alone = call()
    with record_attention(layer) as weights:
        output_recorded, alone_recorded = call()
    torch.testing.assert_close(output_recorded, output)
    assert (alone is None) == (alone_recorded is None) == (not need_weights)
    if alone is not None and alone_recorded is not None:
        torch.testing.assert_close(alone_recorded, alone)
    assert weights[""].shape == (N, H, L, S)
    assert (weights[""][1, :, :, 3:] == 0).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own encoder warns
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_encoder_path_is_off_only_inside(padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, dim_feedforward=16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=2).eval()
    source = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 4] = padded
    before = hooks(encoder)
    with torch.no_grad(), record_attention(encoder) as weights:
        assert not torch.backends.mha.get_fastpath_enabled()
        output = encoder(source, src_key_padding_mask=padding)
    assert list(weights) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(w.shape == (N, H, L, L) for w in weights.values())
    assert torch.backends.mha.get_fastpath_enabled()
    assert hooks(encoder) == before == [0] * len(before)
    with torch.no_grad():
        fused = encoder(source, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], fused[:, :L][~padding])


def test_a_fast_path_that_was_off_stays_off() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with record_attention(nn.MultiheadAttention(E, H)):
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_no_trace_after_an_exception() -> None:
    model = nn.Transformer(E, H, 1, 1, 16, batch_first=True)
    untouched = copy.deepcopy(model)
    with pytest.raises(KeyError), record_attention(model):
        assert sum(hooks(model)) > 0
        raise KeyError
    assert hooks(model) == hooks(untouched)
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_of_the_layer_passes_and_the_next_call_is_recorded() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    with record_attention(layer) as weights:
        with pytest.raises(AssertionError):
            layer(query, key[..., 1:], key, need_weights=False)
        assert layer(query, key, key)[1].shape == (N, L, S)
    assert weights[""].shape == (N, H, L, S)


def test_encoder_decoder_and_the_last_call_wins() -> None:
    model = nn.Transformer(E, H, 1, 1, 16, batch_first=True)
    with record_attention(model) as weights:
        model(torch.randn(N, 3, E), torch.randn(N, 2, E))
        model(torch.randn(N, S, E), torch.randn(N, L, E))
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "encoder.layers.0.self_attn": (N, H, S, S),
        "decoder.layers.0.self_attn": (N, H, L, L),
        "decoder.layers.0.multihead_attn": (N, H, L, S),
    }


def test_a_hook_of_the_user_sees_what_the_caller_asked_for() -> None:
    layer = nn.MultiheadAttention(E, H)
    seen: list[Tensor | None] = []
    layer.register_forward_hook(lambda module, args, result: seen.append(result[1]))
    with record_attention(layer):
        layer(torch.randn(L, E), torch.randn(S, E), torch.randn(S, E), need_weights=False)
    assert seen == [None]


def test_nested_contexts_record_both() -> None:
    layer = nn.MultiheadAttention(E, H)
    with record_attention(layer) as outer, record_attention(layer) as inner:
        assert layer(torch.randn(L, E), torch.randn(S, E), torch.randn(S, E), need_weights=False)[1] is None
    assert torch.equal(outer[""], inner[""])


def test_a_model_without_attention() -> None:
    with (
        pytest.raises(ValueError, match=r"nn\.MultiheadAttention layers, got Linear"),
        record_attention(nn.Linear(2, 3)),
    ):
        pass
