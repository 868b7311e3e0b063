import math

import pytest
import torch
from double_kernels import top_branches

TOLERANCE = 1e-6  # float32 softmax of at most a few thousand terms

SHAPES = [(1, 1), (1, 7), (3, 33), (5, 257), (2, 3072), (33, 1000), (2, 32801), (40, 3072)]


def slow_top_branches(
    logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """One token after the other, in Python's float64."""
    all_tokens, all_probs = [], []
    for row in range(logits.shape[0]):
        temperature = 1.0 if temperatures is None else float(temperatures[row])
        scores = [float(score) / temperature for score in logits[row].float()]
        highest = max(scores)
        total = math.fsum(math.exp(score - highest) for score in scores)
        best = sorted(range(len(scores)), key=lambda token: (-float(logits[row, token]), token))[:num_children]
        all_tokens.append(best)
        all_probs.append([math.exp(scores[token] - highest) / total for token in best])
    return all_tokens, all_probs


def _compare(logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None = None) -> None:
    tokens, probs = top_branches(logits, num_children, temperatures)
    expected_tokens, expected_probs = slow_top_branches(logits, num_children, temperatures)
    assert tokens.dtype == torch.int64
    assert probs.dtype == torch.float32
    assert tokens.tolist() == expected_tokens
    torch.testing.assert_close(probs, torch.tensor(expected_probs), atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "num_children"),
    [
        pytest.param(rows, vocab, f, id=f"R{rows}-V{vocab}-F{f}")
        for rows, vocab in SHAPES
        for f in sorted({1, min(4, vocab), min(8, vocab), min(vocab, 33)})
    ],
)
def test_top_branches_differ_from_a_sort(num_rows: int, vocab_size: int, num_children: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_rows * vocab_size + num_children)
    logits = (3 * torch.randn(num_rows, vocab_size)).to(dtype)
    temperatures = torch.rand(num_rows) * 2 + 0.1
    _compare(logits, num_children)
    _compare(logits, num_children, temperatures)


@pytest.mark.parametrize("num_children", [1, 2, 3, 5, 9, 10])
def test_higher_token_wins_a_tie(num_children: int) -> None:
    logits = torch.tensor([[1.0, 5, 1, 5, 3, 3, 5, 3, 1, 3], [2.0] * 10, list(range(10))])
    _compare(logits, num_children)


@pytest.mark.parametrize("vocab_size", [300, 32_801])
def test_many_ties_lose_the_order(vocab_size: int) -> None:
    torch.manual_seed(1)
    _compare(torch.randint(-3, 3, (3, vocab_size)).float(), 8)


@pytest.mark.parametrize("place", ["first-block", "last-block", "tail", "all-over"])
def test_best_tokens_of_a_large_vocabulary_are_missed(place: str) -> None:
    vocab_size = 70_001
    best = {
        "first-block": range(8),
        "last-block": range(69_944, 69_952),
        "tail": range(69_993, 70_001),
        "all-over": range(3, 70_000, 9_000),
    }[place]
    logits = torch.zeros(2, vocab_size)
    logits[:, list(best)] = torch.arange(8.0, 0, -1)
    _compare(logits, 8)


def test_temperature_near_zero_overflows() -> None:
    tokens, probs = top_branches(torch.tensor([[80.0, -80.0, 79.0]]), 3, torch.tensor([1e-3]))
    assert tokens.tolist() == [[0, 2, 1]]
    assert probs.tolist() == [[1.0, 0.0, 0.0]]


def test_masked_tokens_get_probability() -> None:
    tokens, probs = top_branches(torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]]), 4)
    assert tokens.tolist() == [[1, 3, 0, 2]]
    assert probs.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_strided_logits_read_the_poison_between_them() -> None:
    backing = torch.full((6, 2 * 51), math.nan)
    backing[::2, ::2] = torch.randn(3, 51)
    _compare(backing[::2, ::2], 5)


def test_logits_are_changed() -> None:
    logits = torch.randn(4, 60)
    before = logits.clone()
    top_branches(logits, 3, torch.full((4,), 0.5))
    assert torch.equal(logits, before)


def test_no_rows_fail() -> None:
    tokens, probs = top_branches(torch.empty(0, 12), 3)
    assert tokens.shape == probs.shape == (0, 3)


@pytest.mark.parametrize(
    ("logits", "num_children", "temperatures"),
    [
        pytest.param(torch.zeros(3), 1, None, id="one-dimension"),
        pytest.param(torch.zeros(3, 4, dtype=torch.int64), 1, None, id="integers"),
        pytest.param(torch.zeros(3, 4), 0, None, id="no-children"),
        pytest.param(torch.zeros(3, 4), 5, None, id="more-children-than-tokens"),
        pytest.param(torch.zeros(3, 4), 2, torch.ones(4), id="temperatures-of-other-rows"),
    ],
)
def test_wrong_arguments_are_taken(logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"must be|num_children"):
        top_branches(logits, num_children, temperatures)
