"""`record_attention` changes neither the results of a model nor the model, and refuses what it cannot record."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from encoders import layer_of_four_heads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_attn import SparseAttention, replace_attention
from sparse_attn.analysis import record_attention
from sparse_attn.observe import weights_are_observed

N, L, S, E, H = 2, 5, 7, 12, 4


def traces(model: nn.Module) -> list[list[str]]:
    """The names of the attributes of every module, and the sizes of the dictionaries among them (such as hooks)."""
    return [
        sorted(f"{name} {len(value)}" if isinstance(value, dict) else name for name, value in vars(module).items())
        for module in model.modules()
    ]


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_a_recorded_call_returns_the_requested_weights(by_position: bool, need_weights: bool, average: bool) -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3:] = True

    def call() -> tuple[Tensor, Tensor | None]:
        if by_position:
            return layer(query, key, key, padding, need_weights, None, average, False)
        return layer(query, key, key, key_padding_mask=padding, need_weights=need_weights, average_attn_weights=average)

    output, alone = call()
    with record_attention(layer) as record:
        output_recorded, alone_recorded = call()
    torch.testing.assert_close(output_recorded, output)
    assert (alone is None) == (alone_recorded is None) == (not need_weights)
    if alone is not None and alone_recorded is not None:
        torch.testing.assert_close(alone_recorded, alone)
    assert record[""].density.tolist() == [1.0] * H


@pytest.mark.parametrize("sparse", [False, True], ids=["torch's", "sparse"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_and_dropout_equal_those_without_a_record(sparse: bool, dropout: float) -> None:
    model = nn.Transformer(E, H, 1, 1, 17, dropout=dropout, batch_first=True).double()
    if sparse:
        replace_attention(model, alpha_init=1.5)
    source, target = torch.randn(N, S, E).double(), torch.randn(N, L, E).double()

    def gradients() -> list[Tensor]:
        torch.manual_seed(11)
        output = model(source, target)
        return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))]

    expected = gradients()
    with record_attention(model):
        actual = gradients()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_torch_gives_the_same_output_with_a_record(
    dtype: torch.dtype, need_weights: bool, training: bool
) -> None:
    layer = nn.MultiheadAttention(E, H, dropout=0.3, batch_first=True).train(training)
    x, padding = torch.randn(N, L, E), torch.zeros(N, L, dtype=torch.bool)
    # torch's layer returns NaN for a query without visible keys if the caller needs weights.
    padding[0], padding[1, 3:] = not need_weights, True

    def run() -> list[Tensor]:
        torch.manual_seed(11)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output, weights = layer(x, x, x, key_padding_mask=padding, need_weights=need_weights)
            again = layer(output, x, x, key_padding_mask=padding, need_weights=need_weights)[0]
        gradients = torch.autograd.grad(again.square().sum(), list(layer.parameters()))
        return [output, again, *gradients, torch.rand(3), *([weights] if need_weights else [])]

    expected = run()
    with record_attention(layer) as record:
        actual = run()
    assert all(torch.equal(a, b) and bool(b.isfinite().all()) for a, b in zip(actual, expected, strict=True))
    if not training:
        assert record[""].rows.tolist() == [2 * L * (2 if need_weights else 1)] * H
    assert bool(record[""].entropy.isfinite().all())


def test_dropout_reduces_the_recorded_support() -> None:
    layer = nn.MultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(31, 3, E)
    with record_attention(layer) as record:
        layer(x, x, x)
    assert ((record[""].density > 0.4) & (record[""].density < 0.6)).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_layer_counts_once(use_reentrant: bool) -> None:
    model = nn.TransformerEncoderLayer(E, H, 17, dropout=0.0, batch_first=True)
    replace_attention(model)
    x = torch.randn(N, L, E, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with record_attention(model) as record:
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert record["self_attn"].rows.tolist() == [N * L] * H
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of the compiler
@pytest.mark.parametrize("sparse", [False, True], ids=["torch's", "sparse"])
def test_a_compiled_model_runs_uncompiled_inside_a_record(sparse: bool) -> None:
    model = nn.TransformerEncoderLayer(E, H, 17, dropout=0.0, batch_first=True).eval()
    if sparse:
        replace_attention(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            graphs.append("run")
            return graph(*args)

        return run

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(N, L, E)
    expected = compiled(x)
    count = len(graphs)
    for whole in (model, compiled):
        with record_attention(whole) as record:
            torch.testing.assert_close(compiled(x), expected)
        assert len(graphs) == count  # the graph is neither compiled nor run
        (heads,) = record.values()
        assert heads.rows.tolist() == [N * L] * H
    compiled(x)
    assert graphs[count:] == ["run"] * (count // 2)  # as before, with no new compilation


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own encoder warns
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_encoder_path_is_off_only_inside_a_record(padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, dim_feedforward=16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=2).eval()
    source = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 4] = padded
    before = traces(encoder)
    with torch.no_grad(), record_attention(encoder) as record:
        assert not torch.backends.mha.get_fastpath_enabled()
        output = encoder(source, src_key_padding_mask=padding)
    assert list(record) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(heads.density.tolist() == [1.0] * H for heads in record.values())
    assert torch.backends.mha.get_fastpath_enabled()
    assert traces(encoder) == before
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


def test_no_hooks_remain_after_an_exception() -> None:
    model = nn.Transformer(E, H, 1, 1, 16, batch_first=True)
    model.own = SparseAttention(k=2)
    untouched = traces(copy.deepcopy(model))
    with pytest.raises(KeyError), record_attention(model):
        assert traces(model) != untouched and weights_are_observed()
        raise KeyError
    assert traces(model) == untouched
    assert torch.backends.mha.get_fastpath_enabled() and not weights_are_observed()


def test_an_error_of_the_layer_is_raised_and_the_next_call_is_recorded() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    with record_attention(layer) as record:
        with pytest.raises(AssertionError):
            layer(query, key[..., 1:], key, need_weights=False)
        assert layer(query, key, key)[1].shape == (N, L, S)
    assert record[""].rows.tolist() == [N * L] * H


def test_a_user_hook_gets_the_results_that_the_caller_requested() -> None:
    layer = nn.MultiheadAttention(E, H)
    seen: list[Tensor | None] = []
    layer.register_forward_hook(lambda module, args, result: seen.append(result[1]))
    with record_attention(layer):
        layer(torch.randn(L, E), torch.randn(S, E), torch.randn(S, E), need_weights=False)
    assert seen == [None]


@pytest.mark.parametrize("sparse", [False, True], ids=["torch's", "sparse"])
def test_a_copy_made_inside_a_record_is_not_recorded_and_loses_its_hooks(sparse: bool) -> None:
    model = nn.TransformerEncoderLayer(E, H, 17, batch_first=True).eval()
    if sparse:
        replace_attention(model)
    before, x = traces(model), torch.randn(N, L, E)
    with record_attention(model) as record:
        model(x)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        copies[0](x)
    for copied in copies:
        torch.testing.assert_close(copied(x), model(x))
        assert traces(copied) == before
    assert record["self_attn"].rows.tolist() == [N * L] * H


def test_nested_records_both_contain_the_call() -> None:
    layer = layer_of_four_heads(E)
    with record_attention(layer) as outer, record_attention(layer) as inner:
        assert layer(torch.randn(L, E), torch.randn(S, E), torch.randn(S, E), need_weights=False)[1] is None
    assert str(outer) == str(inner)


def test_records_can_close_in_any_order() -> None:
    layer, graphs = nn.MultiheadAttention(E, H, batch_first=True), list[Any]()
    before, x = traces(layer), torch.randn(N, L, E)
    first, second = record_attention(layer), record_attention(layer)
    records = [first.__enter__(), second.__enter__()]
    layer(x, x, x)
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    layer(x, x, x)
    second.__exit__(None, None, None)
    assert [record[""].rows.tolist() for record in records] == [[N * L] * H, [2 * N * L] * H]
    assert torch.backends.mha.get_fastpath_enabled() and not weights_are_observed() and traces(layer) == before
    torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)(x)
    assert len(graphs) == 1  # after all records are closed, torch.compile compiles again


def test_records_of_two_threads_do_not_disturb_each_other() -> None:
    asked, go_on, rows = threading.Event(), threading.Event(), list[Any]()

    class Waiting(nn.MultiheadAttention):
        def forward(self, *args: Any, average_attn_weights: bool = True, **kwargs: Any) -> Any:
            if not average_attn_weights:  # the call is repeated for a record
                asked.set()
                assert go_on.wait(timeout=60)
            return super().forward(*args, average_attn_weights=average_attn_weights, **kwargs)

    def in_a_thread() -> None:
        layer = Waiting(E, H, batch_first=True)
        with record_attention(layer) as record:
            layer(x, x, x)
        rows.append(record[""].rows.tolist())

    x, layer = torch.randn(N, L, E), layer_of_four_heads(E)
    thread = threading.Thread(target=in_a_thread)
    with record_attention(layer) as record:
        thread.start()
        assert asked.wait(timeout=60)
        layer(x, x, x)
    go_on.set()
    thread.join()
    assert rows == [[N * L] * H] and record[""].rows.tolist() == [N * L] * H
    assert torch.backends.mha.get_fastpath_enabled() and not weights_are_observed()


def test_a_model_without_attention_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"SparseAttention layers .*got Linear, which has no such layer"),
        record_attention(nn.Linear(2, 3)),
    ):
        pass


@pytest.mark.parametrize("model", [None, "model", nn.Linear, [nn.MultiheadAttention(E, H)]])
def test_arguments_of_a_wrong_type_are_refused_before_the_context_opens(model: Any) -> None:
    with pytest.raises(TypeError, match=rf"model must be a torch\.nn\.Module, got {type(model).__name__}"):
        record_attention(model)
    with pytest.raises(TypeError, match="weights must be a bool, got str"):
        record_attention(nn.MultiheadAttention(E, H), weights="all")  # type: ignore[arg-type]
