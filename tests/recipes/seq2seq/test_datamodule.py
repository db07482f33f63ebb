import itertools

import pytest
import tokenizers
import torch

from recipes.seq2seq.data import Seq2SeqData
from recipes.seq2seq.data.examples import Example, Splits, limit_splits, pairs, subset
from recipes.seq2seq.tokenizer import EOS, PAD, UNK, Tokenizer

LETTERS = "abcdefghijk"


def words(count, first=0):
    """Distinct words of 2 to 6 letters; the target is the word in capitals."""
    made = ("".join(letters) for length in range(2, 7) for letters in itertools.product(LETTERS, repeat=length))
    picked = list(itertools.islice(made, first, first + 97 * count, 97))
    return "".join(f"{word}\t{' '.join(word.upper())}\n" for word in picked)


@pytest.fixture
def files(tmp_path):
    contents = {"train": words(83), "val": words(29, 1) + "xa\tX A\n", "test": words(31, 2)}
    paths = {}
    for name, content in contents.items():
        paths[name] = str(tmp_path / f"{name}.tsv")
        (tmp_path / f"{name}.tsv").write_text(content, encoding="utf-8")
    return paths


@pytest.fixture
def data(files):
    module = Seq2SeqData("tsv", batch_size=7, eval_batch_size=11, **files)
    module.setup()
    return module


@pytest.fixture(scope="module")
def cmudict():
    module = Seq2SeqData("cmudict", limit=300, batch_size=17, eval_batch_size=5)
    module.setup()
    return module


def test_vocabularies_come_only_from_the_training_split(data):
    assert data.source_tokenizer.symbols == list(LETTERS)
    assert data.target_tokenizer.symbols == list(LETTERS.upper())
    assert data.source_tokenizer.unknown("xa") == ["x"]


def test_setup_is_idempotent(data):
    before = (data.splits, data.source_tokenizer, data.target_tokenizer)
    data.setup("fit")
    after = (data.splits, data.source_tokenizer, data.target_tokenizer)
    assert all(old is new for old, new in zip(before, after, strict=True))


def test_the_training_loader_calls_setup(files):
    assert len(Seq2SeqData("tsv", **files).train_dataloader()) == 2


def test_a_training_epoch_holds_every_pair_once(data):
    got = []
    for batch in data.train_dataloader():
        assert batch.keys() == {"source", "target_in", "target_out"}
        for source, target in zip(batch["source"].tolist(), batch["target_out"].tolist(), strict=True):
            got.append((data.source_tokenizer.decode(source), data.target_tokenizer.decode(target)))
    expected = [(list(source), target.split()) for source, target in pairs(data.splits.train)]
    assert sorted(got) == sorted(expected)
    assert len(got) == 83


def test_training_has_a_row_for_every_pronunciation_and_evaluation_for_every_word(cmudict):
    every = pairs(cmudict.splits.train)
    assert len(every) > len(cmudict.splits.train) == 300
    assert sum(len(batch["source"]) for batch in cmudict.train_dataloader()) == len(every)
    sources = [source for batch in cmudict.test_dataloader() for source in batch["sources"]]
    assert sorted(sources) == sorted(example.source for example in cmudict.splits.test)


def test_evaluation_rows_keep_their_texts_and_all_references(cmudict):
    several = 0
    references = {example.source: example.references for example in cmudict.splits.test}
    for batch in cmudict.test_dataloader():
        for row, source in enumerate(batch["sources"]):
            assert batch["source"][row].tolist()[: len(source) + 1] == cmudict.source_tokenizer.encode(source)
            assert batch["references"][row] == [reference.split() for reference in references[source]]
            assert cmudict.target_tokenizer.decode(batch["target_out"][row].tolist()) == batch["references"][row][0]
            several += len(batch["references"][row]) > 1
    assert several > 0


def test_rows_end_in_eos_and_are_padded_with_zero(data):
    for batch in itertools.chain(data.train_dataloader(), data.val_dataloader()):
        for ids in (batch["source"], batch["target_out"]):
            assert ids.dtype == torch.long
            ends = (ids == EOS).nonzero()
            assert ends[:, 0].tolist() == list(range(len(ids)))
            after_end = torch.arange(ids.shape[1]) > ends[:, 1:]
            assert torch.equal(ids == PAD, after_end)
            assert not after_end.all(dim=0).any()  # no column contains only padding
        assert torch.equal(batch["target_in"][:, 1:] != PAD, (batch["target_out"] != PAD)[:, 1:])


