"""The steps of a round, compiled: one call each for the whole batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vllm_double import jit
from vllm_double.retrieval.base import Found
from vllm_double.retrieval.bundle import Indexes
from vllm_double.target import _choose_steps as choosing
from vllm_double.target import _round_steps as steps
from vllm_double.target import _wait_steps as waiting
from vllm_double.target.batch import Batch, Live, Row
from vllm_double.target.calibration import Tables
from vllm_double.target.means import Means
from vllm_double.target.speculation_trie import Search, Tries
from vllm_double.target.stats import Counters
from vllm_double.transport.messages import NODE_DTYPE

__all__ = ["RoundCalls", "calls"]


class RoundCalls(NamedTuple):
    """See `_round_steps`, `_choose_steps`, `_whole_steps` and `_wait_steps`."""

    file_nodes: Callable[..., None]
    commit: Callable[..., int]
    ask: Callable[..., None]
    find_paths: Callable[..., None]
    extend_paths: Callable[..., None]
    find_whole_paths: Callable[..., int]
    choose_awaited: Callable[..., int]
    next_worth: Callable[..., float]
    tokens_per_s: Callable[..., float]
    cut_chains: Callable[..., None]
    pack_commits: Callable[..., tuple[int, int, int]]
    forget_retrieved: Callable[..., None]
    drop_request: Callable[..., None]


@functools.cache
def calls() -> RoundCalls:
    """Compiled at the first call, or read from numba's cache."""
    from vllm_double.target import _whole_steps  # imports torch

    tries, tables, tally, means = Tries.empty(1, 1, 1, 1), Tables.prior(1), Counters().tally, Means.empty()
    rows = Batch.of([Row("", np.zeros(1, np.int32), 1, [0])]).rows
    live, search = Live.empty(1, 1, 1), Search.empty(1)
    ints, session = np.zeros(1, np.int32), np.uint64(1)
    found = Found(np.zeros((1, 1), np.int32), np.zeros((1, 1, 1), np.int32), np.zeros((1, 1, 1), np.float32))
    words, indexes = np.zeros(1, np.uint32), Indexes.empty()
    machine_code = functools.partial(jit.machine_code, counts_references=False)
    paths: tuple[Any, ...] = (tries, tables, search, rows, live, ints, 0.5, found, ints)
    return RoundCalls(
        file_nodes=machine_code(steps.file_nodes, tries, tally, np.zeros(1, NODE_DTYPE)),
        commit=machine_code(steps.commit, tries, tables, tally, means, rows, live, session, indexes),
        ask=machine_code(choosing.ask, live, ints),
        find_paths=machine_code(choosing.find_paths, *paths),
        extend_paths=machine_code(choosing.extend_paths, *paths),
        find_whole_paths=machine_code(_whole_steps.find_whole_paths, *paths, indexes),
        choose_awaited=machine_code(waiting.choose_awaited, tries, live, means, session, 0.5, 0.5, 0.5, ints),
        next_worth=machine_code(waiting.next_worth, tries, live, means, ints, 0.5),
        tokens_per_s=machine_code(waiting.tokens_per_s, means, 1, 0.5, 0.5),
        cut_chains=machine_code(choosing.cut_chains, tries, tally, live, ints, 0.5, 0.5),
        pack_commits=machine_code(
            steps.pack_commits, tries, rows, ints, ints, ints, session, False, 1, 1, words, words.view(np.float32), ints
        ),
        forget_retrieved=machine_code(steps.forget_retrieved, tries),
        drop_request=machine_code(steps.drop_request, tries, 0),
    )
