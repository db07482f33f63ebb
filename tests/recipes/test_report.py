import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from recipes.report import alpha_table, attention_density, html, measure_at, measure_heads, roles_table
from recipes.report import measure as measurements
from recipes.report.maps import AttentionMap, WordMaps, attention_figure, choose_word, rollout_figure, word_maps
from recipes.report.measure import LayerHeads, top_k_per_layer
from recipes.report.plots import alpha_course, drawn, heat_map
from recipes.report.tables import percent
from recipes.report.words import LONGEST_SHOWN, read_batch
from recipes.run import load_run
from recipes.seq2seq.model import Seq2SeqTransformer
from recipes.seq2seq.task import Seq2SeqTask
from recipes.seq2seq.tokenizer import BOS, Tokenizer
from sparse_attn import alpha_per_head
from sparse_attn.analysis import record_attention
from sparse_attn.optim import set_alpha

pytestmark = pytest.mark.usefixtures("coarse_pictures")

SOURCES = [[4, 5, 6, 2, 0, 0], [5, 4, 5, 4, 6, 2], [6, 2, 0, 0, 0, 0]]
TARGETS = [[BOS, 4, 5, 0, 0], [BOS, 6, 5, 4, 4], [BOS, 0, 0, 0, 0]]
KINDS = (
    "encoder.layers.{}.self_attn",
    "decoder.layers.{}.self_attn",
    "decoder.layers.{}.multihead_attn",
)


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    return {"source": torch.tensor(SOURCES[rows]), "target_in": torch.tensor(TARGETS[rows])}


