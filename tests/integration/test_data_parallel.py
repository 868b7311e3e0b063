"""Two engines behind one server: each has a draft of its own, and the death of one draft is nothing to the other engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks import workload
from benchmarks.arms import Arm
from benchmarks.client import Request
from benchmarks.harness import Fleet
from benchmarks.server import Server, ServerConfig
from vllm_double.cli import main

pytest.importorskip("vllm")
pytestmark = pytest.mark.integration

CORES = tuple(sorted(os.sched_getaffinity(0)))[:2]
SPECULATIVE = {
    "method": "double",
    "model": str(workload.DRAFT),
    "num_speculative_tokens": 8,
    "double": {"draft_cores": ",".join(map(str, CORES))},
}
TWO_ENGINES = ("--data-parallel-size", "2")  # and so two API servers
ENGINES = (0, 1)


@pytest.fixture(scope="module")
def prompts() -> list[Request]:
    return workload.requests(workload.load_prompts(workload.PROMPTS, 8), 48, 0.0)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    bind = "|".join(map(str, CORES))
    config = ServerConfig(workload.TARGET, CORES, threads=bind, max_model_len=1024, extra=TWO_ENGINES)
    with Fleet([Arm("double", SPECULATIVE, threads=bind)], config, tmp_path) as fleet:
        yield fleet


def value(server: Server, name: str, engine: int) -> float:
    start = f'vllm:double_{name}{{engine="{engine}"'
    return sum(float(line.rpartition(" ")[2]) for line in server.metrics().splitlines() if line.startswith(start))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def actors(server: Server) -> list[psutil.Process]:
    return [process for process in server.processes() if process.name().startswith("ray::DraftActor")]


@pytest.mark.skipif(len(CORES) < 2, reason="two engines need two cores")
def test_each_engine_has_its_draft_and_goes_on_when_the_others_dies(fleet: Fleet, prompts: list[Request]) -> None:
    arm = fleet.arms[0]
    server = fleet.server(arm)

    def values(name: str) -> list[float]:
        return [value(server, name, engine) for engine in ENGINES]

    def ask() -> list[list[int]]:
        return [completion.tokens for completion in fleet.ask(arm, prompts, 8).completions]

    wait_until(lambda: values("worker_up") == [1, 1], "not every engine has a draft")
    assert main(["switch", "off", "--pid", str(server.pid)]) == 0
    texts = ask()
    assert values("proposed_tokens_total") == [0, 0]
    assert main(["switch", "on", "--pid", str(server.pid)]) == 0
    assert ask() == texts
    assert min(values("accepted_tokens_total")) > 0
    assert len(actors(server)) == 2
    os.kill(actors(server)[0].pid, signal.SIGKILL)
    wait_until(lambda: sorted(values("worker_up")) == [0, 1], "both drafts went, or none")
    assert ask() == texts
    wait_until(lambda: values("worker_up") == [1, 1], "the draft did not come back")
    wait_until(lambda: sorted(values("worker_restarts_total")) == [0, 1], "both drafts were started again, or none")
    assert ask() == texts
