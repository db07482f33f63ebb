import json
import unicodedata

import pytest

from recipes.seq2seq.tokenizer import BOS, EOS, PAD, SPECIALS, UNK, Tokenizer


def test_symbols_get_sorted_ids_after_the_four_special_tokens():
    tokenizer = Tokenizer.fit(["cab", "bad"], split="characters", normalization="NFC")
    assert tokenizer.symbols == ["a", "b", "c", "d"]
    assert len(tokenizer) == 8
    assert tokenizer.encode("dab") == [7, 4, 5, EOS]


def test_tokens_at_spaces_ignore_repeated_and_outer_spaces():
    tokenizer = Tokenizer.fit([" t͡s  a "], split="spaces", normalization="NFC")
    assert tokenizer.symbols == ["a", "t͡s"]
    assert tokenizer.join(tokenizer.tokenize("a  t͡s")) == "a t͡s"


def test_a_space_inside_a_word_is_a_character():
    tokenizer = Tokenizer.fit(["ba ba"], split="characters", normalization="NFC")
    assert tokenizer.symbols == [" ", "a", "b"]
    assert tokenizer.tokenize("ab ab") == ["a", "b", " ", "a", "b"]
    assert tokenizer.unknown("ab ab") == []


@pytest.mark.parametrize(("normalization", "tokens"), [("NFC", 2), ("NFD", 6), ("none", 2)])
def test_only_nfd_decomposes_korean_syllables(normalization, tokens):
    word = unicodedata.normalize("NFC", "한글")
    tokenizer = Tokenizer.fit([word], split="characters", normalization=normalization)
    assert len(tokenizer.tokenize(word)) == tokens


def test_nfd_encodes_a_new_syllable_of_known_letters():
    seen = ["학", "간"]  # h-a-k and k-a-n contain the letters of h-a-n
    composed = Tokenizer.fit(seen, split="characters", normalization="NFC")
    decomposed = Tokenizer.fit(seen, split="characters", normalization="NFD")
    assert composed.unknown("한") == ["한"]
    assert decomposed.unknown("한") == []


def test_both_spellings_of_an_accent_are_one_token_unless_normalisation_is_off():
    spellings = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    assert len(Tokenizer.fit(spellings, split="spaces", normalization="NFC").symbols) == 1
    assert len(Tokenizer.fit(spellings, split="spaces", normalization="none").symbols) == 2


@pytest.mark.parametrize("normalization", ["NFC", "NFD"])
def test_join_writes_composed_text(normalization):
    word = unicodedata.normalize("NFC", "한글 é")
    tokenizer = Tokenizer.fit([word], split="characters", normalization=normalization)
    assert tokenizer.join(tokenizer.decode(tokenizer.encode(word))) == word


def test_join_does_not_change_text_without_normalisation():
    word = unicodedata.normalize("NFD", "é")
    tokenizer = Tokenizer.fit([word], split="characters", normalization="none")
    assert tokenizer.join(tokenizer.tokenize(word)) == word


def test_unknown_tokens_are_encoded_and_listed_in_order():
    tokenizer = Tokenizer.fit(["ab"], split="characters", normalization="NFC")
    assert tokenizer.encode("zaxz") == [UNK, 4, UNK, UNK, EOS]
    assert tokenizer.unknown("zyxaxwvuz") == list("zyxwvu")


def test_decode_stops_at_the_first_end_and_skips_padding_and_start():
    tokenizer = Tokenizer.fit(["ab"], split="characters", normalization="NFC")
    assert tokenizer.decode([BOS, 4, PAD, UNK, 5, EOS, 4, 999]) == ["a", "<unk>", "b"]
    assert tokenizer.decode([5, 4]) == ["b", "a"]


@pytest.mark.parametrize("index", [-1, 6])
def test_decode_refuses_an_id_outside_the_vocabulary(index):
    tokenizer = Tokenizer.fit(["ab"], split="characters", normalization="NFC")
    with pytest.raises(ValueError, match=rf"^token ids must lie in 0\.\.5, got {index}$"):
        tokenizer.decode([index])


def test_text_that_looks_like_a_special_token_is_unknown():
    tokenizer = Tokenizer.fit(["a <pad> <eos>"], split="spaces", normalization="NFC")
    assert tokenizer.symbols == ["a"]
    assert tokenizer.encode("<pad> a <eos>") == [UNK, 4, UNK, EOS]


