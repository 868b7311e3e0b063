"""The compiled functions on the draft's arena, each for the types of its arguments."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vllm_double.draft import choice, eviction, request_tree
from vllm_double.draft.arena import DRAW, Arena, Floats, Forward, Ints, Records, make_arena, make_forward, with_slots
from vllm_double.draft.page_pool import PagePool
from vllm_double.jit import machine_code
from vllm_double.retrieval.base import Found
from vllm_double.transport.messages import NODE_DTYPE

__all__ = ["Steps", "steps"]


class Steps(NamedTuple):
    """See the functions. Integers and floats are Python's; what is an array must be one of the same type, unchecked."""

    admit: Callable[[Arena, int], None]
    adopt: Callable[[Arena, int, Ints], None]
    release: Callable[[Arena, int], None]
    commit: Callable[[Arena, Forward, int, int, int, Ints, Ints, Floats], int]
    begin: Callable[[Arena, Forward, int], None]
    read_texts: Callable[[Arena, Forward], int]
    pick: Callable[[Arena, Forward, int, float, float], int]
    note_found: Callable[[Arena, Forward, Found, float], None]
    place: Callable[[Arena, Forward], int]
    expand: Callable[[Arena, Forward, Ints, Floats, Records, Records], int]
    evict: Callable[[Arena, float, int, int], bool]


@functools.cache
def steps() -> Steps:
    """Compiles them, or loads what an earlier process compiled, once."""
    from vllm_double.draft import batch  # imports torch

    pool = PagePool(2)
    arena = with_slots(make_arena(pool.pages, pool.totals, 2, 1, 1, 1, 1, 1), 1)
    forward = make_forward(arena, 1, 1)
    numbers, tokens, floats = np.zeros(1, np.int32), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    return Steps(
        machine_code(request_tree.admit, arena, 0, counts_references=False),
        machine_code(request_tree.adopt, arena, 0, numbers, counts_references=False),
        machine_code(request_tree.release, arena, 0, counts_references=False),
        machine_code(request_tree.commit, arena, forward, 0, 0, 0, numbers, numbers, floats[0], counts_references=False),
        machine_code(choice.begin, arena, forward, 0, counts_references=False),
        machine_code(choice.read_texts, arena, forward, counts_references=False),
        machine_code(choice.pick, arena, forward, 0, 0.0, 0.0, counts_references=False),
        machine_code(choice.note_found, arena, forward, Found(numbers, tokens, floats), 0.0, counts_references=False),
        machine_code(batch.place, arena, forward, counts_references=False),
        machine_code(
            batch.expand, arena, forward, tokens, floats, np.zeros(1, DRAW), np.zeros(1, NODE_DTYPE), counts_references=False
        ),
        machine_code(eviction.evict, arena, 0.0, 0, 0, counts_references=False),
    )
