"""A fleet of servers, one per arm, all up at once and asked in turn: idle ones use hardly any CPU."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.arms import Arm
from benchmarks.client import Completion, Request, Round, arrive, play
from benchmarks.metrics import Speculation, counters, growth, speculation
from benchmarks.server import Server, ServerConfig, ServerError
from benchmarks.stats import first_difference, median_ratio

__all__ = ["Fleet", "Series", "interleave"]

WORKER_UP = "vllm:double_worker_up"
BYTES_PER_SERVER = 2 << 30
SPIN_S = 1.2
"""vLLM's processes wait for each other in a busy loop, for a second after the last message."""


@dataclass
class Series:
    """The rounds of one arm in one cell (temperature, batch), and what its counters grew by in them."""

    arm: Arm
    rounds: list[Round] = field(default_factory=list)
    grown: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def speculation(self) -> Speculation:
        """What the counters say of all rounds."""
        return speculation(self.grown)

    def read(self, before: dict[str, float], after: dict[str, float]) -> None:
        """Takes note of what the counters grew by in some of the rounds."""
        for name, value in growth(before, after).items():
            self.grown[name] += value

    @property
    def rates(self) -> list[float]:
        """Tokens per second, by round."""
        return [round_.tokens_per_second for round_ in self.rounds]

    @property
    def completions(self) -> list[Completion]:
        """All completions of all rounds."""
        return [completion for round_ in self.rounds for completion in round_.completions]

    def speedup(self, other: Series) -> float:
        """Median over rounds of the ratio of tokens per second."""
        return median_ratio(self.rates, other.rates)

    def identical(self, other: Series) -> list[bool]:
        """Per completion: whether tokens and text are those of ``other``."""
        return [
            first_difference(a.tokens, b.tokens) is None and a.text == b.text
            for a, b in zip(self.completions, other.completions, strict=True)
        ]


class Fleet:
    """Servers for several arms with the same configuration otherwise; a context manager."""

    def __init__(self, arms: Sequence[Arm], base: ServerConfig, log_folder: Path) -> None:
        """``base`` holds what is alike for all arms; nothing is started before the context is entered."""
        self.arms = list(arms)
        self._base = base
        self._log_folder = log_folder
        self._stack = ExitStack()
        self._servers: dict[str, Server] = {}
        self._last: tuple[str, float] = ("", 0.0)

    def __enter__(self) -> Fleet:
        wanted = len(self.arms) * BYTES_PER_SERVER
        if psutil.virtual_memory().available < wanted:
            raise ServerError(f"{len(self.arms)} servers at once need about {wanted >> 30} GiB of memory; name fewer arms")
        with ExitStack() as stack:
            width = max(1, len(self._base.cores))
            for start in range(0, len(self.arms), width):
                for arm in self.arms[start : start + width]:
                    config = replace(self._base, speculative=arm.speculative, threads=arm.threads)
                    self._servers[arm.label] = stack.enter_context(Server(arm.label, config, self._log_folder))
                for arm in self.arms[start : start + width]:
                    self._servers[arm.label].wait_healthy()
                    wait_for_drafts(self._servers[arm.label])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def server(self, arm: Arm) -> Server:
        """The server of an arm; KeyError when the fleet has no such arm."""
        return self._servers[arm.label]

    def idle_share(self, seconds: float = 3.0) -> float:
        """Cores that all servers together burn while nobody asks."""
        time.sleep(SPIN_S)
        before = {label: server.cpu_seconds() for label, server in self._servers.items()}
        time.sleep(seconds)
        return sum(server.cpu_seconds() - before[label] for label, server in self._servers.items()) / seconds

    def ask(
        self,
        arm: Arm,
        requests: Sequence[Request],
        batch: int,
        progress: Callable[[Completion], None] | None = None,
    ) -> Round:
        """One pass over the requests, ``batch`` of them in flight, with cold caches and all other servers at rest."""
        return self._alone(arm, lambda url: play(url, requests, batch, progress))

    def send(self, arm: Arm, requests: Sequence[Request], times: Sequence[float]) -> Round:
        """The same with requests that arrive at their times, in seconds."""
        return self._alone(arm, lambda url: arrive(url, requests, times))

    def _alone(self, arm: Arm, play_round: Callable[[str], Coroutine[Any, Any, Round]]) -> Round:
        label, ended = self._last
        if label != arm.label:
            time.sleep(max(0.0, ended + SPIN_S - time.monotonic()))
        server = self.server(arm)
        server.reset_caches()
        round_ = asyncio.run(play_round(server.url))
        self._last = (arm.label, time.monotonic())
        return round_

    def warm_up(self, requests: Sequence[Request], batch: int) -> None:
        """Lets every server answer a few requests that are not measured."""
        for arm in self.arms:
            self.ask(arm, requests, batch)


def wait_for_drafts(server: Server, deadline_s: float = 120.0) -> None:
    """Waits until the draft worker of a double server is up; at once where there is none."""
    speculative = server.config.speculative or {}
    settings = speculative.get("double") or {}
    if speculative.get("method") != "double" or "model" not in speculative:
        return
    if isinstance(settings, dict) and not settings.get("enabled", True):
        return
    end = time.monotonic() + deadline_s
    while not counters(server.metrics()).get(WORKER_UP):
        if time.monotonic() > end:
            raise ServerError(f"{server.name}: no draft worker within {deadline_s:.0f} s:\n{server.tail()}")
        time.sleep(0.2)


def interleave(
    fleet: Fleet,
    series: Sequence[Series],
    requests: Sequence[Request],
    load: int | Sequence[float],
    num_rounds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """``num_rounds`` more rounds over all arms, each starting with another arm. ``load``: of them in flight, or their times."""
    before = {one.arm.label: counters(fleet.server(one.arm).metrics()) for one in series}
    for _ in range(num_rounds):
        number = len(series[0].rounds)
        shift = number % len(series)
        for one in [*series[shift:], *series[:shift]]:
            if isinstance(load, int):
                one.rounds.append(fleet.ask(one.arm, requests, load))
            else:
                one.rounds.append(fleet.send(one.arm, requests, load))
            progress(f"round {number + 1}  {one.arm.label:<28} {one.rates[-1]:8.1f} tokens/s")
    for one in series:
        one.read(before[one.arm.label], counters(fleet.server(one.arm).metrics()))
