"""Our part of the metrics page, from the socket to the families."""

import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_double.operations import metrics
from vllm_double.operations.control_socket import Address, Answer, Endpoint
from vllm_double.operations.metrics import _DoubleCollector, snapshot
from vllm_double.target.stats import Counters


def serve(key: str, engine: int, counters: Counters, **state: Any) -> Endpoint:
    said = {
        "worker_up": True,
        "worker_restarts": 0,
        "draft_failed": False,
        "draft_useless": False,
        "enabled": True,
        "paused_s": 0.0,
    } | state
    return Endpoint(Address(key, engine), lambda command, who: snapshot(counters, (0.02, 0.001), **said))


def page(key: str, engines: int = 1) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(_DoubleCollector(key, engines))
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found[sample.name, sample.labels.get("source") or sample.labels.get("le") or ""] = sample.value
    return found


def test_counts_arrive_on_the_page() -> None:
    counters, key = Counters(("draft", "context")), secrets.token_hex(8)
    counts = {"committed_tokens": 4, "rows": 2, "rows_without_drafts": 1, "lookups": 2, "hits": 1, "proposed_tokens": 2}
    for name, value in (counts | {"expected_tokens": 0.75}).items():
        counters.tally.counts[name] = value
    counters.tally.offered[:] = counters.tally.accepted[:] = 1
    counters.proposed(0.00015)
    counters.proposed(7.0)
    counters.worker = {"iterations": 4.0, "requests": 2.0}
    server = serve(key, 0, counters, worker_restarts=3, index_bytes=900, unindexed=5)
    found = page(key)
    server.close()
    assert found["vllm:double_committed_tokens_total", ""] == 4
    assert found["vllm:double_request_forwards_total", ""] == 2
    assert found["vllm:double_request_forwards_without_drafts_total", ""] == 1
    assert found["vllm:double_hits_total", ""] == 1 and found["vllm:double_harvests_total", ""] == 2
    assert found["vllm:double_offered_tokens_total", "context"] == 1
    assert found["vllm:double_accepted_tokens_total", "draft"] == 1
    assert found["vllm:double_proposed_tokens_total", ""] == 2 and found["vllm:double_expected_tokens_total", ""] == 0.75
    assert found["vllm:double_step_seconds", ""] == 0.02 and found["vllm:double_step_token_seconds", ""] == 0.001
    assert found["vllm:double_index_bytes", ""] == 900 and found["vllm:double_unindexed_total", ""] == 5
    assert found["vllm:double_worker_restarts_total", ""] == 3 and found["vllm:double_worker_up", ""] == 1
    assert found["vllm:double_worker_iterations_total", ""] == 4 and found["vllm:double_worker_requests", ""] == 2
    assert found["vllm:double_propose_seconds_bucket", "0.0001"] == 0
    assert found["vllm:double_propose_seconds_bucket", "0.0002"] == 1
    assert found["vllm:double_propose_seconds_bucket", "+Inf"] == 2


def test_an_engine_that_does_not_answer_is_left_out_and_the_page_stands() -> None:
    key = secrets.token_hex(8)
    server = serve(key, 1, Counters(failures=2, losses=3), enabled=False, paused_s=1.5)
    found = page(key, engines=3)
    server.close()
    assert found["vllm:double_enabled", ""] == 0
    assert found["vllm:double_failures_total", ""] == 2 and found["vllm:double_losses_total", ""] == 3
    assert found["vllm:double_paused_seconds", ""] == 1.5
    assert page(key, engines=3).get(("vllm:double_enabled", "")) is None


def test_a_worker_whose_report_is_garbled_spoils_no_page() -> None:
    counters, key = Counters(), secrets.token_hex(8)
    counters.worker = {"iterations": 4.0, "no name\n": 1.0, "": 1.0, "\xfc": 1.0}
    server = serve(key, 0, counters)
    found = page(key)
    server.close()
    assert found["vllm:double_worker_iterations_total", ""] == 4
    assert [name for name, _ in found if name.startswith("vllm:double_worker_")] == [
        "vllm:double_worker_restarts_total", "vllm:double_worker_up", "vllm:double_worker_iterations_total"
    ]  # fmt: skip


