"""A circuit breaker: what failed is left alone for a while, then tried again."""

from collections.abc import Callable
from typing import Literal

from vllm_double.hosting.back_off import BackOff

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Closed while all goes well, open for some time after a failure, then half-open until the next success or failure.

    It stays open for ``first_s`` seconds; for twice as long as before if less than ``most_s`` seconds have passed since it was
    open last, up to ``most_s``. ``clock`` gives seconds.
    """

    def __init__(self, clock: Callable[[], float], first_s: float = 1.0, most_s: float = 300.0) -> None:
        self._clock = clock
        self._back_off = BackOff(first_s, most_s, healthy_s=most_s)
        self._open_until = float("-inf")
        self.why = ""
        self._is_closed = True

    @property
    def paused_s(self) -> float:
        """Seconds that it is still open; 0 where it is not."""
        return max(0.0, self._open_until - self._clock())

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if self._is_closed:
            return "closed"
        return "open" if self.paused_s > 0 else "half-open"

    def failed(self, why: str) -> float:
        """Open; returns for how many seconds. ``why`` is kept for those who ask."""
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
