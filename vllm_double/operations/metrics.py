"""Our numbers on vLLM's /metrics page.

The proposer lives in a worker process, the page in process 0: a collector of the page's own registry asks for them. A server
with several front ends, the default with data parallelism, makes each of its pages from files that all front ends write.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from vllm_double.operations.control_socket import Address, ask
from vllm_double.target.stats import PROPOSE_BUCKETS_S, Counters

__all__ = ["expose", "families", "snapshot"]

_COUNTERS = {
    "rounds": ("vllm:double_target_forwards", "Target forwards that drafts were proposed after."),
    "rows": (
        "vllm:double_request_forwards",
        "Requests times target forwards, those without draft tokens included.",
    ),
    "rows_without_drafts": (
        "vllm:double_request_forwards_without_drafts",
        "Those of them that verified nothing.",
    ),
    "committed_tokens": ("vllm:double_committed_tokens", "Tokens that those forwards gave."),
    "proposed_tokens": ("vllm:double_proposed_tokens", "Draft tokens in proposed chains."),
    "expected_tokens": (
        "vllm:double_expected_tokens",
        "Draft tokens that should be accepted if the calibration is right.",
    ),
    "lookups": ("vllm:double_harvests", "Times that a request asked for drafts."),
    "hits": ("vllm:double_hits", "Times that something was ready behind the last committed token."),
    "late_nodes": ("vllm:double_late_nodes", "Draft records that came after their place was committed."),
    "nodes_evicted": ("vllm:double_nodes_evicted", "Draft records that were dropped for lack of room."),
    "rewinds": ("vllm:double_rewinds", "Texts that shrank."),
    "resynchronisations": (
        "vllm:double_resynchronisations",
        "Requests that were admitted to a worker again.",
    ),
    "rounds_without_worker": (
        "vllm:double_rounds_without_draft",
        "Rounds in which no draft worker was connected.",
    ),
    "failures": (
        "vllm:double_failures",
        "Exceptions in the proposer; drafting paused after each.",
    ),
    "losses": (
        "vllm:double_losses",
        "Times that drafting paused because it cost more time than it saved.",
    ),
    "draft_pauses": (
        "vllm:double_draft_rests",
        "Times that the draft model rested for a request to which it had brought next to nothing.",
    ),
    "draft_first_examples": (
        "vllm:double_draft_first_examples",
        "Committed tokens for which the draft had listed what follows.",
    ),
    "draft_first_accepted": ("vllm:double_draft_first_accepted", "Those of them that were the first of the draft's list."),
    "draft_listed_accepted": (
        "vllm:double_draft_listed_accepted",
        "Those of them that were among the three of the list that the target reads.",
    ),
    "waits": ("vllm:double_waits", "Times that the target waited for the draft's first tokens."),
    "waits_missed": ("vllm:double_waits_missed", "Those of them in which nothing came."),
    "wait_seconds": ("vllm:double_wait_seconds", "Seconds that the target waited for the draft."),
    "worker_restarts": ("vllm:double_worker_restarts", "Restarts of the draft worker."),
}
_WORKER_GAUGES = frozenset({"requests", "nodes_per_iteration", "step_seconds"})
_TIMEOUT_S = 0.5
_SILENCE_S = 30.0  # that a silent engine is not asked for


def snapshot(
    counters: Counters,
    step_cost: tuple[float, float],
    *,
    worker_up: bool,
    worker_restarts: int,
    enabled: bool,
    paused_s: float,
) -> dict[str, Any]:
    """A JSON-able picture of the counters and the worker's state.

    step_cost: StepCost.estimate, in seconds. enabled: the switch. paused_s: CircuitBreaker.paused_s.
    """
    picture = {name: getattr(counters, name) for name in _COUNTERS if hasattr(counters, name)}
    return picture | {
        "worker_restarts": worker_restarts,
        "worker_up": int(worker_up),
        "enabled": int(enabled),
        "paused_seconds": paused_s,
        "step_seconds": step_cost[0],
        "step_token_seconds": step_cost[1],
        "offered": dict(counters.offered),
        "accepted": dict(counters.accepted),
        "propose_seconds": counters.propose_seconds,
        "propose_max_seconds": counters.propose_max_seconds,
        "propose_buckets": list(counters.propose_buckets),
        "worker": dict(counters.worker),
    }


def families(pictures: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    """Metric families from (engine, snapshot) pairs."""
    pictures = list(pictures)
    for key, (name, help_text) in _COUNTERS.items():
        family = CounterMetricFamily(name, help_text, labels=["engine"])
        for engine, picture in pictures:
            family.add_metric([engine], picture[key])
        yield family
    for key in ("offered", "accepted"):
        family = CounterMetricFamily(
            f"vllm:double_{key}_tokens", f"Draft tokens {key}, by source.", labels=["engine", "source"]
        )
        for engine, picture in pictures:
            for source, value in picture[key].items():
                family.add_metric([engine, source], value)
        yield family
    for key, help_text in (
        ("worker_up", "1 while a draft worker answers."),
        ("enabled", "0 while drafting is switched off."),
        ("paused_seconds", "Seconds that drafting still pauses, after an exception or because it did not pay."),
        ("propose_max_seconds", "Longest round so far, in seconds."),
        ("step_seconds", "Seconds of a target forward as learnt, but for what grows with the tokens that it verifies."),
        ("step_token_seconds", "Seconds that another token to verify adds to a target forward, as learnt."),
    ):
        gauge = GaugeMetricFamily(f"vllm:double_{key}", help_text, labels=["engine"])
        for engine, picture in pictures:
            gauge.add_metric([engine], picture[key])
        yield gauge
    histogram = HistogramMetricFamily(
        "vllm:double_propose_seconds",
        "Seconds between two target forwards that proposing took.",
        labels=["engine"],
    )
    for engine, picture in pictures:
        total, buckets = 0, []
        for bound, count in zip([*map(str, PROPOSE_BUCKETS_S), "+Inf"], picture["propose_buckets"], strict=True):
            total += count
            buckets.append((bound, total))
        histogram.add_metric([engine], buckets, picture["propose_seconds"])
    yield histogram
    for key in sorted({key for _, picture in pictures for key in picture["worker"]}):
        kind = GaugeMetricFamily if key in _WORKER_GAUGES else CounterMetricFamily
        worker = kind(f"vllm:double_worker_{key}", f"The draft worker's {key.replace('_', ' ')}.", labels=["engine"])
        for engine, picture in pictures:
            worker.add_metric([engine], picture["worker"].get(key, 0.0))
        yield worker


class _DoubleCollector(Collector):
    """Asks every engine for its snapshot when the page is scraped; an engine that does not answer is left out, for a while.

    The server answers nobody else meanwhile, so one that is there but stays silent is not waited for at every scrape.
    """

    def __init__(self, key: str, num_engines: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._num_engines = num_engines
        self._clock = clock
        self._ask_again_at = [float("-inf")] * num_engines

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is asked before the first scrape

    def collect(self) -> Iterator[Metric]:
        pictures = []
        for engine, at in enumerate(self._ask_again_at):
            if self._clock() < at:
                continue
            try:
                pictures.append((str(engine), ask(Address(self._key, engine), timeout_s=_TIMEOUT_S).values))
            except TimeoutError:
                self._ask_again_at[engine] = self._clock() + _SILENCE_S
            except (OSError, ValueError):
                continue
        return families(pictures)


def expose(key: str, num_engines: int) -> None:
    """Show the numbers of ``num_engines`` engines on this process's metrics page."""
    collector = _DoubleCollector(key, num_engines)
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        REGISTRY.register(collector)
        return
    # Here each scrape has a new registry, with nothing but this collector of prometheus_client in it.
    original = MultiProcessCollector.collect

    @functools.wraps(original)
    def collect(self: MultiProcessCollector) -> list[Metric]:
        return [*original(self), *collector.collect()]  # type: ignore[no-untyped-call]

    MultiProcessCollector.collect = collect  # type: ignore[method-assign]
