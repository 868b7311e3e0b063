"""The end of a text at a known address, against a list."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_double.retrieval.buffers import Recent

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
STEPS = st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 100)), max_size=40)


def read(address: int, num_tokens: int) -> list[int]:
    return list((ctypes.c_int32 * num_tokens).from_address(address))


@given(st.integers(1, 12), STEPS)
def test_a_lookup_finds_the_end_of_the_text_and_the_tail(keep: int, steps: list[tuple[list[int], list[int], int]]) -> None:
    recent, text = Recent(keep), list[int]()
    for tokens, tail, room in steps:
        recent.append(np.array(tokens, np.int32) if len(tokens) % 2 else tokens)
        text += tokens
        end = recent.write_behind(tail, room)
        assert min(len(text), keep) <= recent.length <= len(text)
        assert read(end - 4 * recent.length, recent.length + len(tail)) == text[len(text) - recent.length :] + tail
        ctypes.memset(end, 0xFF, 4 * (len(tail) + room))  # a lookup may write behind the text


@pytest.mark.parametrize("num_tokens", [1, 8, 100])
def test_what_is_refused_is_not_kept(num_tokens: int) -> None:
    recent = Recent(4)
    recent.append([1, 2])
    with pytest.raises(ValueError, match="negative"):
        recent.append([3] * (num_tokens - 1) + [-1])
    assert recent.length == 2
    assert read(recent.write_behind([], 0) - 8, 2) == [1, 2]
