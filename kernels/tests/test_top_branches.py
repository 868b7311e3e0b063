from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from double_kernels import top_branches
from double_kernels.top_branches import top_branches_reference
from double_kernels.triton_top_branches import MAX_CHILDREN, MAX_VOCAB_SIZE, top_branches_triton

top_branches_module = sys.modules[top_branches.__module__]  # the package has the function under its name
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative, of float32 sums of exponentials in another order; below the smallest normal number anything may be 0.
TOLERANCE = {"rtol": 1e-5, "atol": 1.2e-38}
# On a CPU torch's softmax adds up a row of 70,000 equal terms in so long a chain that 2e-5 of a probability are lost.
REFERENCE_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
Top = Callable[..., tuple[torch.Tensor, torch.Tensor]]
TOPS = [pytest.param(top_branches_reference, id="reference"), pytest.param(top_branches_triton, id="kernel")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def slow_top_branches(
    logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """One token after the other, exponentials in Python's float64."""
    all_tokens, all_probs = [], []
    for row in range(logits.shape[0]):
        temperature = 1.0 if temperatures is None else float(temperatures[row])
        values = logits[row].float().tolist()
        scores = (logits[row].float() / temperature).tolist()  # rounded to float32 as in both implementations
        highest = max(scores)
        total = math.fsum(math.exp(score - highest) for score in scores)
        best = sorted(range(len(scores)), key=lambda token: (-values[token], token))[:num_children]
        all_tokens.append(best)
        all_probs.append([math.exp(scores[token] - highest) / total for token in best])
    return all_tokens, all_probs


def check(top: Top, logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None = None) -> None:
    logits = logits.to(DEVICE)
    tokens, probs = top(logits, num_children, None if temperatures is None else temperatures.to(DEVICE))
    expected_tokens, expected_probs = slow_top_branches(logits.cpu(), num_children, temperatures)
    assert tokens.dtype == torch.int64
    assert probs.dtype == torch.float32
    assert tokens.tolist() == expected_tokens
    tolerance = TOLERANCE if top is top_branches_triton else REFERENCE_TOLERANCE
    torch.testing.assert_close(probs.cpu(), torch.tensor(expected_probs), **tolerance)


SHAPES = [(1, 1), (1, 7), (3, 33), (5, 257), (2, 3072), (7, 1000), (2, 32801), (40, 3072), (3, 32768)]


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "num_children", "dtype"),
    [
        pytest.param(rows, vocab, f, dtype, id=f"R{rows}-V{vocab}-F{f}-{dtype}".replace("torch.", ""))
        for rows, vocab in SHAPES
        for f in sorted({1, min(8, vocab), min(vocab, 33)})
        # The dtype matters to the order of the keys alone: in 16 bits one count and three shapes will do.
        for dtype in (DTYPES if f == 8 and vocab in (33, 3072, 32801) else DTYPES[:1])
    ],
)
def test_top_branches_are_those_of_a_sort(
    num_rows: int, vocab_size: int, num_children: int, dtype: torch.dtype, top: Top
) -> None:
    if top is top_branches_triton and DEVICE == "cpu":
        num_rows = min(num_rows, 3)  # the interpreter is slow
    torch.manual_seed(num_rows * vocab_size + num_children)
    logits = (3 * torch.randn(num_rows, vocab_size)).to(dtype)
    temperatures = torch.rand(num_rows) * 2 + 0.1
    check(top, logits, num_children, temperatures if num_children % 2 else None)


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_children", [1, 2, 3, 5, 9, 10])
def test_the_lower_token_wins_a_tie(num_children: int, dtype: torch.dtype, top: Top) -> None:
    logits = torch.tensor([[1.0, 5, 1, 5, 3, 3, 5, 3, 1, 3], [2.0] * 10, list(range(10)), [0.0, -0.0] * 5, [-0.0, 0.0] * 5])
    check(top, logits.to(dtype), num_children)


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("vocab_size", [300, 32_801])
def test_many_ties_keep_the_order(vocab_size: int, top: Top) -> None:
    torch.manual_seed(1)
    check(top, torch.randint(-3, 3, (3, vocab_size)).float(), 8)


