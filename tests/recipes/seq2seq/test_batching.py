import itertools
import random

import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader

from recipes.seq2seq.data import batching
from recipes.seq2seq.data.batching import BatchByLength, Row, collate, pad
from recipes.seq2seq.tokenizer import BOS, EOS, PAD


def random_lengths(count, seed=0):
    rng = random.Random(seed)
    return [(rng.randint(2, 23), rng.randint(2, 19)) for _ in range(count)]


def make_loader(count=103, batch_size=7, seed=0):
    lengths = random_lengths(count)
    # The first id identifies the row.
    rows = [Row([100 + i, *[5] * (s - 2), EOS], [4] * (t - 1) + [EOS]) for i, (s, t) in enumerate(lengths)]
    sampler = BatchByLength(lengths, batch_size, shuffle=True, seed=seed)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, generator=torch.Generator())


def members(batches):
    return [batch["source"][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 7), (7, 7), (103, 7), (1009, 11)])
def test_every_example_comes_once(count, batch_size, shuffle):
    batches = BatchByLength(random_lengths(count), batch_size, shuffle=shuffle, seed=3)
    got = list(batches)
    assert sorted(itertools.chain(*got)) == list(range(count))
    assert len(got) == len(batches)
    assert sorted(map(len, got))[1:] == [batch_size] * (len(got) - 1)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        batches = BatchByLength(random_lengths(103), 7, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(first != second for first, second in itertools.combinations(orders, 2))


def test_repeated_passes_of_one_epoch_are_equal():
    batches = BatchByLength(random_lengths(103), 7, shuffle=True, seed=0)
    assert list(batches) == list(batches)


def test_few_batches_are_the_same_in_two_epochs():
    batches = BatchByLength(random_lengths(2003), 7, shuffle=True, seed=0)
    first = {frozenset(batch) for batch in batches}
    batches.set_epoch(1)
    assert len(first & {frozenset(batch) for batch in batches}) < 0.05 * len(first)


def test_shuffled_batches_have_similar_lengths():
    lengths = random_lengths(2003)

    def padding(groups):
        return sum(len(group) * max(lengths[i][0] for i in group) for group in groups) - sum(s for s, _ in lengths)

    unsorted = [range(start, min(start + 7, 2003)) for start in range(0, 2003, 7)]
    assert padding(BatchByLength(lengths, 7, shuffle=True, seed=0)) < 0.2 * padding(unsorted)


def test_the_first_tenth_of_an_epoch_is_a_fair_sample():
    """Lightning can end an epoch early: over many epochs, the first tenth must contain all examples and lengths."""
    lengths = random_lengths(2003)
    batches = BatchByLength(lengths, 7, shuffle=True, seed=0)
    totals, counts = 0, [0] * len(lengths)
    for epoch in range(200):
        batches.set_epoch(epoch)
        for batch in itertools.islice(batches, len(batches) // 10):
            totals += len(batch)
            for index in batch:
                counts[index] += 1
    drawn = sum(count * source for count, (source, _) in zip(counts, lengths, strict=True)) / totals
    assert drawn == pytest.approx(sum(source for source, _ in lengths) / len(lengths), rel=0.02)
    assert min(counts) > 5  # 20 expected for each


def test_without_shuffling_examples_are_sorted_by_source_length_then_target_length():
    lengths = random_lengths(103)
    batches = BatchByLength(lengths, 7, shuffle=False, seed=0)
    got = [lengths[index] for batch in batches for index in batch]
    assert got == sorted(lengths)
    before = list(batches)
    batches.set_epoch(5)
    assert list(batches) == before


def test_examples_are_sorted_only_within_pools(monkeypatch):
    """With pools of one batch, the lengths in a batch vary almost as much as in the data."""
    monkeypatch.setattr(batching, "POOL", 1)
    lengths = [(index, 2) for index in range(700)]
    spread = [max(batch) - min(batch) for batch in BatchByLength(lengths, 7, shuffle=True, seed=0)]
    assert sum(spread) / len(spread) > 350


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        BatchByLength([1], 0, shuffle=True, seed=0)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [None, 11])
def test_batches_by_tokens_contain_every_example_once_within_the_limit(shuffle, batch_size):
    lengths = [*random_lengths(1009), (211, 3)]  # the last example is longer than the limit
    batches = BatchByLength(lengths, batch_size, batch_tokens=113, shuffle=shuffle, seed=3)
    got = list(batches)
    assert sorted(itertools.chain(*got)) == list(range(1010))
    sizes = [len(batch) * max(max(lengths[index]) for index in batch) for batch in got]
    assert all(size <= 113 or batch == [1009] for size, batch in zip(sizes, got, strict=True))
    assert batch_size is None or max(map(len, got)) == 11
    # Without a limit of examples, shuffled batches are more than three quarters full on average.
    assert shuffle is False or batch_size or sum(sizes) / len(sizes) > 0.75 * 113


def test_every_epoch_has_the_same_number_of_batches_by_tokens():
    """Lightning reads the number of batches only once."""
    batches = BatchByLength(random_lengths(1009), None, batch_tokens=113, shuffle=True, seed=0)
    before = {frozenset(batch) for batch in batches}
    for epoch in range(1, 5):
        batches.set_epoch(epoch)
        assert len(list(batches)) == len(batches) == len(before)
    assert len(before & {frozenset(batch) for batch in batches}) < 0.2 * len(before)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": None}, "batch_size or batch_tokens must be given, got neither"),
        ({"batch_size": None, "batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
    ],
)
def test_invalid_batch_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        BatchByLength([(1, 1)], **sizes, shuffle=True, seed=0)


def test_lightning_sets_the_epoch():
    loader = make_loader()
    first = members(loader)
    _set_sampler_epoch(loader, 1)
    second = members(loader)
    assert first != second
    _set_sampler_epoch(loader, 0)
    assert members(loader) == first


def test_an_epoch_set_after_iter_is_used():
    """Lightning calls iter() before it sets the epoch when a run starts or resumes."""
    loader, expected = make_loader(), make_loader()
    _set_sampler_epoch(expected, 3)
    batches = iter(loader)
    _set_sampler_epoch(loader, 3)
    assert members(batches) == members(expected)


def test_loading_neither_reads_nor_changes_the_global_random_state():
    torch.manual_seed(1)
    random.seed(1)
    first = members(make_loader())
    torch.manual_seed(2)
    random.seed(2)
    before, before_python = torch.get_rng_state(), random.getstate()
    assert members(make_loader()) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == before_python


def test_rows_are_padded_to_the_longest():
    padded = pad([[5, EOS], [6, 7, 8, EOS], [EOS]])
    assert padded.dtype == torch.long
    assert padded.tolist() == [[5, EOS, PAD, PAD], [6, 7, 8, EOS], [EOS, PAD, PAD, PAD]]


def test_targets_are_shifted_by_the_start():
    batch = collate([Row([9, EOS], [5, 6, 7, EOS]), Row([9, 8, EOS], [5, EOS])])
    assert batch.keys() == {"source", "target_in", "target_out"}
    assert batch["source"].tolist() == [[9, EOS, PAD], [9, 8, EOS]]
    assert batch["target_in"].tolist() == [[BOS, 5, 6, 7], [BOS, 5, PAD, PAD]]
    assert batch["target_out"].tolist() == [[5, 6, 7, EOS], [5, EOS, PAD, PAD]]


def test_batches_contain_the_texts_of_their_rows():
    rows = [Row([9, EOS], [5, EOS], "b", [["B"], ["P"]]), Row([8, EOS], [6, EOS], "a", [["A"]], "hun")]
    batch = collate(rows)
    assert batch["sources"] == ["b", "a"]
    assert batch["references"] == [[["B"], ["P"]], [["A"]]]
    assert batch["groups"] == ["", "hun"]
