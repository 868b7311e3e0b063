"""The drafting loop beside an idle target; what it drafts is tested with the proposer."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.fakes.engine import FakeEngine, hashed_logits
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.retrieval import ContextRetriever
from vllm_double.transport.inprocess import in_process_pair
from vllm_double.transport.messages import Admit, Nodes, Release, WorkerStats


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], None]] = {}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [due for due in self.at if due <= self.now]:
            self.at.pop(due)()


def _admit(handle: int) -> Admit:
    tokens = np.arange(4, dtype=np.int32)
    return Admit(
        handle=handle, base=4, tokens=tokens, temperature=0.0, max_length=40, stop_token_ids=(), tenant=""
    )  # fmt: skip


def test_an_idle_worker_sleeps_and_a_command_wakes_it() -> None:
    clock = _Clock()
    target, end = in_process_pair(sleep=clock.sleep)
    engine = FakeEngine(hashed_logits(24), vocab_size=24, num_pages=60, page_size=4, max_length=60)
    worker = DraftWorker(engine, end, FrontierLimits(4, children_per_node=1), clock)
    waits: list[tuple[int, float]] = []

    def wait(seconds: float, wait: Callable[[float], None] = end.wait) -> None:
        began = clock()
        wait(seconds)
        waits.append((len(worker.frontier), clock() - began))

    end.wait = wait  # type: ignore[method-assign]
    clock.at[0.07] = lambda: target.send(_admit(1))
    worker.run(lambda: clock() > 0.1)
    idle = [seconds for requests, seconds in waits if requests == 0]
    busy = [seconds for requests, seconds in waits if requests]
    assert idle[0] == pytest.approx(0.05), "a worker without requests wakes up for nothing"
    assert sum(idle) == pytest.approx(0.07, abs=0.002), "the command did not end the wait"
    assert busy and max(busy) <= 0.0011, "a worker with requests must look every millisecond"


def test_the_worker_tells_how_much_of_the_prompts_it_had_read_before() -> None:
    clock = _Clock()
    target, end = in_process_pair(sleep=clock.sleep)
    engine = FakeEngine(hashed_logits(24), vocab_size=24, num_pages=60, page_size=2, max_length=60)
    worker = DraftWorker(engine, end, FrontierLimits(4), clock)
    for handle in (1, 2):
        target.send(_admit(handle))
        worker.turn()
        target.send(Release(handle))
        clock.now += 1.0
        worker.turn()
    told = [report.values for report in target.drain(1 << 20) if isinstance(report, WorkerStats)]
    assert [(values["prefix_cache_queries"], values["prefix_cache_hits"]) for values in told] == [(4, 0), (4, 0), (8, 2)]
    assert told[-1]["query_tokens"] == 4 + 2


def test_an_idle_worker_fills_the_log_with_what_has_not_changed() -> None:
    clock = _Clock()
    target, end = in_process_pair(sleep=clock.sleep)
    engine = FakeEngine(hashed_logits(24), vocab_size=24, num_pages=60, page_size=4, max_length=60)
    worker = DraftWorker(engine, end, FrontierLimits(4), clock)
    for _ in range(100):
        clock.now += 1.0
        worker.turn()
    target.send(_admit(1))
    worker.turn()
    target.send(Release(1))
    for _ in range(100):
        clock.now += 1.0
        worker.turn()
    told = [report.values for report in target.drain(1 << 20) if isinstance(report, WorkerStats)]
    assert len(told) == 2 and told[1]["iterations"] == 1


def test_a_draft_that_overflows_for_one_request_is_counted_and_leaves_the_others_their_drafts() -> None:
    target, end = in_process_pair()
    sound = hashed_logits(24)

    def logits(context: Sequence[int]) -> np.ndarray:
        return np.full(24, np.nan, np.float32) if context[0] == 7 else sound(context)

    for children, retrievers in ((1, [ContextRetriever()]), (4, [])):
        engine = FakeEngine(logits, vocab_size=24, num_pages=60, page_size=4, max_length=60)
        clock = _Clock()
        worker = DraftWorker(engine, end, FrontierLimits(4, children_per_node=children), clock, retrievers)
        for handle, first in ((1, 7), (2, 3)):
            tokens = np.array([first, *[1, 2, 3] * 4], np.int32)
            target.send(Admit(handle, len(tokens), tokens, 0.0, 40, (), ""))
        for _ in range(8):
            clock.now += 1.0
            worker.turn()
        reports = target.drain(1 << 20)
        told = [report.values["answers_not_finite"] for report in reports if isinstance(report, WorkerStats)]
        assert told[-1] >= 1
        nodes = np.concatenate([report.records for report in reports if isinstance(report, Nodes)])
        assert np.count_nonzero(nodes["handle"] == 2) > 4
        assert not nodes["probs"][nodes["handle"] == 1].any()
        for handle in (1, 2):
            target.send(Release(handle))
        worker.turn()
        target.drain(1 << 20)