def small_task(**kwargs: object) -> SimpleNamespace:
    torch.manual_seed(3)
    model = Seq2SeqTransformer(7, 7, dim=12, num_heads=3, ff_dim=16, dropout=0.3, **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" not in name:
                parameter.mul_(2)
    return SimpleNamespace(model=model)


def layer_names(layers: int) -> list[str]:
    return [name.format(layer) for name in KINDS for layer in range(layers)]


def lines(table: Table) -> list[str]:
    shown = io.StringIO()
    Console(width=80, file=shown).print(table)
    return shown.getvalue().splitlines()


def test_density_counts_real_positions_only() -> None:
    task = small_task()
    measured = attention_density(task, [batch(slice(0, 2)), batch(slice(2, 3))])
    used: dict[str, Tensor] = {}
    pairs: dict[str, int] = {}
    task.model.eval()
    for source, target in zip(SOURCES, TARGETS, strict=True):  # each word separately, without padding
        source, target = [i for i in source if i], [i for i in target if i]
        with record_attention(task.model, weights=True) as recorded:
            task.model(torch.tensor([source]), torch.tensor([target]))
        for name, heads in recorded.items():
            weights = heads.weights
            causal = name.startswith("decoder") and "self" in name
            visible = len(target) * (len(target) + 1) // 2 if causal else weights[0, 0].numel()
            used[name] = used.get(name, torch.zeros(3)) + (weights != 0).sum((0, 2, 3))
            pairs[name] = pairs.get(name, 0) + visible
    assert sorted(measured) == sorted(layer_names(2))
    for name, density in measured.items():
        torch.testing.assert_close(density, used[name] / pairs[name])
        assert density.min() < 1


def test_softmax_is_measured_as_dense() -> None:
    softmax = small_task(encoder_attention="softmax", decoder_attention="softmax", cross_attention="softmax")
    assert all(density.tolist() == [1.0] * 3 for density in attention_density(softmax, [batch()]).values())


def test_measurements_do_not_depend_on_the_batches() -> None:
    task = small_task()
    together = measure_heads(task, [batch()])
    apart = measure_heads(task, [batch(slice(0, 1)), batch(slice(1, 3))])
    assert list(together) == layer_names(2)
    for name, heads in together.items():
        torch.testing.assert_close(heads.density, apart[name].density)
        torch.testing.assert_close(heads.entropy, apart[name].entropy)
        assert heads.roles == apart[name].roles
        for position, weight in heads.weight.items():
            torch.testing.assert_close(weight, apart[name].weight[position])
    density = attention_density(task, [batch()])
    assert all(torch.equal(density[name], heads.density) for name, heads in together.items())


def test_the_kind_of_attention_decides_which_positions_are_measured() -> None:
    heads = measure_heads(small_task(), [batch()])
    encoder, decoder, cross = (heads[name.format(0)] for name in KINDS)
    assert list(encoder.weight) == ["previous", "self", "next"]
    assert list(decoder.weight) == ["previous", "self"]
    assert list(cross.weight) == [] and cross.monotonicity is not None and decoder.monotonicity is None
    assert (encoder.kind, decoder.kind, cross.kind) == ("encoder", "decoder", "cross")


@pytest.mark.parametrize("training", [True, False])
def test_measuring_keeps_the_mode_and_uses_no_dropout(training: bool) -> None:
    task = small_task()
    task.model.train(training)
    first, second = (attention_density(task, [batch()]) for _ in range(2))
    assert task.model.training is training
    assert all(torch.equal(first[name], second[name]) for name in first)  # no dropout while measuring


def test_measuring_keeps_the_mode_of_each_module() -> None:
    task = small_task()
    task.model.train()
    task.model.encoder.eval()  # a frozen encoder without dropout
    before = [module.training for module in task.model.modules()]
    attention_density(task, [batch()])
    assert [module.training for module in task.model.modules()] == before


def test_measuring_at_another_alpha_keeps_a_parameter_past_the_bound_of_alpha() -> None:
    task = small_task()
    layer = task.model.encoder.layers[0].self_attn
    with torch.no_grad():
        layer.raw_alpha.copy_(torch.tensor([2.015, 0.99, 1.25]))
    before = layer.raw_alpha.clone()
    assert measure_at(task, [batch()], 1.0)
    assert torch.equal(layer.raw_alpha, before)


def test_a_model_without_a_learnt_alpha_is_not_measured_at_another_alpha() -> None:
    task = small_task(encoder_attention="entmax15", decoder_attention="entmax15", cross_attention="entmax15")
    set_alpha(task.model, 1.5)
    assert measure_at(task, [batch()], 1.0) == {}


def test_a_loader_without_batches_raises_an_error() -> None:
    with pytest.raises(ValueError, match="loader must have at least one batch, got none"):
        attention_density(small_task(), [])


@pytest.mark.parametrize("heads", [1, 4, 8, 12])
def test_the_table_fits_80_columns_and_shows_every_head(heads: int) -> None:
    density = {name: torch.arange(1, heads + 1) / 100 for name in layer_names(2)}
    alpha = {name: 1 + torch.arange(heads) / 100 for name in layer_names(2)[:4]}
    shown = lines(alpha_table(alpha, density, top_k={layer_names(2)[4]: 7}))
    assert max(map(len, shown)) <= 80
    text = "\n".join(shown)
    assert all(name in text for name in density)
    for head in range(heads):
        assert text.count(f"{1 + head / 100:.2f}") >= 4
        assert text.count(percent((head + 1) / 100)) >= 6
    assert text.count("k=7") == heads
    assert text.count(" -") >= heads  # a layer without α and k


def test_a_compared_run_has_its_own_line() -> None:
    density = {name: torch.full((4,), 0.25) for name in layer_names(1)}
    other = {name: torch.full((4,), 0.75) for name in layer_names(1)}
    shown = lines(alpha_table({}, density, compared={"dense": other}))
    assert [line.split() for line in shown if "dense" in line] == [["dense", *["75%"] * 4]] * 3
    # Brackets in the name of a folder are not markup.
    assert any("run[small]" in line for line in lines(alpha_table({}, density, compared={"run[small]": other})))
    with pytest.raises(ValueError, match="has 4 heads here and 0 in dense"):
        alpha_table({}, density, compared={"dense": dict(list(other.items())[:2])})
    with pytest.raises(ValueError, match="has 4 heads here and 2 in dense"):
        alpha_table({}, density, compared={"dense": {name: torch.ones(2) for name in density}})


def test_roles_are_listed_by_layer() -> None:
    ones = torch.ones(4)
    heads = LayerHeads("encoder", ones, ones, {}, {}, None, ["self", "mixed", "self", "next"])
    assert lines(roles_table({"encoder.layers.0.self_attn": heads}))[2].split(maxsplit=1)[1].strip() == (
        "self: 0 2; mixed: 1; next: 3"
    )


@pytest.mark.parametrize(
    ("share", "text"), [(1, "100%"), (0.9999, ">99%"), (0.9949, "99%"), (0.0996, "10%"), (0.0994, "9.9%"), (0, "0.0%")]
)
def test_percentages_have_at_most_four_characters(share: float, text: str) -> None:
    assert percent(share) == text


def draw(figure: Figure, file: Path) -> tuple[int, int]:
    """Saves a figure; returns its width and height, read from the PNG header."""
    file.write_bytes(drawn(figure))
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (8, 6)])
def test_the_heat_map_has_a_panel_for_each_kind_and_a_number_in_each_cell(
    heads: int, layers: int, tmp_path: Path
) -> None:
    density = {name: torch.linspace(0, 1, heads) for name in layer_names(layers)}
    alpha = {name: torch.linspace(1, 2, heads) for name in layer_names(layers)[layers:]}
    figure = heat_map(alpha, density, {name: 3 for name in layer_names(layers)[:layers]})
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels[:2]] == [
        "encoder self-attention: α",
        "encoder self-attention: density",
    ]
    assert len(panels) == 6
    assert all(len(axes.texts) == heads * layers for axes in panels)
    assert panels[0].texts[0].get_text() == "k=3"
    assert max(draw(figure, tmp_path / "alpha.png")) < 700  # at 50 dots per inch


