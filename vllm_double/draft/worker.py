"""The draft worker: drafts for ever while the target verifies, and never waits for it."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from vllm_double.draft.engine.base import DraftEngine
from vllm_double.draft.frontier import Frontier, FrontierLimits
from vllm_double.retrieval.base import Source
from vllm_double.transport.base import DraftChannel
from vllm_double.transport.messages import Dropped, WorkerStats

__all__ = ["DraftWorker"]

# Bounds of a wait, which ends early when a command comes. Between them the loop beats its heart and looks whether it should
# stop; an idle server needs that less often than one whose target is busy.
_IDLE_WAIT_S = 0.001
_EMPTY_WAIT_S = 0.05
_REPORT_INTERVAL_S = 0.5
_STEP_WEIGHT = 0.05


class DraftWorker:
    """One draft engine, one frontier, one channel. ``clock`` gives seconds."""

    def __init__(
        self, engine: DraftEngine, channel: DraftChannel, limits: FrontierLimits,
        clock: Callable[[], float] = time.perf_counter, retrievers: Sequence[Source] = (), prefix_caching: bool = True,
    ) -> None:  # fmt: skip
        self.frontier = Frontier(engine, limits, retrievers, prefix_caching)
        self._limits = limits
        self._num_children = min(limits.children_per_node, engine.vocab_size)
        self._engine = engine
        self._channel = channel
        self._clock = clock
        self._last_report = float("-inf")
        self._reported: dict[str, float] = {}
        self._step_seconds = 0.0  # of an iteration that reads no prompt, lately
        self._counters = dict.fromkeys(
            (
                "iterations", "forward_seconds", "rows", "query_tokens", "nodes_published", "records_dropped",
                "answers_not_finite",
            ),
            0.0,
        )  # fmt: skip

    def run(self, should_stop: Callable[[], bool]) -> None:
        """The drafting loop: commands, one forward for the most useful nodes, publish, again."""
        while not (should_stop() or self._channel.superseded):
            if not self.turn():
                self._channel.wait(_IDLE_WAIT_S if len(self.frontier) else _EMPTY_WAIT_S)

    def turn(self) -> bool:
        """One iteration; False if there was nothing to draft."""
        began = self._clock()
        self._channel.beat()
        for command in self._channel.receive():
            self.frontier.apply(command)
        batch = self.frontier.select()
        if (dropped := self.frontier.dropped) and self._channel.report(Dropped(tuple(dropped))):
            dropped.clear()
        if len(batch):
            started = self._clock()
            if copies := self.frontier.tail_copies:
                self._engine.copy_slots(copies)
            tokens, probs = self._engine.forward(batch, self._num_children)
            self._counters["iterations"] += 1
            self._counters["forward_seconds"] += self._clock() - started
            self._counters["rows"] += len(batch)
            self._counters["query_tokens"] += len(batch.token_ids)
            self._counters["answers_not_finite"] += np.count_nonzero(~np.isfinite(probs).all(axis=1))
            records = self.frontier.expand(tokens, probs)
            if len(records) and not self._channel.publish(records):
                self._counters["records_dropped"] += len(records)
            self._counters["nodes_published"] += len(records)
            if len(batch.token_ids) == len(tokens):
                self._note_step(self._clock() - began)
        self._report()
        return len(batch) > 0

    def _note_step(self, seconds: float) -> None:
        """A first step that compiles, or one beside which the machine stood still, is cut."""
        known = self._step_seconds
        if known == 0.0:
            self._last_report = float("-inf")  # the target waits for nobody of whom it does not know this
        self._step_seconds = seconds if known == 0.0 else known + _STEP_WEIGHT * (min(seconds, 3 * known) - known)

    def _report(self) -> None:
        now = self._clock()
        if now - self._last_report < _REPORT_INTERVAL_S:
            return
        self._last_report = now
        values = {
            **self._counters,
            **self.frontier.counters,
            "requests": len(self.frontier),
            "nodes_per_iteration": self._limits.nodes_per_iteration,
            "step_seconds": self._step_seconds,
            "max_length": self.frontier.max_length,
        }
        # A target without requests reads nothing: news alone, or the log is full of statistics when the next one comes.
        if values != self._reported and self._channel.report(WorkerStats(values)):
            self._reported = values
