"""Our metrics on vLLM's /metrics page.

The proposer lives in a worker process, the page in process 0: a collector in the page's registry asks for them. A server with
several front ends, the default with data parallelism, makes each page from files that all front ends write.
"""

import functools
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from vllm_double.operations.control_socket import Address, ask
from vllm_double.target.stats import PROPOSE_BUCKETS_S, Counters

__all__ = ["expose", "families", "snapshot"]

# fmt: off
_COUNTERS = {  # attribute of Counters: (name behind "vllm:double_", help)
    "rounds": ("target_forwards", "Target forwards after which draft tokens were proposed."),
    "rows": ("request_forwards", "Target forwards times requests in them, with and without draft tokens."),
    "rows_without_drafts": ("request_forwards_without_drafts", "Those of them without draft tokens."),
    "committed_tokens": ("committed_tokens", "Tokens that target forwards gave."),
    "proposed_tokens": ("proposed_tokens", "Draft tokens that were proposed."),
    "expected_tokens": ("expected_tokens", "Draft tokens that are accepted if the calibration is right."),
    "lookups": ("harvests", "Lookups: times that a request needed draft tokens."),
    "hits": ("hits", "Lookup hits: times that draft tokens for the last committed token were ready."),
    "late_nodes": ("late_nodes", "Draft tokens that came after their position was committed."),
    "nodes_evicted": ("nodes_evicted", "Draft tokens that were dropped because the arena was full."),
    "rewinds": ("rewinds", "Requests whose text became shorter."),
    "resynchronisations": ("resynchronisations", "Requests that were admitted to a draft worker again."),
    "rounds_without_worker": ("rounds_without_draft", "Rounds in which no draft worker was connected."),
    "texts_too_long": ("texts_too_long", "Requests whose text was longer than the draft can read: it drafts nothing for them."),
    "unindexed": ("unindexed", "Requests and answers that found no room in the indexes of retrieval."),
    "failures": ("failures", "Exceptions in the proposer. Drafting pauses after each."),
    "losses": ("losses", "Times that drafting paused because it cost more time than it saved."),
    "draft_pauses": ("draft_rests", "Times that the draft model was paused for a request that accepted few of its tokens."),
    "draft_first_examples": ("draft_first_examples", "Committed tokens for which the draft model's candidates are known."),
    "draft_first_accepted": ("draft_first_accepted", "Those of them that were the first candidate."),
    "draft_listed_accepted": ("draft_listed_accepted", "Those of them among the three candidates that the target receives."),
    "waits": ("waits", "Times that the target waited for the draft model's first tokens."),
    "waits_missed": ("waits_missed", "Those of them in which no tokens came."),
    "wait_seconds": ("wait_seconds", "Seconds that the target waited for the draft model."),
    "worker_restarts": ("worker_restarts", "Restarts of the draft worker."),
}
_BY_SOURCE = {
    "offered": "Draft tokens that were verified, by source.",
    "accepted": "Draft tokens that were accepted, by source.",
}
_GAUGES = {
    "age_seconds": "Seconds since the engine gave these values.",
    "worker_up": "1 while a draft worker answers.",
    "draft_failed": "1 if the draft model cannot work here and has been given up: retrieval alone drafts.",
    "draft_useless": "1 if the logits of the draft model are not finite, or next to nothing of what it says is right.",
    "enabled": "0 while drafting is switched off.",
    "paused_seconds": "Seconds until drafting is tried again, after an exception or because it did not pay.",
    "propose_max_seconds": "Longest round so far, in seconds.",
    "step_seconds": "Learnt time of a target forward without draft tokens, in seconds.",
    "index_bytes": "Memory of the indexes of retrieval, in bytes.",
    "step_token_seconds": "Learnt time that each further token adds to a target forward, in seconds.",
}
# fmt: on
_WORKER_GAUGES = frozenset({"requests", "nodes_per_iteration", "step_seconds", "max_length", "index_bytes"})
_OF_OTHERS = ("worker_restarts", "unindexed")  # which `Counters` does not have
_PATIENCE_S = 0.5  # of a scrape
_TIMEOUT_S = 30.0  # before an engine that does not answer is asked again


def snapshot(
    counters: Counters,
    step_cost: tuple[float, float],
    *,
    worker_up: bool,
    worker_restarts: int,
    draft_failed: bool,
    draft_useless: bool,
    enabled: bool,
    paused_s: float,
    index_bytes: int = 0,
    unindexed: int = 0,
) -> dict[str, Any]:
    """The counters and the worker's state, for JSON.

    step_cost: StepCost.estimate, in seconds. enabled: the switch. paused_s: CircuitBreaker.paused_s. index_bytes, unindexed: of
    Lookups.
    """
    names = (*_COUNTERS, *_BY_SOURCE, "propose_seconds", "propose_max_seconds", "propose_buckets", "worker")
    return {name: getattr(counters, name) for name in names if name not in _OF_OTHERS} | {
        "worker_restarts": worker_restarts,
        "index_bytes": index_bytes,
        "unindexed": unindexed,
        "worker_up": int(worker_up),
        "draft_failed": int(draft_failed),
        "draft_useless": int(draft_useless),
        "enabled": int(enabled),
        "paused_seconds": paused_s,
        "step_seconds": step_cost[0],
        "step_token_seconds": step_cost[1],
    }