def test_a_tokenizer_is_restored_from_its_state_in_json():
    tokenizer = Tokenizer.fit(["한글 b"], split="characters", normalization="NFD")
    state = json.loads(json.dumps(tokenizer.state()))
    restored = Tokenizer(**state)
    assert restored.encode("글 한x") == tokenizer.encode("글 한x")
    assert restored.state() == tokenizer.state()
    state["symbols"].clear()
    assert len(restored) > len(SPECIALS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"symbols": [], "split": "words"}, "split must be one of characters, spaces, bpe, got 'words'"),
        (
            {"symbols": [], "split": "spaces", "normalization": "nfc"},
            "normalization must be one of NFC, NFD, none, got 'nfc'",
        ),
        (
            {"symbols": ["b", "a"], "split": "spaces"},
            "symbols must be sorted and distinct, got them unsorted",
        ),
        (
            {"symbols": ["a", "a"], "split": "spaces"},
            "symbols must be sorted and distinct, got them unsorted",
        ),
        ({"symbols": ["<eos>"], "split": "spaces"}, "symbols must not hold the special tokens, got <eos>"),
    ],
)
def test_invalid_arguments_raise_an_error(arguments, message):
    with pytest.raises(ValueError) as error:
        Tokenizer(**arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


SENTENCES = ["low lower lowest", "new newer newest wide wider widest"]


def test_subwords_are_joined_to_words_in_the_output():
    tokenizer = Tokenizer.fit(SENTENCES, split="bpe", normalization="NFC", bpe_size=29)
    assert len(tokenizer.symbols) <= 29
    for text in (*SENTENCES, "wow  nested "):
        tokens = tokenizer.decode(tokenizer.encode(text))
        assert tokenizer.join(tokens) == " ".join(text.split())
        assert tokenizer.words(tokens) == [f"▁{word}" for word in text.split()]
        assert tokenizer.join(tokenizer.words(tokens)) == tokenizer.join(tokens)
    assert any(len(token) > 2 for token in tokenizer.tokenize("lowest"))


def test_a_character_without_a_subword_is_an_unknown_token_of_its_own():
    tokenizer = Tokenizer.fit(SENTENCES, split="bpe", normalization="NFC", bpe_size=29)
    assert tokenizer.unknown("low ☃é") == ["☃", "é"]
    assert UNK in tokenizer.encode("☃")
    assert tokenizer.words(tokenizer.tokenize("low ☃")) == ["▁low", "▁☃"]


def test_learnt_subwords_are_deterministic_and_can_be_restored():
    first, second = (Tokenizer.fit(SENTENCES, split="bpe", normalization="NFC", bpe_size=29) for _ in range(2))
    assert first.state() == second.state()
    restored = Tokenizer(**json.loads(json.dumps(first.state())))
    assert restored.encode("newest low") == first.encode("newest low")


def test_language_and_features_become_separate_tokens():
    fields = ["language", "source", "features"]
    texts = ["deu\tab\tV;PST", "nld\tba\tN"]
    tokenizer = Tokenizer.fit(texts, split="characters", normalization="NFC", fields=fields, feature_split=";")
    assert tokenizer.tokenize(texts[0]) == ["<deu>", "a", "b", "[V]", "[PST]"]
    assert tokenizer.symbols == sorted(["<deu>", "<nld>", "[V]", "[PST]", "[N]", "a", "b"])
    assert tokenizer.unknown("eng\tV\tV;FUT") == ["<eng>", "V", "[FUT]"]
    assert [tokenizer.symbols[index - 4] for index in tokenizer.feature_ids()] == ["[N]", "[PST]", "[V]"]
    assert Tokenizer.fit(["[V]"], split="spaces", normalization="NFC").feature_ids() == []
    assert Tokenizer(**tokenizer.state()).encode(texts[1]) == tokenizer.encode(texts[1])


def test_features_can_have_another_separator():
    tokenizer = Tokenizer([], split="characters", fields=["source", "features"], feature_split=", ")
    assert tokenizer.tokenize("a\tV, PST") == ["a", "[V]", "[PST]"]


def test_a_text_without_the_fields_is_refused():
    tokenizer = Tokenizer([], split="characters", fields=["language", "source"])
    with pytest.raises(ValueError, match=r"^a line must be language<TAB>source, got 'ab'$"):
        tokenizer.encode("ab")


def test_the_state_for_plain_text_has_the_keys_of_earlier_versions():
    assert set(Tokenizer(["a"], split="spaces").state()) == {"symbols", "split", "normalization"}


@pytest.mark.parametrize(
    ("split", "bpe", "got"),
    [("bpe", None, "got no bpe and split 'bpe'"), ("spaces", "{}", "got bpe and split 'spaces'")],
)
def test_subwords_must_be_given_with_split_bpe_and_with_no_other_split(split, bpe, got):
    with pytest.raises(ValueError, match=rf"^bpe must be given if split is 'bpe', and only then, {got}$"):
        Tokenizer([], split=split, bpe=bpe)


def test_damaged_subwords_are_refused():
    with pytest.raises(ValueError, match=r"^bpe must be the JSON of a tokenizer, got something else: "):
        Tokenizer([], split="bpe", bpe="{}")