def test_unknown_characters_of_validation_words_are_marked(data):
    batches = list(data.val_dataloader())
    marked = [
        source
        for batch in batches
        for source, ids in zip(batch["sources"], batch["source"], strict=True)
        if UNK in ids.tolist()
    ]
    assert marked == ["xa"]
    references = [words for batch in batches for words in batch["references"]]
    assert [["X", "A"]] in references  # an unseen phone stays unchanged in the reference


def test_the_order_depends_on_the_seed_and_not_on_the_global_random_state(files):
    def first_batch(seed):
        loader = Seq2SeqData("tsv", batch_size=7, seed=seed, **files).train_dataloader()
        return next(iter(loader))["source"].tolist()

    torch.manual_seed(1)
    zero = first_batch(0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert first_batch(0) == zero
    assert torch.equal(torch.get_rng_state(), before)
    assert first_batch(1) != zero


def test_limits_do_not_depend_on_the_seed(files):
    made = [Seq2SeqData("tsv", seed=seed, limit=20, eval_limit=3, **files) for seed in (0, 1)]
    loaders = [module.val_dataloader() for module in made]
    assert made[0].splits == made[1].splits
    assert len(made[0].splits.train) == 20
    assert (len(made[0].splits.val), len(made[0].splits.test)) == (7, 7)
    sources = [next(iter(loader))["sources"] for loader in loaders]
    assert sources[0] == sources[1]


def test_eval_limit_is_for_quick_validation_only(files):
    module = Seq2SeqData("tsv", eval_limit=4, **files)
    sizes = [
        sum(len(batch["sources"]) for batch in loader)
        for loader in (module.val_dataloader(), module.full_val_dataloader(), module.test_dataloader())
    ]
    assert sizes == [4, 30, 31]


def test_a_target_can_be_split_into_characters(files, tmp_path):
    for name in files:
        (tmp_path / f"{name}.tsv").write_text("gehen\tgeht ab\n", encoding="utf-8")
    module = Seq2SeqData("tsv", target_split="characters", **files)
    batch = next(iter(module.test_dataloader()))
    assert batch["references"] == [[list("geht ab")]]


def test_nfd_decomposes_syllables(files, tmp_path):
    for name, word in {"train": "학간", "val": "한", "test": "한"}.items():
        (tmp_path / f"{name}.tsv").write_text(f"{word}\th a n\n", encoding="utf-8")
    unknown = {}
    for normalization in ("NFC", "NFD"):
        batch = next(iter(Seq2SeqData("tsv", normalization=normalization, **files).test_dataloader()))
        unknown[normalization] = int((batch["source"] == UNK).sum())
    assert unknown == {"NFC": 1, "NFD": 0}


def test_the_tokenizers_of_a_trained_model_can_be_used(files):
    module = Seq2SeqData("tsv", **files)
    source = Tokenizer(["a", "b"], split="characters", normalization="NFC")
    target = Tokenizer(["A", "B"], split="spaces", normalization="NFC")
    module.use_tokenizers(source, target)
    batch = next(iter(module.test_dataloader()))
    assert module.source_tokenizer is source
    assert int(batch["source"].max()) == 5
    assert int(batch["target_out"].max()) == 5


def test_a_subset_is_checked_and_keeps_the_order():
    examples = [Example(str(number), ("x",)) for number in range(101)]
    part = subset(examples, 13)
    assert len(part) == 13
    assert part == sorted(part, key=examples.index)
    assert subset(examples, None) == subset(examples, 101) == examples
    with pytest.raises(ValueError, match=r"^limit must be at least 1, got 0$"):
        subset(examples, 0)


def test_a_limit_leaves_at_least_one_example_in_each_split():
    examples = [Example(str(number), ("x",)) for number in range(101)]
    small = limit_splits(Splits(examples, examples[:3], examples[:5]), 2)
    assert (len(small.train), len(small.val), len(small.test)) == (2, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "cmu"}, ValueError, "data name must be one of cmudict, tsv, parallel, synthetic, got 'cmu'"),
        ({"name": "tsv"}, ValueError, "data name 'tsv' needs the files train, val and test, got none"),
        (
            {"name": "tsv", "train": "a", "val": "b"},
            ValueError,
            "data name 'tsv' needs the files train, val and test, got train, val",
        ),
        ({"train": "a"}, ValueError, "data name 'cmudict' takes no files (name 'tsv' does), got train"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, ValueError, "eval_batch_size must be at least 1, got -1"),
        ({"batch_size": None}, TypeError, "batch_size must be a whole number, got None"),
        ({"limit": 0}, ValueError, "limit must be at least 1, got 0"),
        ({"eval_limit": 0}, ValueError, "eval_limit must be at least 1, got 0"),
        ({"limit": 1e3}, TypeError, "limit must be a whole number, got 1000.0"),
        ({"source_split": "w"}, ValueError, "source_split must be one of characters, spaces, bpe, got 'w'"),
        ({"target_split": "w"}, ValueError, "target_split must be one of characters, spaces, bpe, got 'w'"),
        ({"normalization": "NFKC"}, ValueError, "normalization must be one of NFC, NFD, none, got 'NFKC'"),
    ],
)
def test_invalid_arguments_raise_an_error_before_files_are_read(arguments, error, message):
    with pytest.raises(error) as caught:
        Seq2SeqData(**{"name": "cmudict"} | arguments)
    assert str(caught.value) == message