def families(snapshots: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    """Metric families from (engine, snapshot) pairs."""
    snapshots = list(snapshots)

    def plain(kind: Any, name: str, help_text: str, value_of: Callable[[dict[str, Any]], float]) -> Metric:
        family: Metric = kind(f"vllm:double_{name}", help_text, labels=["engine"])
        for engine, values in snapshots:
            family.add_metric([engine], value_of(values))  # type: ignore[attr-defined]
        return family

    for key, (name, help_text) in _COUNTERS.items():
        yield plain(CounterMetricFamily, name, help_text, itemgetter(key))
    for key, help_text in _GAUGES.items():
        yield plain(GaugeMetricFamily, key, help_text, itemgetter(key))
    for key in sorted({key for _, values in snapshots for key in values["worker"] if key.isascii() and key.isidentifier()}):
        kind = GaugeMetricFamily if key in _WORKER_GAUGES else CounterMetricFamily
        help_text = f"{key.replace('_', ' ').capitalize()} of the draft worker."
        yield plain(kind, f"worker_{key}", help_text, lambda values, key=key: values["worker"].get(key, 0.0))  # type: ignore[misc]
    for key, help_text in _BY_SOURCE.items():
        family = CounterMetricFamily(f"vllm:double_{key}_tokens", help_text, labels=["engine", "source"])
        for engine, values in snapshots:
            for source, value in values[key].items():
                family.add_metric([engine, source], value)
        yield family
    histogram = HistogramMetricFamily(
        "vllm:double_propose_seconds", "Time of a round, between two target forwards, in seconds.", labels=["engine"]
    )
    bounds = [*map(str, PROPOSE_BUCKETS_S), "+Inf"]
    for engine, values in snapshots:
        histogram.add_metric(
            [engine], list(zip(bounds, accumulate(values["propose_buckets"]), strict=True)), values["propose_seconds"]
        )
    yield histogram


class _Engine:
    """One engine as the page knows it. folder: where front ends leave each other what it said last."""

    def __init__(self, address: Address, clock: Callable[[], float], folder: str | None) -> None:
        self._address = address
        self._clock = clock
        self._path = folder and Path(folder, f"double-{address.key}-{address.engine}.json")
        self._asking: threading.Thread | None = None
        self._is_there = True
        self._last: tuple[float, dict[str, Any]] | None = None

    def ask(self) -> threading.Thread | None:
        """Ask for a snapshot, unless an answer is still awaited; returns the thread that does."""
        if self._asking is not None and self._asking.is_alive():
            return None
        self._asking = threading.Thread(target=self._ask, name="double-metrics", daemon=True)
        self._asking.start()
        return self._asking

    def last(self) -> dict[str, Any] | None:
        """The newest snapshot, with its age; None: there is none, or the engine has ended."""
        known = [self._last]
        if self._path and self._is_there:
            with suppress(OSError, ValueError):  # counters must not fall from one front end's page to the next one's
                known.append(json.loads(self._path.read_text()))
        at, values = max(filter(None, known), key=itemgetter(0), default=(0.0, None))
        return values and values | {"age_seconds": max(0.0, self._clock() - at)}

    def _ask(self) -> None:
        try:
            values = ask(self._address, timeout_s=_TIMEOUT_S).values
        except ConnectionRefusedError:  # nobody has that name any more
            self._is_there, self._last = False, None
        except (OSError, ValueError):  # late, or too busy to take a connection
            return
        else:
            self._is_there, self._last = True, (self._clock(), values)
            if self._path:
                with suppress(OSError):
                    written = self._path.with_suffix(f".{os.getpid()}")
                    written.write_text(json.dumps(self._last))
                    written.replace(self._path)


class _DoubleCollector(Collector):
    """Asks every engine for its snapshot when the page is scraped. Of one that answers late the last snapshot stays.

    A scrape blocks the server: it waits a little for all answers together, and for a late one never again. clock: seconds,
    the same for all processes.
    """

    def __init__(
        self, key: str, num_engines: int, clock: Callable[[], float] = time.monotonic, folder: str | None = None
    ) -> None:
        self._engines = [_Engine(Address(key, engine), clock, folder) for engine in range(num_engines)]

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is asked before the first scrape

    def collect(self) -> Iterator[Metric]:
        deadline = time.monotonic() + _PATIENCE_S
        for thread in [engine.ask() for engine in self._engines]:
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        found = ((str(number), engine.last()) for number, engine in enumerate(self._engines))
        return families((number, values) for number, values in found if values is not None)


def _remove(collector: Collector) -> None:
    with suppress(KeyError):  # somebody has emptied the registry before
        REGISTRY.unregister(collector)


def expose(config: Any, num_engines: int) -> None:
    """Show the metrics of ``num_engines`` engines, with ``metrics_key`` of their configuration, on this process's page, as long
    as that configuration lives.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    collector = _DoubleCollector(config.metrics_key, num_engines, folder=folder)
    if folder is None:
        REGISTRY.register(collector)
        weakref.finalize(config, _remove, collector)
        return
    # Here each scrape has a new registry, with nothing but this collector of prometheus_client in it.
    original = MultiProcessCollector.collect

    @functools.wraps(original)
    def collect(self: MultiProcessCollector) -> list[Metric]:
        return [*original(self), *collector.collect()]  # type: ignore[no-untyped-call]

    MultiProcessCollector.collect = collect  # type: ignore[method-assign]