def test_two_scrapes_at_once_are_both_answered() -> None:
    key = secrets.token_hex(8)
    server = serve(key, 0, Counters())
    pages: list[dict[tuple[str, str], float]] = []
    threads = [threading.Thread(target=lambda: pages.append(page(key))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    server.close()
    assert len(pages) == 4 and all(p["vllm:double_worker_up", ""] == 1 for p in pages)


def test_the_metrics_leave_the_page_with_the_configuration_of_their_engines() -> None:
    class Configuration:
        metrics_key = secrets.token_hex(8)

    def shown() -> int:
        return sum(isinstance(collector, _DoubleCollector) for collector in REGISTRY._collector_to_names)

    before, config = shown(), Configuration()
    metrics.expose(config, 1)
    assert shown() == before + 1
    del config
    assert shown() == before


def test_a_page_of_several_front_ends_shows_the_metrics_once(tmp_path: Path) -> None:
    """As vLLM makes it there: each scrape has a registry of its own. In a process apart, for what is changed in it stays."""
    code = """
import types
from prometheus_client import CollectorRegistry, Counter, generate_latest, multiprocess
from vllm_double.target.stats import Counters
from vllm_double.operations.control_socket import Address, Answer, Endpoint
from vllm_double.operations.metrics import expose, snapshot

said = {"worker_up": True, "worker_restarts": 0, "draft_failed": False, "draft_useless": False}
said |= {"enabled": True, "paused_s": 0.0}
engines = [Endpoint(Address("%s", engine), lambda command, who: snapshot(Counters(), (1.0, 1.0), **said)) for engine in (0, 1)]
expose(types.SimpleNamespace(metrics_key="%s"), 2)
Counter("other", "").inc()
for scrape in range(2):
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    page = generate_latest(registry).decode()
assert "other_total 1.0" in page
for engine in ("0", "1"):
    assert page.count('vllm:double_worker_up{engine="' + engine + '"} 1.0') == 1
""".replace("%s", secrets.token_hex(8))
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


class Late:
    """In place of `ask`: an engine that answers what it is told to, when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures, self.num_asked = 0, 0
        self.error: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()
        monkeypatch.setattr(metrics, "_PATIENCE_S", 0.05)
        monkeypatch.setattr(metrics, "ask", self.ask)

    def ask(self, address: Address, timeout_s: float) -> Answer:
        self.num_asked += 1
        assert self.may_answer.wait(10)
        if self.error is not None:
            raise self.error
        state: dict[str, Any] = {
            "worker_up": True,
            "draft_failed": False,
            "draft_useless": False,
            "worker_restarts": 0,
            "enabled": True,
        }
        return Answer(7, snapshot(Counters(failures=self.failures), (0.02, 0.001), **state, paused_s=0.0))


def values(collector: _DoubleCollector) -> tuple[float, float] | None:
    """Failures and age, as the page has them."""
    found = {sample.name: sample.value for family in collector.collect() for sample in family.samples}
    age = found.get("vllm:double_age_seconds")
    return None if age is None else (found["vllm:double_failures_total"], age)


def test_a_late_engine_keeps_its_last_values_with_their_age_and_is_awaited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now = Late(monkeypatch), 100.0
    collector = _DoubleCollector("00", 1, lambda: now)
    engine.failures = 1
    assert values(collector) == (1, 0)
    engine.may_answer.clear()
    engine.failures, now = 2, 101.0
    assert values(collector) == (1, 1)
    now = 140.0
    assert values(collector) == (1, 40) and engine.num_asked == 2
    asking = collector._engines[0]._asking
    assert asking is not None
    engine.may_answer.set()
    asking.join(10)
    engine.may_answer.clear()
    now = 141.0
    assert values(collector) == (2, 1) and engine.num_asked == 3
    engine.may_answer.set()


@pytest.mark.parametrize("error", [BlockingIOError(), TimeoutError(), ValueError()], ids=["full", "silent", "garbled"])
def test_an_engine_without_a_readable_answer_keeps_its_last_values(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    engine, now = Late(monkeypatch), 100.0
    collector = _DoubleCollector("00", 1, lambda: now)
    assert values(collector) == (0, 0)
    engine.error, now = error, 105.0
    assert values(collector) == (0, 5)
    engine.error = None
    assert values(collector) == (0, 0)


def test_an_engine_that_has_ended_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Late(monkeypatch)
    collector = _DoubleCollector("00", 1)
    assert values(collector) is not None
    engine.error = ConnectionRefusedError()
    assert values(collector) is None


def test_front_ends_show_the_newest_values_that_any_of_them_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine, now = Late(monkeypatch), 100.0
    first, second = (_DoubleCollector("00", 1, lambda: now, str(tmp_path)) for _ in range(2))
    assert values(first) == (0, 0)
    engine.failures, now = 3, 101.0
    assert values(second) == (3, 0)
    engine.may_answer.clear()
    now = 102.0
    newcomer = _DoubleCollector("00", 1, lambda: now, str(tmp_path))
    assert values(first) == values(second) == values(newcomer) == (3, 1)
    engine.may_answer.set()
