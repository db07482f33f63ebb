import pytest

from recipes.seq2seq.data.synthetic import TASKS, make_sequences

SIZES = {"length": 7, "factors": [1, 3], "symbols": 5, "train": 211, "val": 13, "test": 11}


@pytest.mark.parametrize("task", TASKS)
def test_the_splits_have_the_given_sizes_lengths_and_groups(task):
    splits = make_sequences(task, **SIZES)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (211, 13, 22)
    assert [example.group for example in splits.test] == ["x1"] * 11 + ["x3"] * 11
    lengths = {group: {len(e.source.split()) for e in splits.test if e.group == group} for group in ("x1", "x3")}
    # A retrieval sequence has complete pairs of key and value, followed by the requested key.
    assert lengths == ({"x1": {7}, "x3": {21}})
    seen = {len(example.source.split()) for example in splits.train}
    assert seen == ({3, 5, 7} if task == "retrieval" else set(range(1, 8)))


@pytest.mark.parametrize(
    ("task", "answer"),
    [("copy", lambda tokens: tokens), ("reverse", lambda tokens: tokens[::-1]), ("sort", lambda t: sorted(t, key=int))],
)
def test_answers_of_copy_reverse_and_sort(task, answer):
    for example in make_sequences(task, **SIZES | {"symbols": 23}).test:
        assert example.references[0].split() == answer(example.source.split())


def test_a_retrieval_input_of_even_length_has_one_token_more():
    splits = make_sequences("retrieval", **SIZES | {"length": 8})
    lengths = {group: {len(e.source.split()) for e in splits.test if e.group == group} for group in ("x1", "x3")}
    assert lengths == {"x1": {9}, "x3": {25}}
    assert {len(example.source.split()) for example in splits.train} == {3, 5, 7, 9}


def test_the_answer_to_a_key_is_its_value():
    for example in make_sequences("retrieval", **SIZES).test:
        *pairs, asked = example.source.split()
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(values) == len(pairs) // 2  # keys are distinct
        assert example.references == (values[asked],)


def test_training_sequences_contain_every_token_of_the_test_sequences():
    splits = make_sequences("retrieval", **SIZES)
    known = {token for example in splits.train for token in example.source.split()}
    assert {token for example in splits.test for token in example.source.split()} <= known


def test_sequences_are_a_function_of_the_seed():
    assert make_sequences("copy", **SIZES) == make_sequences("copy", **SIZES)
    assert make_sequences("copy", **SIZES).train != make_sequences("copy", **SIZES, seed=1).train


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "add"}, ValueError, "generate.task must be one of copy, reverse, sort, retrieval, got 'add'"),
        ({"task": "copy", "length": 0}, ValueError, "generate.length must be at least 1, got 0"),
        ({"task": "copy", "factors": [1, 0.5]}, TypeError, "generate.factors[1] must be a whole number, got 0.5"),
        ({"task": "copy", "factors": []}, ValueError, "generate.factors must hold at least one factor, got none"),
    ],
)
def test_invalid_arguments_raise_an_error(arguments, error, message):
    with pytest.raises(error) as caught:
        make_sequences(**arguments)
    assert str(caught.value) == message