@pytest.mark.parametrize("vocab_size", [9, 130, 3072, 33_000], ids="V{}".format)
def test_all_tokens_are_those_of_a_sort(vocab_size: int) -> None:
    torch.manual_seed(4)
    num_rows = -(-8192 // vocab_size)
    check(top_branches_reference, torch.randint(-40, 40, (num_rows, vocab_size)).float(), vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(16, 3072), (16, 3077), (5, 2000), (3, 32_768 + 5 * 128), (3, 32_768 + 101)]
)
def test_a_tie_of_the_cut_reaches_over_blocks(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """The cut falls among equal scores in several blocks and behind them; every row has a cut of its own."""
    torch.manual_seed(5)
    logits = torch.randn(num_rows, vocab_size)
    for row in range(num_rows):
        logits[row, torch.randperm(vocab_size)[: 3 + row % 4]] = 9.0
        logits[row, torch.randperm(vocab_size)[:40]] = 6.0 + row
        logits[row, [0, 63, 64, 127, 128, vocab_size - 1]] = 6.0 + row
    check(top_branches_reference, logits.to(dtype), 8)
    check(top_branches_reference, (logits - 8).to(dtype), 32)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_with_fewer_possible_tokens_than_are_wanted_are_those_of_a_sort(masked: bool) -> None:
    """Every other token is level with the cut."""
    logits = torch.full((9, 3072), -math.inf if masked else 0.0)
    logits[:, 5:3072:700] = torch.arange(5.0)
    check(top_branches_reference, logits, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_sorts_beyond_the_bounds_of_its_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    torch.manual_seed(6)
    check(top_branches_reference, torch.randn(5, 3072).to(dtype), 33, torch.rand(5) + 0.5)
    check(top_branches_reference, torch.tensor([[0.0, -0.0] * 5, [1.0] * 10, [-0.0, 0.0] * 5]).to(dtype), 9)


@pytest.mark.parametrize("with_temperatures", [False, True])
def test_rows_are_taken_in_parts(with_temperatures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 3072, device=DEVICE)
    temperatures = torch.rand(11, device=DEVICE) + 0.5 if with_temperatures else None
    tokens, probs = top_branches_reference(logits, 8, temperatures)
    monkeypatch.setattr(top_branches_module, "_MOST_SCORES", 4 * 3072 + 1)
    in_parts = top_branches_reference(logits, 8, temperatures)
    assert torch.equal(in_parts[0], tokens)
    torch.testing.assert_close(in_parts[1], probs)


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("place", ["first-block", "last-block", "tail", "all-over"])
def test_best_tokens_of_a_large_vocabulary_are_found(place: str, top: Top) -> None:
    vocab_size = 70_001
    best = {
        "first-block": range(8),
        "last-block": range(69_944, 69_952),
        "tail": range(69_993, 70_001),
        "all-over": range(3, 70_000, 9_000),
    }[place]
    logits = torch.zeros(2, vocab_size)
    logits[:, list(best)] = torch.arange(8.0, 0, -1)
    check(top, logits, 8)


def test_largest_vocabulary_and_most_children_are_those_of_a_sort() -> None:
    torch.manual_seed(3)
    check(top_branches_triton, (4 * torch.randn(1, MAX_VOCAB_SIZE)).bfloat16(), MAX_CHILDREN, torch.tensor([0.7]))


@pytest.mark.parametrize("shape", [(1, MAX_VOCAB_SIZE + 1, 1), (1, 100, MAX_CHILDREN + 1)], ids=["vocabulary", "children"])
def test_the_kernel_refuses_larger_vocabularies_and_more_children(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="children"):
        top_branches_triton(torch.zeros(*shape[:2], device=DEVICE), shape[2])


@pytest.mark.parametrize("shape", [(1, MAX_VOCAB_SIZE + 1, 2), (2, 100, MAX_CHILDREN + 1)], ids=["vocabulary", "children"])
def test_larger_vocabularies_and_more_children_go_to_the_reference(shape: tuple[int, int, int]) -> None:
    check(top_branches, torch.arange(shape[0] * shape[1]).remainder(1013).view(shape[:2]).float(), shape[2])


@pytest.mark.parametrize("top", TOPS)
def test_temperature_near_zero_overflows_nowhere(top: Top) -> None:
    tokens, probs = top(torch.tensor([[80.0, -80.0, 79.0]], device=DEVICE), 3, torch.tensor([1e-3], device=DEVICE))
    assert tokens.tolist() == [[0, 2, 1]]
    assert probs.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens_get_no_probability(dtype: torch.dtype, top: Top) -> None:
    tokens, probs = top(torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]], dtype=dtype, device=DEVICE), 4)
    assert tokens.tolist() == [[1, 3, 0, 2]]
    assert probs.tolist() == [[0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize("top", TOPS)
def test_a_tile_of_masked_tokens_does_not_spoil_its_row(top: Top) -> None:
    logits = torch.full((2, 9000), -math.inf, device=DEVICE)
    logits[0, 8999] = logits[1, 3] = 1.0
    tokens, probs = top(logits, 2)
    assert tokens.tolist() == [[8999, 0], [3, 0]]
    assert probs.tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, "all-masked", "all-nan"], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_without_a_distribution_gets_nan_and_spares_its_neighbours(
    value: float | str, dtype: torch.dtype, top: Top
) -> None:
    torch.manual_seed(2)
    logits = torch.randint(-2, 3, (3, 5000)).to(dtype).to(DEVICE)
    if value == "all-masked":
        logits[1] = -math.inf
    elif value == "all-nan":
        logits[1] = math.nan
    else:
        assert isinstance(value, float)
        logits[1, 4800] = torch.tensor(value, dtype=dtype)
    tokens, probs = top(logits, 9)
    assert probs[1].isnan().all()
    assert len(set(tokens[1].tolist())) == 9 and int(tokens[1].min()) >= 0 and int(tokens[1].max()) < 5000
    if value in (math.inf, "all-masked"):
        assert tokens[1].tolist() == slow_order(logits[1], 9)
    for row in (0, 2):
        assert tokens[row].tolist() == slow_order(logits[row], 9)
        torch.testing.assert_close(probs[row], logits[row].float().softmax(-1)[tokens[row]], **TOLERANCE)


def test_nan_beside_a_tie_is_survived() -> None:
    tokens, probs = top_branches_reference(torch.tensor([[1.0, math.nan, 1.0, 0.0]]), 3)
    assert sorted(tokens[0].tolist()) == [0, 1, 2]
    assert probs.isnan().all()


def slow_order(logits: torch.Tensor, num_children: int) -> list[int]:
    values = logits.float().tolist()
    return sorted(range(len(values)), key=lambda token: (-values[token], token))[:num_children]


@pytest.mark.parametrize("top", TOPS)
def test_strided_logits_are_read_without_what_lies_between(top: Top) -> None:
    backing = torch.full((6, 2 * 51), math.nan)
    backing[::2, ::2] = torch.randn(3, 51)
    check(top, backing.to(DEVICE)[::2, ::2], 5)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter copies the whole storage, 4 GiB here")
def test_rows_are_wider_than_int32() -> None:
    logits = torch.empty((1 << 31) + 600, dtype=torch.float16, device="cuda").as_strided((2, 500), ((1 << 31) + 8, 1))
    logits.copy_(torch.randn(2, 500))
    check(top_branches_triton, logits, 5)


@pytest.mark.parametrize("top", TOPS)
def test_logits_are_not_changed(top: Top) -> None:
    logits = torch.randn(4, 60, device=DEVICE)
    before = logits.clone()
    top(logits, 3, torch.full((4,), 0.5, device=DEVICE))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("top", TOPS)
def test_no_rows_give_no_tokens(top: Top) -> None:
    tokens, probs = top(torch.zeros(0, 12, device=DEVICE), 3)
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
def test_wrong_arguments_are_refused(logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"must be|num_children"):
        top_branches(logits, num_children, temperatures)


@pytest.mark.parametrize("spread", [1, 3, 40, 4000])
@pytest.mark.parametrize("vocab_size", [4096, 4099])
@pytest.mark.parametrize("num_children", [1, 8, 32, 300])
def test_of_equal_logits_in_large_vocabularies_the_lower_id_is_taken(spread: int, vocab_size: int, num_children: int) -> None:
    """On a CPU most of a large vocabulary is passed over by groups, which tie, too."""
    generator = torch.Generator().manual_seed(spread)
    logits = torch.randint(spread, (8, vocab_size), generator=generator).float()
    logits[0, ::2] *= -0.0  # which equals 0.0
    tokens, _ = top_branches_reference(logits, num_children)
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_children]
    torch.testing.assert_close(tokens, expected)
