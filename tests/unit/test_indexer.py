"""Indexing beside the target's forwards: who has the proposer when."""

import threading

import numpy as np
import pytest

from tests.references.automaton import check_context
from tests.unit.test_guard import Guarded
from tests.unit.test_proposer import PARAMS, Ticks
from vllm_double.retrieval import ContextRetriever
from vllm_double.target.indexer import Indexer, Turnstile
from vllm_double.target.proposer import Proposer

LONG_S = 20.0


def test_it_indexes_until_nothing_is_left_once_the_turnstile_was_left() -> None:
    slices, done = iter(range(5)), threading.Event()

    def index() -> bool:
        if next(slices) < 4:
            return True
        done.set()
        return False

    turnstile = Turnstile()
    indexer = Indexer(index, turnstile)
    assert not done.is_set(), "nobody was there yet"
    with turnstile, turnstile:
        pass
    assert done.wait(LONG_S)
    indexer.stop()
    assert next(slices, None) is None


def test_the_round_waits_for_one_slice_and_the_indexer_for_the_round() -> None:
    turnstile, began, may_end = Turnstile(), threading.Event(), threading.Event()
    in_round, num_slices = False, 0

    def index() -> bool:
        nonlocal num_slices
        assert not in_round
        num_slices += 1
        began.set()
        may_end.wait(LONG_S)
        return True  # there is always more

    indexer = Indexer(index, turnstile)
    with turnstile:
        pass
    assert began.wait(LONG_S)

    class Noticed:
        """The lock, which lets the slice end as soon as the round waits for it."""

        def __init__(self, lock: threading.RLock) -> None:  # type: ignore[valid-type]
            self.lock = lock

        def acquire(self) -> None:
            may_end.set()
            self.lock.acquire()  # type: ignore[attr-defined]

        def release(self) -> None:
            self.lock.release()  # type: ignore[attr-defined]

    lock, num_before = turnstile.lock, num_slices
    turnstile.lock = Noticed(lock)  # type: ignore[assignment]
    turnstile.__enter__()
    turnstile.lock = lock
    in_round = True
    assert num_slices == num_before, "the round came before another slice"
    in_round = False
    turnstile.__exit__()
    indexer.stop()


def test_an_exception_in_the_indexer_pauses_drafting_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded(worker=False)
    source = ContextRetriever()
    world.protect(Proposer(8, None, [source], Ticks()))
    world.admit("r", [1, 5] * 400)

    def fail(budget: int) -> None:
        raise RuntimeError("something of ours")

    world.index()
    monkeypatch.setattr(source, "work", fail)
    assert world.guarded.index() is False
    monkeypatch.undo()
    assert world.guarded.counters.failures == 1 and world.guarded.breaker.state == "open"
    world.run(2)
    assert world.chains["r"] == []
    world.now += world.guarded.breaker.paused_s
    world.run(3)
    assert world.guarded.breaker.state == "closed" and world.inner.num_requests == 1


def test_a_prompt_is_indexed_by_the_thread_alone() -> None:
    world = Guarded(worker=False)
    source = ContextRetriever()
    world.protect(Proposer(8, None, [source], Ticks()))
    indexed = threading.Event()

    def index() -> bool:
        goes_on = world.guarded.index()
        if not goes_on and source.num_waiting == 0:
            indexed.set()
        return goes_on

    indexer = Indexer(index, world.guarded.turnstile)
    world.guarded.admit("r", np.tile(np.arange(100, dtype=np.int32), 20), PARAMS)
    assert indexed.wait(LONG_S)
    indexer.stop()
    check_context(source)
