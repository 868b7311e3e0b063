"""Indexing of prompts and finished answers beside the target's forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Indexer", "Turnstile"]


class Turnstile:
    """A lock of the thread for whose steps a device waits, and of an `Indexer`, which gets it while that thread is away."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.was_left = threading.Event()
        self.is_wanted = False
        self._depth = 0

    def __enter__(self) -> None:
        self.is_wanted = True
        self.lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.is_wanted = False
            self.was_left.set()
        self.lock.release()


class Indexer:
    """A thread that indexes slice by slice whenever the other thread has left the turnstile, until nothing is left.

    ``index``: indexes a slice, in some 50 us, and returns whether more may wait. It must not raise.
    """

    def __init__(self, index: Callable[[], bool], turnstile: Turnstile) -> None:
        self._index = index
        self._turnstile = turnstile
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="vllm-double-indexer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._has_ended = True
        self._turnstile.was_left.set()
        self._thread.join()

    def _run(self) -> None:
        turnstile = self._turnstile
        while not self._has_ended:
            turnstile.was_left.wait()
            turnstile.was_left.clear()
            goes_on = True
            while goes_on and not turnstile.is_wanted and not self._has_ended:
                with turnstile.lock:
                    goes_on = self._index()
