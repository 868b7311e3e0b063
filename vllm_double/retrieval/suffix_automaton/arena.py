"""One arena for all suffix automata of a process: named records in arrays, and a range of each array for every automaton.

A range of n tokens is [start, start + n) of ``text`` and ``edges``, and twice that of ``states`` and ``table``. Ranges are
powers of two, each at a multiple of its size, so that two neighbours that are free make one again (a buddy allocator).
Address space is reserved once. What is written takes memory, by pages, which is given back when a large range is released.
"""

import mmap
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["BYTES_PER_TOKEN", "NONE", "SPARE", "Arena", "Arrays"]

Ints = npt.NDArray[np.int32]
Records = npt.NDArray[Any]

NONE = -1
"""An absent state, transition, automaton or key."""

STATE = np.dtype([(name, np.int32) for name in ("length", "link", "count", "end", "best", "token", "first", "edges")])
EDGE = np.dtype([(name, np.int32) for name in ("source", "label", "target", "next")])
AUTOMATON = np.dtype(
    [(name, np.int64) for name in ("start", "capacity", "grown_start", "grown_capacity", "num_moved", "length", "serial")]
    + [(name, np.int32) for name in ("num_tokens", "num_states", "num_edges", "window", "window_length", "max_match")],
    align=True,
)
BYTES_PER_TOKEN = 2 * STATE.itemsize + EDGE.itemsize + 2 * 4 + 4
_SLICE = mmap.PAGESIZE  # tokens whose memory is given back at once: whole pages of each array, in some 10 us
_WARM = _SLICE  # ranges of so many tokens keep their memory for the next owner: page faults cost a third of indexing
SPARE = 64
"""Tokens for which there is room before texts grow: then no round waits for that."""
_NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which `mmap` does not name


class Arrays(NamedTuple):
    """What compiled functions work on. Numbers of states and transitions count from the start of their automaton's range."""

    automata: Records
    """``start``, ``capacity``: its range. ``length``: tokens of text, of which ``num_tokens`` are indexed. ``grown_*``: the
    larger range that it is moving to, unless the capacity is 0, and ``num_moved``: tokens whose share has moved. ``window``:
    the state of the last ``window_length`` indexed tokens. ``serial``: its own; none is used twice."""
    states: Records
    """`automaton_steps` says what the fields mean."""
    edges: Records
    """Transitions beyond each state's first: ``source`` and ``target``, ``label``: token, ``next``: of the same source."""
    table: Ints
    """Hash table of transitions: number + 1; 0: empty."""
    text: Ints


def _reserve(num_items: int, dtype: Any) -> tuple[mmap.mmap, npt.NDArray[Any]]:
    """Zeros of which only what is written takes memory, by pages of 4 KiB."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    memory = mmap.mmap(-1, num_items * np.dtype(dtype).itemsize, flags=flags)
    with suppress(OSError):  # a kernel without huge pages, which would take memory that is not written
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, np.frombuffer(memory, dtype)


class Arena:
    """Who owns which range. Not thread-safe."""

    def __init__(self, max_bytes: int = 2 << 30) -> None:
        """``max_bytes``: address space, and so the most memory that all indexes of a process take."""
        num_tokens = max(1, max_bytes // BYTES_PER_TOKEN)
        sizes = ((2 * num_tokens, STATE), (num_tokens, EDGE), (2 * num_tokens, np.int32), (num_tokens, np.int32))
        memories, arrays = zip(*(_reserve(*size) for size in sizes), strict=True)
        self.arrays = Arrays(np.zeros(0, AUTOMATON), *arrays)
        self.num_refused = 0
        """Ranges that there was no room for."""
        self.num_used = 0
        """Tokens of ranges that are owned, or whose memory is still to be given back."""
        self._memories = dict(zip(memories, (64, 16, 8, 4), strict=True))  # bytes per token
        self._free: dict[int, set[int]] = {1 << order: set() for order in range(num_tokens.bit_length())}
        self._slots: list[int] = []
        self._released: deque[list[int]] = deque()  # start, stop and capacity of ranges whose memory is still to be given back
        self._last_serial = 0
        start = 0
        for capacity in reversed(self._free):
            if num_tokens & capacity:
                self._free[capacity].add(start)
                start += capacity

    def open(self, capacity: int, max_match: int) -> int:
        """An empty automaton with room for so many tokens, a power of two; NONE: the arena is full."""
        start = self.allocate(capacity)
        if start == NONE:
            return NONE
        if not self._slots:
            known = len(self.arrays.automata)
            self._slots.extend(range(2 * known + 15, known - 1, -1))
            more = np.zeros(known + 16, AUTOMATON)
            self.arrays = self.arrays._replace(automata=np.append(self.arrays.automata, more))
        slot = self._slots.pop()
        self._last_serial += 1
        self.arrays.automata[slot] = (start, capacity, 0, 0, 0, 0, self._last_serial, 0, 1, 0, 0, 0, max_match)
        self.arrays.states[2 * start] = (0, *(NONE,) * 7)
        return slot

    def close(self, slot: int) -> None:
        """Give an automaton's ranges back."""
        automaton = self.arrays.automata[slot]
        self.release(int(automaton["start"]), int(automaton["capacity"]))
        if automaton["grown_capacity"]:
            self.release(int(automaton["grown_start"]), int(automaton["grown_capacity"]))
        automaton["capacity"] = automaton["serial"] = 0
        self._slots.append(slot)

    def allocate(self, capacity: int) -> int:
        """Where a range of so many tokens starts, whose part of the table is zero; NONE: there is none."""
        found = next((size for size in self._free if size >= capacity and self._free[size]), 0)
        if not found and self._released:
            self.clean(None)
            return self.allocate(capacity)
        if not found:
            self.num_refused += 1
            return NONE
        self.num_used += capacity
        start = self._free[found].pop()
        while found > capacity:
            found //= 2
            self._free[found].add(start + found)
        return start

    def release(self, start: int, capacity: int) -> None:
        """Give a range back. A small one is free at once; `clean` makes a large one free."""
        if capacity > _WARM:
            self._released.append([start, start, capacity])
        else:
            self.arrays.table[2 * start : 2 * (start + capacity)] = 0
            self._merge(start, capacity)

    def clean(self, num_slices: int | None) -> int:
        """Give so many slices of released memory back, or all; the number of slices given back."""
        num_done = 0
        while self._released and num_done != num_slices:
            first, start, capacity = self._released[0]
            for memory, size in self._memories.items():
                memory.madvise(mmap.MADV_DONTNEED, start * size, _SLICE * size)
            self._released[0][1] = start + _SLICE
            num_done += 1
            if start + _SLICE == first + capacity:
                self._released.popleft()
                self._merge(first, capacity)
        return num_done

    def _merge(self, start: int, capacity: int) -> None:
        self.num_used -= capacity
        while start ^ capacity in self._free[capacity]:
            self._free[capacity].remove(start ^ capacity)
            start &= ~capacity
            capacity *= 2
        self._free[capacity].add(start)

    @property
    def num_free(self) -> int:
        """Tokens of ranges that nobody owns."""
        released = sum(capacity for _, _, capacity in self._released)
        return released + sum(capacity * len(starts) for capacity, starts in self._free.items())
