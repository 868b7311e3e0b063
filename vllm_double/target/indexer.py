"""Indexing of prompts and finished answers beside the target's steps."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Indexer", "Turnstile"]

_IDLE_S = 0.02  # between two looks if nobody calls


class Turnstile:
    """A lock for two threads, the first of which is waited for by a GPU: the second gets it only while the first stays away."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_clear = threading.Event()
        self._is_clear.set()
        self._depth = 0

    def __enter__(self) -> None:
        self._is_clear.clear()
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._is_clear.set()
        self._lock.release()

    def run_behind(self, work: Callable[[], bool]) -> bool:
        """Run ``work``, which is short, for the second thread; returns what it returns."""
        self._is_clear.wait()
        with self._lock:
            return work()


class Indexer:
    """A thread that indexes in short slices as long as something waits to be indexed.

    ``work`` indexes a slice and returns whether there may be more; it never raises. ``turnstile`` keeps it out of the round.
    """

    def __init__(self, work: Callable[[], bool], turnstile: Turnstile) -> None:
        self._work = work
        self._turnstile = turnstile
        self._has_ended = threading.Event()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vllm-double-indexer", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to index."""
        self._news.set()

    def stop(self) -> None:
        """End the thread."""
        self._has_ended.set()
        self._news.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._has_ended.is_set():
            self._news.wait()
            self._news.clear()
            while not self._has_ended.is_set() and self._turnstile.run_behind(self._work):
                pass