@pytest.fixture
def inflection(tmp_path):
    """Files in two languages, whose three columns have the order of SIGMORPHON 2023."""
    for language, ending in (("xx", "a"), ("yy", "b")):
        for split in ("train", "val", "test"):
            lines = [
                f"{word}\tV;{tag}\t{word}{ending * place}" for place, tag in enumerate("PQ", 1) for word in LETTERS
            ]
            (tmp_path / f"{language}_{split}.tsv").write_text("\n".join(lines), encoding="utf-8")
    files = {split: str(tmp_path / f"{{language}}_{split}.tsv") for split in ("train", "val", "test")}
    return {"columns": ["source", "features", "target"], "target_split": "characters", **files}


def test_features_and_languages_are_read_with_the_source(inflection):
    module = Seq2SeqData("tsv", languages="all", **inflection)
    batch = next(iter(module.test_dataloader()))
    assert len(batch["sources"]) == 44
    row = batch["sources"].index("yy\tc\tV;Q")
    decoded = module.source_tokenizer.decode(batch["source"][row].tolist())
    assert decoded == ["<yy>", "c", "[V]", "[Q]"]
    assert batch["references"][row] == [["c", "b", "b"]]
    assert batch["groups"][row] == "yy"
    assert set(batch["groups"]) == {"xx", "yy"}


def test_one_language_can_be_chosen_by_its_name(inflection):
    module = Seq2SeqData("tsv", languages="xx", **inflection)
    module.setup()
    assert {example.group for example in module.splits.train} == {"xx"}


@pytest.fixture
def sentences(tmp_path):
    texts = {"source": "the low house\nthe lower houses\n", "target": "das tiefe Haus\ndie tieferen Häuser\n"}
    for side, text in texts.items():
        (tmp_path / f"text.{side}").write_text(5 * text, encoding="utf-8")
    pattern = str(tmp_path / "text.{side}")
    return {"train": pattern, "val": pattern, "test": pattern, "source_split": "bpe", "target_split": "bpe"}


@pytest.mark.parametrize("joint", [True, False])
def test_parallel_text_is_split_into_joint_or_separate_subwords(sentences, tmp_path, joint):
    module = Seq2SeqData("parallel", bpe_size=60, bpe_joint=joint, **sentences)
    module.setup()
    assert (module.source_tokenizer.state() == module.target_tokenizer.state()) is joint
    batch = next(iter(module.test_dataloader()))
    row = batch["sources"].index("the low house")
    assert batch["references"][row] == [["▁das", "▁tiefe", "▁Haus"]]
    ids = batch["target_out"][row].tolist()
    assert module.target_tokenizer.join(module.target_tokenizer.decode(ids)) == "das tiefe Haus"
    module.save_vocabularies(tmp_path)
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "bpe_target.json"))
    assert "".join(kept.encode("das Haus").tokens) == "▁das▁Haus"


def test_synthetic_sequences_are_batched_with_their_groups():
    generate = {"task": "reverse", "length": 5, "factors": [2], "train": 17, "val": 3, "test": 7}
    module = Seq2SeqData("synthetic", generate=generate, source_split="spaces")
    batch = next(iter(module.test_dataloader()))
    assert batch["source"].shape == (7, 11)
    assert batch["groups"] == ["x2"] * 7


