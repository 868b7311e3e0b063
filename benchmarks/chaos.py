"""Kills and stops parts of a serving double under load, and looks at what its users and the machine notice.

    python -m benchmarks.chaos sigstop            # the worker stopped for 5 s under load
    python -m benchmarks.chaos kills --kills 20   # SIGKILL of the worker, each when it is up, during >= 200 requests
    python -m benchmarks.chaos exits              # SIGTERM of the server; SIGKILL of each process, one server each
    python -m benchmarks.chaos exits --tensor-parallel-size 2 --roles worker0 worker1

Texts are greedy and float32: each has to be that of plain vLLM. The exit status is 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import aiohttp

from benchmarks import rows, workload
from benchmarks.arms import Choices, variants
from benchmarks.client import Completion, Request, complete
from benchmarks.harness import WORKER_UP, Fleet, wait_for_drafts
from benchmarks.machine import cores, parse_cores
from benchmarks.metrics import counters
from benchmarks.server import Server, ServerConfig
from benchmarks.stats import first_difference

__all__ = ["main"]

RESTARTS = "vllm:double_worker_restarts_total"
COMMITTED = "vllm:double_committed_tokens_total"
FORWARDS = "vllm:double_request_forwards_total"
DRAFT_ACCEPTED = 'vllm:double_accepted_tokens_total{engine="0",source="draft"}'
EXIT_S = 15.0
ROLES = ("api", "engine", "worker", "actor", "raylet")
RANKS = ("worker0", "worker1")  # of a target with tensor parallelism


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one scenario; 0 if all was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["sigstop", "kills", "exits"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--roles", nargs="+", choices=("server", *ROLES, *RANKS), default=("server", *ROLES), help="ends of exits"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="of the target, one core to a rank")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--draft", type=Path, default=workload.DRAFT)
    parser.add_argument("--prompts", type=Path, default=workload.PROMPTS)
    parser.add_argument("--cores", type=parse_cores, default=cores())
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "chaos.csv")
    options = parser.parse_args(argv)
    choices = Choices(options.draft, tuple(options.cores))
    with tempfile.TemporaryDirectory(prefix="vllm-double-chaos-") as folder:
        target = workload.inflated(options.target, options.layers, Path(folder))
        base = ServerConfig(target, tuple(options.cores), max_model_len=1024)
        if options.tensor_parallel_size > 1:
            bind = "|".join(map(str, options.cores[: options.tensor_parallel_size]))
            base = replace(base, threads=bind, extra=("--tensor-parallel-size", str(options.tensor_parallel_size)))
        prompts = workload.load_prompts(options.prompts, options.num_prompts)
        requests = workload.requests(prompts, options.max_tokens, 0.0)
        if options.scenario == "exits":
            found = [
                tell(options, row)
                for row in exits(base, variants("double", choices)[-1].speculative, requests[:2], Path(folder), options.roles)
            ]
        else:
            plain, double = variants("plain", choices)[-1], variants("double", choices)[-1]
            with Fleet([plain, double], base, Path(folder)) as fleet:
                expected = fleet.ask(plain, requests, options.batch).completions
                run = Load(fleet.server(double), requests, expected, options.batch)
                scenario = sigstop if options.scenario == "sigstop" else lambda load: kills(load, options.kills)
                found = [tell(options, asyncio.run(run.during(scenario)))]
    return int(not all(row["ok"] for row in found))


def tell(options: argparse.Namespace, row: dict[str, rows.Value]) -> dict[str, rows.Value]:
    """Print and file a row."""
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    rows.append(options.output.with_stem(f"chaos_{options.scenario}"), row | rows.provenance("benchmarks.chaos"))
    return row


@dataclass
class Load:
    """Requests without end against one server, each text compared with the expected one."""

    server: Server
    requests: Sequence[Request]
    expected: Sequence[Completion]
    batch: int

    def __post_init__(self) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self.differing = 0
        self.tokens_at: list[tuple[float, int]] = []
        self._stop = False

    async def during(self, scenario: Callable[[Load], dict[str, rows.Value]]) -> dict[str, rows.Value]:
        """Keep ``batch`` requests in flight while ``scenario`` runs in a thread; its row, with what the load saw."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            workers = [asyncio.create_task(self._work(session, index)) for index in range(self.batch)]
            row = await asyncio.to_thread(scenario, self)
            self._stop = True
            await asyncio.gather(*workers)
        row |= {"requests": self.answered, "failed": len(self.failed), "differing": self.differing}
        row["ok"] = bool(row["ok"]) and not self.failed and not self.differing
        for words in self.failed[:3]:
            print(words, flush=True)
        return row

    async def _work(self, session: aiohttp.ClientSession, first: int) -> None:
        index = first
        while not self._stop:
            place = index % len(self.requests)
            try:
                found = await complete(session, self.server.url, self.requests[place])
                self.differing += first_difference(found.tokens, self.expected[place].tokens) is not None
            except (RuntimeError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")
            self.answered += 1
            index += self.batch

    def read(self) -> dict[str, float]:
        """The server's counters, and accepted draft tokens under DRAFT_ACCEPTED."""
        page = self.server.metrics()
        found = counters(page)
        lines = (line.rpartition(" ") for line in page.splitlines() if line.startswith(DRAFT_ACCEPTED))
        return found | {DRAFT_ACCEPTED: sum(float(value) for _, _, value in lines)}

    def rates(self, seconds: float) -> tuple[float, float]:
        """Committed tokens per second, and drafted ones accepted per second, over the next ``seconds``."""
        before, start = self.read(), time.monotonic()
        time.sleep(seconds)
        after, spent = self.read(), time.monotonic() - start
        return (
            (after[COMMITTED] - before[COMMITTED]) / spent,
            (after[DRAFT_ACCEPTED] - before[DRAFT_ACCEPTED]) / spent,
        )

    def wait_up(self, deadline_s: float = 120.0, restarts: float = 0.0) -> float:
        """Seconds until a worker is up and ``restarts`` are counted; AssertionError when the time is up."""
        start = time.monotonic()
        while time.monotonic() - start < deadline_s:
            found = counters(self.server.metrics())
            if found.get(WORKER_UP) and found.get(RESTARTS, 0.0) >= restarts:
                return time.monotonic() - start
            time.sleep(0.5)
        raise AssertionError(f"no draft worker within {deadline_s:.0f} s:\n{self.server.tail()}")


def sigstop(load: Load) -> dict[str, rows.Value]:
    """The draft worker stopped for 5 s: the server goes on; the drafts come back."""
    time.sleep(3.0)
    before, drafted_before = load.rates(5.0)
    worker = pid_of(load.server, "actor")
    os.kill(worker, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        during, drafted_during = load.rates(4.5)
    finally:
        os.kill(worker, signal.SIGCONT)
    time.sleep(2.0)
    after, drafted_after = load.rates(5.0)
    return {
        "scenario": "sigstop",
        "tokens_per_second_before": before,
        "tokens_per_second_stopped": during,
        "tokens_per_second_after": after,
        "accepted_drafts_per_second": f"{drafted_before:.1f} {drafted_during:.1f} {drafted_after:.1f}",
        "ok": during > 0 and drafted_after > 0.5 * drafted_before,
    }


def kills(load: Load, count: int) -> dict[str, rows.Value]:
    """SIGKILL of the draft worker ``count`` times, each when it is up, and until 200 requests were answered."""
    restarts = counters(load.server.metrics()).get(RESTARTS, 0.0)
    first = restarts
    back: list[float] = []
    for number in range(count):
        load.wait_up()
        time.sleep(0.5 + 0.1 * number)  # at another point of its work each time
        os.kill(pid_of(load.server, "actor"), signal.SIGKILL)
        restarts += 1
        back.append(load.wait_up(restarts=restarts))
        print(f"kill {number + 1}: back after {back[-1]:.1f} s, {load.answered} requests answered", flush=True)
    while load.answered < 200:
        time.sleep(0.5)
    confirmed = counters(load.server.metrics()).get(RESTARTS, 0.0) - first
    return {
        "scenario": "kills",
        "kills": count,
        "confirmed_restarts": confirmed,
        "median_back_s": median(back),
        "max_back_s": max(back),
        "ok": confirmed == count,
    }


def exits(
    base: ServerConfig, speculative: dict[str, object] | None, requests: Sequence[Request], logs: Path, roles: Sequence[str]
) -> Iterator[dict[str, rows.Value]]:
    """Ends a server in every way, each under load, and waits until nothing of it is left."""
    ends = [("server", signal.SIGTERM), *((role, signal.SIGKILL) for role in (*ROLES, *RANKS))]
    for role, number in [end for end in ends if end[0] in roles]:
        before = leftovers()
        server = Server(f"exit-{role}-{number.name}", ServerConfig(**{**vars(base), "speculative": speculative}), logs)
        try:
            server.wait_healthy()
            wait_for_drafts(server)
            asyncio.run(_ask(server, requests))
            killed = pid_of(server, role)
            os.kill(killed, number)
            serves = None
            if role in ("actor", "raylet"):
                serves = answers(server)
                server.stop()
            spent, left = wait_clean(server, before)
            row: dict[str, rows.Value] = {
                "scenario": "exits", "killed": role, "signal": number.name, "clean_after_s": spent,
                "left": " ".join(left), "serves_on": serves, "ok": not left and serves is not False,
            }  # fmt: skip
            yield row
        finally:
            server.stop()


def wait_clean(server: Server, before: set[str]) -> tuple[float, list[str]]:
    """Seconds until nothing of the server is left, and what is left after 15 s: processes, segments, folders, sockets."""
    start = time.monotonic()
    while True:
        server.reap()
        left = sorted(f"{process.pid}:{process.name()}" for process in server.processes()) + sorted(leftovers() - before)
        spent = time.monotonic() - start
        if not left or spent > EXIT_S:
            return spent, left
        time.sleep(0.05)


def answers(server: Server) -> bool:
    """Whether the server still completes a request."""
    body = b'{"model": "target", "prompt": "def f(", "max_tokens": 8, "temperature": 0}'
    request = urllib.request.Request(f"{server.url}/v1/completions", data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


async def _ask(server: Server, requests: Sequence[Request]) -> None:
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(complete(session, server.url, request) for request in requests))


def pid_of(server: Server, role: str) -> int:
    """The process of a role: server and api (what was started), engine, worker (vLLM's), actor (the draft's), raylet."""
    signs = {
        "engine": "VLLM::EngineCore", "worker": "VLLM::Worker", "actor": "ray::DraftActor", "raylet": "raylet/raylet",
        "worker0": "VLLM::Worker_TP0", "worker1": "VLLM::Worker_TP1",
    }  # fmt: skip
    if role in ("server", "api"):
        return server.pid
    found = []
    for process in server.processes():
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if signs[role] in command:
            found.append(process.pid)
    if len(found) != 1:
        raise AssertionError(f"{len(found)} processes of {server.name} look like {role!r}")
    return found[0]


def leftovers() -> set[str]:
    """What lies in /dev/shm, Ray's and our folders in the temporary directory, and abstract sockets of ours."""
    temporary = Path(tempfile.gettempdir())
    found = {str(path) for path in Path("/dev/shm").iterdir()}
    found |= {str(path) for pattern in ("vllm-double-ray-*", "ray*") for path in temporary.glob(pattern)}
    sockets = Path("/proc/net/unix").read_text().splitlines()
    return found | {line.split()[-1] for line in sockets if "@vllm-double" in line}


if __name__ == "__main__":
    sys.exit(main())
