"""Whether the target waits for the draft's next tokens.

After an outcome that was not prepared the target has nothing to verify, and its next forward gives one token; after an unlikely
outcome it has little. The draft's next token comes with the draft's next forward. To wait for it pays if it brings more tokens
than the whole batch would have decoded meanwhile. That is an optimal-stopping problem. Its one-step look-ahead rule is optimal,
because each further token is accepted less often than the one before (Chow and Robbins 1961). All its figures are measured:
nothing here reads a clock by itself.

A forward that verifies nothing has one merit: the draft prepares for its one outcome alone, and so misses the next outcome less
often than behind a chain. What that is worth is charged to the wait. The arithmetic is in `_wait_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from vllm_double.target._wait_steps import FIRST_STEPS
from vllm_double.target.draft_link import DraftLink
from vllm_double.target.means import Means, observe, value
from vllm_double.target.stats import Counters

__all__ = ["Waiting"]

_SILENCE = 1.5  # draft steps without a heartbeat after which the worker is late


class Waiting:
    """The target's waits for the draft. ``clock`` gives seconds. ``step_s``: of the draft; 0 before the worker reports it."""

    def __init__(self, link: DraftLink, counters: Counters, clock: Callable[[], float]) -> None:
        self.means = Means.empty()
        self.step_s = 0.0
        self._link = link
        self._counters = counters
        self._clock = clock
        self._late_beat = -1  # the heartbeat of a worker that was waited for in vain

    def is_prompt(self) -> bool:
        """Whether the worker is not late; takes in how long its steps take."""
        self.step_s = self._counters.worker.get("step_seconds", 0.0)
        return self._link.heartbeat != self._late_beat

    def wait(self, look: Callable[[], tuple[int, float]], tokens_per_s: float, num_known: int) -> Generator[None, None, float]:
        """Wait for the next draft tokens of some rows, while that pays; returns the seconds.

        look: takes in what has come; returns how many tokens are known, and what the next ones are worth, in tokens.
        tokens_per_s: of the batch, without waiting. num_known: tokens before.
        """
        means, link, silence_s = self.means, self._link, _SILENCE * self.step_s
        began = seen = came = self._clock()
        beat, num_before, has_come = link.heartbeat, num_known, False
        while True:
            yield
            num_found, worth = look()
            now = self._clock()
            if link.heartbeat != beat:
                beat, seen = link.heartbeat, now
            if num_found > num_known:
                observe(means.next_s if has_come else means.first_s, now - (came if has_come else began))
                num_known, came, has_come = num_found, now, True
                if worth <= tokens_per_s * value(means.next_s, self.step_s):
                    break
            if now - seen > silence_s or now - came > value(means.first_s, FIRST_STEPS * self.step_s) + silence_s:
                self._late_beat = beat
                break
        self._counters.waited(now - began, num_known > num_before)
        return now - began