@pytest.mark.parametrize(("heads", "layers", "steps"), [(1, 1, 1), (8, 6, 3)])
def test_the_course_has_a_line_for_each_head(heads: int, layers: int, steps: int, tmp_path: Path) -> None:
    names = layer_names(layers)[1:]  # the kinds can have different numbers of layers
    rows = [(step, name, head, 1.5) for step in range(steps) for name in names for head in range(heads)]
    figure = alpha_course(rows)
    shown = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert sorted(shown) == sorted(names)
    assert all(len(axes.lines) == heads for axes in shown.values())
    styles = {(line.get_color(), line.get_linestyle()) for line in shown[names[0]].lines}
    assert len(styles) == heads
    draw(figure, tmp_path / "course.png")


def test_the_maps_of_a_word_have_its_tokens_and_a_panel_for_each_head(run_folder: Path, tmp_path: Path) -> None:
    task = load_run(run_folder).task
    sample = word_maps(task, "bacca")
    assert [layer.layer for layer in sample.layers] == [name.format(1) for name in KINDS]
    encoder, decoder, cross = sample.layers
    assert encoder.keys == ["b", "a", "c", "c", "a", "<eos>"]
    written = sample.prediction.split()
    assert decoder.queries == ["<bos>", *written] and cross.queries == [*written, "<eos>"]
    for layer in sample.layers:
        assert layer.weights.shape == (3, len(layer.queries), len(layer.keys))
    assert not decoder.visible.triu(1).any() and cross.visible.all()
    figure = attention_figure(sample, alpha_per_head(task.model), top_k_per_layer(task.model))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 9 and titles[3] == "head 0 · α 1.00 · 0% zero" and "k=2" in titles[8]
    draw(figure, tmp_path / "attention.png")


def test_characters_missing_in_the_font_are_drawn_without_a_warning(tmp_path: Path) -> None:
    words = ["한국", "にほん", "a b", "tiếng"]
    source = Tokenizer.fit(words, split="characters", normalization="NFD")
    target = Tokenizer.fit(["ʃ t͡ɕ ɯ"], split="spaces", normalization="NFD")
    model = {"dim": 15, "num_heads": 5, "ff_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    task = Seq2SeqTask(
        source_tokenizer=source.state(), target_tokenizer=target.state(), model=model, max_length=5
    ).eval()
    for word in words:
        sample = word_maps(task, word)
        # Five heads need a second row, with one panel.
        draw(attention_figure(sample, alpha_per_head(task.model), {}), tmp_path / "map.png")
        draw(rollout_figure(read_batch(task, [word])), tmp_path / "rollout.png")


