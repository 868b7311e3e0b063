"""What each mend of vLLM's CPU sampler does, and that vLLM's own function still needs it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.mended import cpu_kernels, without

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

__all__ = ["cpu_kernels"]  # a fixture is used by being imported


@pytest.mark.parametrize(
    ("values", "replace_from", "replace_to", "expected"),
    [
        (torch.tensor([0.7, 0.0, 1.3]), 0, 1, torch.tensor([0.7, 0.7, 1.3])),
        (torch.tensor([0.7, 0.0, 0.0]), 0, 1, torch.tensor([0.7, 0.7, 1.0])),
        (torch.tensor([0.95, 0.1, 0.3]), 0, 0, torch.tensor([0.95, 0.95, 0.3])),
        (torch.tensor([40, 1, 0], dtype=torch.int32), 0, 0, torch.tensor([40, 40, 0], dtype=torch.int32)),
    ],
    ids=["temperature", "greedy-temperature", "top_p", "top_k"],
)
def test_parameters_of_drafted_rows_are_the_requests(
    cpu_kernels: Any, values: Any, replace_from: int, replace_to: int, expected: Any
) -> None:
    ends = torch.tensor([2, 2, 3], dtype=torch.int32)
    untouched = torch.full((3,), -7, dtype=values.dtype)
    output = untouched.clone()
    before = values.clone()
    cpu_kernels._expand_kernel_impl(output, values, ends, replace_from, replace_to, MAX_NUM_TOKENS=128)
    assert torch.equal(output, expected)
    assert output.dtype == values.dtype
    assert torch.equal(values, before)
    with without("vllm.utils.cpu_triton_utils:_expand_kernel_impl"):
        output = untouched.clone()
        cpu_kernels._expand_kernel_impl(output, values, ends, replace_from, replace_to, MAX_NUM_TOKENS=128)
        assert torch.equal(output, untouched), "vLLM mended this: the entry can go"


def sample_rows(kernels: Any, drafts: list[int], lengths: list[int], probs: Any, **others: Any) -> list[list[int]]:
    """One call of the random kernel: recovered tokens are 100 + position, bonus tokens 200 + row."""
    num_rows, width = len(lengths), max(lengths) + 1
    output = torch.full((num_rows, width), -1, dtype=torch.int32)
    draft_probs = others.get("draft_probs")
    kernels._rejection_random_sample_kernel_impl(
        output,
        torch.tensor(lengths, dtype=torch.int32).cumsum(0).int(),
        torch.tensor(drafts, dtype=torch.int32),
        draft_probs,
        probs,
        200 + torch.arange(num_rows).unsqueeze(1),
        100 + torch.arange(len(drafts), dtype=torch.int32),
        torch.full((len(drafts),), 0.5, dtype=torch.float64),
        torch.tensor(others.get("greedy", [False] * num_rows)),
        width - 1,
        probs.shape[1],
        None,
        draft_probs is None,
        False,
    )
    return [[int(token) for token in row] for row in output]


def test_padding_is_rejected(cpu_kernels: Any) -> None:
    # The last probability of the row before a padding is 1: what stands at index -1 of the padding's own row.
    probs = torch.tensor([[0.0, 0.0, 1.0]]).repeat(5, 1)
    drafts, lengths = [2, -1, 2, -1, -1], [3, 0, 2]
    expected = [[2, 101, -1, -1], [201, -1, -1, -1], [103, -1, -1, -1]]
    assert sample_rows(cpu_kernels, drafts, lengths, probs) == expected
    with without("vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl"):
        assert sample_rows(cpu_kernels, drafts, lengths, probs) != expected, "vLLM mended this: the entry can go"


def test_padding_is_rejected_where_draft_probabilities_underflow(cpu_kernels: Any) -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]]).repeat(2, 1)
    draft_probs = torch.tensor([[1e-45, 0.0, 1.0]]).repeat(2, 1)
    assert sample_rows(cpu_kernels, [-1, -1], [2], probs, draft_probs=draft_probs) == [[100, -1, -1]]


def test_rejecting_padding_leaves_other_rows_and_the_arguments_as_they_are(cpu_kernels: Any) -> None:
    probs = torch.tensor([[0.6, 0.4, 0.0]]).repeat(6, 1)
    drafts, lengths = [0, 0, 1, 0, 0, -1], [2, 2, 2]
    rows = sample_rows(cpu_kernels, drafts, lengths, probs, greedy=[False, False, True])
    assert rows == [[0, 0, 200], [102, -1, -1], [-1, -1, -1]]
    with without("vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl"):
        unpadded = [*drafts[:4], 0, 0]
        rows = sample_rows(cpu_kernels, unpadded, lengths, probs)
    assert sample_rows(cpu_kernels, unpadded, lengths, probs) == rows


def test_greedy_kernel_accepts_no_padding_and_keeps_the_bonus(cpu_kernels: Any) -> None:
    output = torch.full((4, 3), -1, dtype=torch.int32)
    cpu_kernels._rejection_greedy_sample_kernel_impl(
        output,
        torch.tensor([2, 2, 4, 6], dtype=torch.int32),
        torch.tensor([4, 5, -1, 7, 8, -1], dtype=torch.int32),
        torch.tensor([4, 5, 6, 7, 8, 9]),
        torch.tensor([[20], [21], [22], [23]]),
        None,
        2,
    )
    assert output.tolist() == [[4, 5, 20], [21, -1, -1], [6, -1, -1], [8, 9, -1]]


def recover(kernels: Any, drafts: list[int], probs: Any, draft_probs: Any) -> list[int]:
    output = torch.empty(len(drafts), dtype=torch.int32)
    kernels._sample_recovered_tokens_kernel_impl(
        output,
        torch.tensor([len(drafts)], dtype=torch.int32),
        torch.tensor(drafts, dtype=torch.int32),
        draft_probs,
        probs,
        torch.ones(1, probs.shape[1]),
        probs.shape[1],
        8192,
        draft_probs is None,
        False,
    )
    return [int(token) for token in output]


def test_the_token_in_place_of_padding_is_drawn_from_the_target(cpu_kernels: Any) -> None:
    probs = torch.tensor([[0.6, 0.4]]).repeat(3, 1)
    draft_probs = torch.tensor([[0.9, 0.1]]).repeat(3, 1)
    drafts = [0, -1, 0]
    assert recover(cpu_kernels, drafts, probs, None) == [1, 0, 1]
    assert recover(cpu_kernels, drafts, probs, draft_probs) == [1, 0, 1]
    assert torch.equal(draft_probs, torch.tensor([[0.9, 0.1]]).repeat(3, 1))
    with without("vllm.utils.cpu_triton_utils:_sample_recovered_tokens_kernel_impl"):
        assert recover(cpu_kernels, drafts, probs, None) == [1, 0, 1]
        assert recover(cpu_kernels, drafts, probs, draft_probs) == [1, 1, 1], "vLLM mended this: the entry can go"
