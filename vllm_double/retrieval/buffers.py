"""Tokens at known addresses: to hand an array over to compiled code costs as much as all the rest of a short call."""

import math
import mmap
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval._steps import MAX_CONTINUATION
from vllm_double.retrieval.base import Continuation, Tokens, check_tokens

__all__ = ["MAX_CONTINUATION", "Buffer", "Recent", "Scratch", "zeros"]

_FEW = 16  # up to here it is quicker to write one by one
_MAPPED_BYTES = 1 << 20


def zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """An array of which only what is written takes memory, by pages of 4 KiB.

    For large arrays numpy asks for huge pages of 2 MiB. Indexes reserve more than they use, and are no slower without.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < _MAPPED_BYTES:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class Buffer:
    """tokens: int32 [num_tokens]."""

    __slots__ = ("_view", "address", "tokens")

    def __init__(self, num_tokens: int) -> None:
        self.tokens = zeros((num_tokens,), np.int32)
        self._view = memoryview(self.tokens)  # type: ignore[arg-type]
        self.address = self.tokens.ctypes.data

    def write(self, start: int, tokens: Sequence[int] | Tokens) -> None:
        """Write them at start; there must be room. ValueError: one is negative, and some may be written."""
        if len(tokens) <= _FEW:
            view = self._view
            for token in tokens:
                if token < 0:
                    raise ValueError("token ids must not be negative")
                view[start] = token
                start += 1
        else:
            check_tokens(tokens)
            self.tokens[start : start + len(tokens)] = tokens


class Recent:
    """The end of a text, of which the last ``keep`` tokens at least are held, and what a lookup reads and writes behind it."""

    __slots__ = ("_buffer", "_capacity", "_keep", "length")

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._capacity = 8 * keep
        self._buffer = Buffer(self._capacity)
        self.length = 0
        """Tokens held."""

    def append(self, tokens: Sequence[int] | Tokens) -> None:
        """ValueError: one is negative, and none is appended."""
        if len(tokens) > self._keep:
            check_tokens(tokens)
            tokens, self.length = tokens[-self._keep :], 0  # none of what is held remains
        if self.length + len(tokens) > self._capacity:
            self._move(self._capacity)
        self._buffer.write(self.length, tokens)
        self.length += len(tokens)

    def write_behind(self, tail: Sequence[int], room: int) -> int:
        """Write a tail behind the text, not to be held, and have so much room behind it; the address of the text's end."""
        if self.length + len(tail) + room > self._capacity:
            self._move(max(self._capacity, self._keep + len(tail) + room))
        self._buffer.write(self.length, tail)
        return self._buffer.address + 4 * self.length

    def _move(self, capacity: int) -> None:
        last = self._buffer.tokens[max(0, self.length - self._keep) : self.length]
        moved = Buffer(capacity) if capacity > self._capacity else self._buffer
        moved.tokens[: len(last)] = last.copy()
        self._buffer, self._capacity, self.length = moved, capacity, len(last)


class Scratch:
    """What a lookup reads and writes beside an index; one serves any number of them."""

    __slots__ = ("_beliefs", "_out", "feed", "out_address")

    def __init__(self, num_feed: int = 0) -> None:
        """feed: room for tokens to be matched. At ``out_address`` is what `_steps._outputs` tells of."""
        self.feed = Buffer(num_feed)
        self._beliefs = array("d", bytes(20 * MAX_CONTINUATION))
        self._out = memoryview(self._beliefs).cast("B")[8 * MAX_CONTINUATION :].cast("i")
        self.out_address = self._beliefs.buffer_info()[0]

    def continuation(self, num_found: int, match_length: int) -> Continuation | None:
        """What the latest lookup found; None: nothing."""
        if num_found == 0:
            return None
        flat = self._out[: 3 * num_found].tolist()
        return Continuation(flat[::3], match_length, flat[1::3], flat[2::3], self._beliefs[:num_found].tolist())
