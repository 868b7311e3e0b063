"""How long to wait before something that failed is tried again."""

from dataclasses import dataclass

__all__ = ["BackOff"]


@dataclass(slots=True)
class BackOff:
    """Waiting times before restarts: ``first_s`` doubling to ``most_s``, from the start again after a healthy run.

    What did come up is wanted back soon, whoever killed it: then the wait is at most ``most_after_up_s``.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    most_after_up_s: float = 2.0
    healthy_s: float = 60.0
    _next_s: float = 0.0

    def after(self, lasted_s: float, came_up: bool) -> float:
        """Seconds to wait before the next start, after a run of ``lasted_s`` seconds."""
        wait_s = self.first_s if lasted_s >= self.healthy_s or not self._next_s else self._next_s
        if came_up:
            wait_s = min(wait_s, self.most_after_up_s)
        self._next_s = min(2 * wait_s, self.most_s)
        return wait_s
