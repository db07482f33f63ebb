import pytest
import torch

from sparse_attn.analysis import merge_pieces, word_groups


@pytest.mark.parametrize(
    ("tokens", "groups"),
    [
        (["[CLS]", "un", "##believ", "##able", "story", "[SEP]"], [0, 1, 1, 1, 2, 3]),
        (["<s>", "▁un", "believ", "able", "▁story", "</s>"], [0, 1, 1, 1, 2, 3]),
        (["The", "Ġun", "believ", "able", "Ġstory", "<|endoftext|>"], [0, 1, 1, 1, 2, 3]),
        (["un@@", "believ@@", "able", "story"], [0, 0, 0, 1]),
        (["un", "believable</w>", "story</w>", "."], [0, 0, 1, 2]),
        (["a", "b", "##"], [0, 1, 2]),
        (["a@@", "b", "@@", "c"], [0, 0, 1, 2]),
        ([], []),
    ],
)
def test_word_groups_follow_the_marks_of_tokenizers(tokens: list[str], groups: list[int]) -> None:
    assert word_groups(tokens) == groups


def test_merging_sums_keys_and_averages_queries() -> None:
    weights = torch.rand(2, 3, 5, 7, dtype=torch.float64).softmax(-1)
    queries, keys = [0, 0, 1, 2, 2], [0, 1, 1, 1, 2, 2, 3]
    merged = merge_pieces(weights, queries, keys)
    expected = torch.stack(
        [
            torch.stack(
                [
                    sum(weights[..., q, k] for q in range(5) for k in range(7) if (queries[q], keys[k]) == (i, j))
                    / queries.count(i)
                    for j in range(4)
                ],
                -1,
            )
            for i in range(3)
        ],
        -2,
    )
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(merged.sum(-1), torch.ones(2, 3, 3, dtype=torch.float64))


def test_wrong_numbers_of_groups_raise_an_error() -> None:
    with pytest.raises(ValueError, match=r"query_groups must have one number for each of the queries of .* got 2"):
        merge_pieces(torch.rand(3, 4), [0, 1], [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"key_groups must have one number for each of the keys of .* got 5"):
        merge_pieces(torch.rand(3, 4), [0, 1, 2], [0, 1, 2, 3, 4])


def test_merging_does_not_change_under_autocast() -> None:
    weights = torch.rand(3, 5, 7).softmax(-1)
    groups = [0, 0, 1, 2, 2], [0, 1, 1, 1, 2, 2, 3]
    with torch.autocast("cpu", torch.bfloat16):
        inside = merge_pieces(weights, *groups)
    torch.testing.assert_close(inside, merge_pieces(weights, *groups))