def test_batches_by_tokens_stay_within_the_limit(files):
    loader = Seq2SeqData("tsv", batch_tokens=29, **files).train_dataloader()
    for batch in loader:
        assert max(batch["source"].numel(), batch["target_out"].numel()) <= 29
    assert sum(len(batch["source"]) for batch in loader) == 83


def test_long_pairs_are_left_out_long_inputs_are_cut_and_both_are_reported(files, tmp_path):
    for name in files:
        (tmp_path / f"{name}.tsv").write_text("abcdefg\tA\nab\tA B\na\tA B A B A\n", encoding="utf-8")
    module = Seq2SeqData("tsv", max_length=4, **files)
    (batch,) = module.train_dataloader()
    assert batch["source"].shape == (1, 3)
    (batch,) = module.test_dataloader()
    assert batch["source"].shape[1] == batch["target_out"].shape[1] == 5
    assert ["A", "B", "A", "B", "A"] in [references[0] for references in batch["references"]]
    assert "abcdefg" in batch["sources"]
    assert module.notes() == [
        "2 of 3 training pairs have more than 4 tokens on a side and are left out (data.max_length)",
        "1 of 3 validation inputs have more than 4 tokens and are cut off (data.max_length)",
        "1 of 3 test inputs have more than 4 tokens and are cut off (data.max_length)",
    ]


def test_a_max_length_that_leaves_no_training_pair_is_refused(files):
    with pytest.raises(ValueError, match=r"^max_length must leave at least one training pair, got 1 tokens where"):
        Seq2SeqData("tsv", max_length=1, **files).train_dataloader()


def test_symbols_not_seen_in_training_are_reported(data):
    assert data.notes() == [
        '1 of 30 validation inputs hold symbols never seen in training: "x"',
        '1 of 30 validation targets hold symbols never seen in training: "X"',
    ]


def test_a_cache_does_not_change_the_data(files, tmp_path, monkeypatch):
    def rows():
        loader = Seq2SeqData("tsv", cache=str(tmp_path / "cache"), **files).train_dataloader()
        return [(batch["source"].tolist(), batch["target_out"].tolist()) for batch in loader]

    fresh = rows()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("encoded again"))
        assert rows() == fresh
    (tmp_path / "train.tsv").write_text(words(83, 3), encoding="utf-8")
    assert rows() != fresh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["source"]}, "columns must hold source and target, and each column once, got [source]"),
        ({"sides": ["a", "b"]}, "sides is for data name 'parallel', got it with 'tsv'"),
        ({"name": "cmudict", "languages": "all"}, "languages is for data name 'tsv', got it with 'cmudict'"),
        ({"languages": "all"}, "train must hold {language} in its path, which languages fills in, got 'x'"),
        ({"name": "parallel"}, "train must hold {side} in its path, which sides fills in, got 'x'"),
        ({"languages": []}, "languages must hold at least one language, and each once, got []"),
        ({"languages": ["a/b"]}, "languages must hold names as they occur in file names, got 'a/b'"),
        ({"languages": ["unk"]}, "languages must not be one of pad, bos, eos, unk, got 'unk'"),
        ({"name": "parallel", "sides": ["en"]}, "sides must hold two different names, got [en]"),
        ({"feature_split": ""}, "feature_split must hold at least one character, got ''"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"metrics": []}, "metrics must hold at least one metric, and each once, got []"),
        ({"val": ""}, "val must be a file, got ''"),
        (
            {"test": "{language}"},
            "languages must be given, since test holds {language}, got no languages and '{language}'",
        ),
    ],
)
def test_invalid_or_incompatible_arguments_are_refused(arguments, message):
    path = (
        "x{language}" if arguments.get("languages") not in (None, "all") else "x{side}" if "sides" in arguments else "x"
    )
    files = {} if arguments.get("name") == "cmudict" else dict.fromkeys(("train", "val", "test"), path)
    with pytest.raises(ValueError) as caught:
        Seq2SeqData(**{"name": "tsv"} | files | arguments)
    assert str(caught.value) == message


def test_error_for_a_missing_file_contains_its_name(files, tmp_path):
    module = Seq2SeqData("tsv", **files | {"val": str(tmp_path / "none.tsv")})
    with pytest.raises(FileNotFoundError, match=r"^cannot read the data file .*none\.tsv: No such file"):
        module.setup()