def test_dollars_in_tokens_are_not_mathematics() -> None:
    tokens = ["$$", "$_$", "a"]
    layer = AttentionMap("encoder.l", "encoder", torch.rand(2, 3, 3), torch.ones(3, 3).bool(), tokens, tokens)
    drawn(attention_figure(WordMaps("$_$", "$$", [layer]), {}, {}))


def test_the_word_to_draw_is_long_but_fits() -> None:
    assert choose_word(["ab", "abcdefgh", "zyxwvuts", "abcdefghijk"]) == "abcdefgh"
    assert choose_word(["abcdefghijk", "abcdefghijkl"]) == "abcdefghijk"


class Page(HTMLParser):
    """Collects the values of `src` and `href`, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_parts_of_a_report_need_no_other_file_and_escape_their_content() -> None:
    parts = [
        html.paragraph("<script>alert(1)</script>"),
        html.table([{"a & b": "<td>", "c": "1"}]),
        html.picture(b"\x89PNG", 'a "quoted" <word>'),
        html.folded("config", "<x>: 1"),
    ]
    text = "".join(parts)
    page = Page(text)
    assert page.loaded == ["data:image/png;base64,iVBORw=="]
    assert not re.search(r"<script|<word>|<x>|<td><td>", text)


def test_the_report_of_a_run_is_one_file(run_folder: Path) -> None:
    from recipes.inspect import inspect
    from recipes.launch import run_hydra

    run_hydra("inspect", inspect, arguments=[f"run={run_folder}"])
    text = (run_folder / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    loaded = [source for source in page.loaded if source != "data:,"]
    assert len(loaded) == 4 and all(source.startswith("data:image/png") for source in loaded)
    assert f"sparse-attn run {run_folder.parent.name}/finished" in text
    assert "<td>validation</td><td>12.50</td><td>30.25</td>" in text
    assert text.count("<td>100%</td>") >= 18 + 6  # softmax compared with every head, and the softmax heads
    assert "encoder_attention: adaptive" in text


def test_the_tables_do_not_load_matplotlib() -> None:
    code = "import sys, recipes.report; sys.exit('matplotlib' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("measure", [attention_density, measure_heads])
def test_batches_of_long_texts_are_measured_in_parts(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task()
    whole = measure(task, [batch()])
    largest = []
    observe = measurements.observe_layers

    def observed(model, source, target, take):
        largest.append(len(source) * max(source.shape[1], target.shape[1]) ** 2)
        observe(model, source, target, take)

    monkeypatch.setattr(measurements, "observe_layers", observed)
    monkeypatch.setattr(measurements.parts, "__defaults__", (80,))
    in_parts = measure(task, [batch()])
    assert largest == [72, 36]
    for layer, heads in whole.items():
        found = in_parts[layer]
        if measure is measure_heads:
            heads, found = heads.entropy, found.entropy
        torch.testing.assert_close(found, heads)


def test_only_the_beginning_of_a_long_word_is_shown() -> None:
    source, target = (Tokenizer.fit(["abc"], split="characters", normalization="NFC") for _ in range(2))
    model = {"dim": 6, "num_heads": 3, "ff_dim": 8, "encoder_layers": 1, "decoder_layers": 1}
    task = Seq2SeqTask(source_tokenizer=source.state(), target_tokenizer=target.state(), model=model, max_length=997)
    read = read_batch(task.eval(), ["abc" * 331])
    assert "".join(read.sources[0]) == ("abc" * 331)[:LONGEST_SHOWN] + "<eos>"
    assert len(read.read[0]) <= LONGEST_SHOWN + 1
    weights = read.record[KINDS[0].format(0)].weights
    assert weights is not None and weights.shape == (1, 3, LONGEST_SHOWN + 1, LONGEST_SHOWN + 1)
    assert max(rollout_figure(read).get_size_inches()) < 25
