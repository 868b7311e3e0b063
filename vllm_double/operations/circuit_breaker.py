"""A circuit breaker: after a failure, drafting pauses for a while and is then tried again."""

from collections.abc import Callable
from typing import Literal

from vllm_double.hosting.back_off import BackOff

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Closed in normal operation, open for some time after a failure, then half-open until the next success or failure.

    It stays open for ``first_s`` seconds, or twice as long as before if that was less than ``most_s`` seconds ago, up to
    ``most_s``. clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float], first_s: float = 1.0, most_s: float = 300.0) -> None:
        self._clock = clock
        self._back_off = BackOff(first_s, most_s, healthy_s=most_s)
        self._open_until = float("-inf")
        self.why = ""
        self._is_closed = True

    @property
    def paused_s(self) -> float:
        """Seconds until it is half-open; 0 if it is not open."""
        return max(0.0, self._open_until - self._clock())

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if self._is_closed:
            return "closed"
        return "open" if self.paused_s > 0 else "half-open"

    def failed(self, why: str) -> float:
        """Open; returns for how many seconds. why: continues "paused", for status and log."""
        self.why = why
        now = self._clock()
        pause_s = self._back_off.after(now - self._open_until, came_up=False)
        self._open_until = now + pause_s
        self._is_closed = False
        return pause_s

    def succeeded(self) -> bool:
        """Close if half-open; whether that closed it."""
        closes = self.state == "half-open"
        self._is_closed = self._is_closed or closes
        return closes
