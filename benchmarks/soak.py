"""Resident memory of a serving double over many requests: python -m benchmarks.soak

Every request has a prompt of its own, cut from the held-out ones, and leaves its answer in a history that is full after
a fraction of them. A row of results/soak.csv: MiB of each process in the second and in the last quarter (medians of a
reading after every hundredth request), and the growth between the two. The exit status is 1 if a process grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil
from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks import rows, workload
from benchmarks.arms import Arm
from benchmarks.chaos import pid_of
from benchmarks.client import Completion, Request, play
from benchmarks.harness import Fleet
from benchmarks.machine import cores, parse_cores
from benchmarks.metrics import counters
from benchmarks.server import Server, ServerConfig

__all__ = ["main"]

ROLES = ("api", "engine", "worker", "actor")
HISTORY_TOKENS = 16384
GROWTH = 1.02
EVERY = 100
NUM_TEXTS = 128


def requests(count: int, prompt_tokens: int, max_tokens: int) -> list[Request]:
    """``count`` requests, each with a piece of the held-out texts that begins elsewhere and is as long as chance has it."""
    tokenizer = Tokenizer.from_file(str(workload.TARGET / "tokenizer.json"))
    held_out = workload.load_prompts(workload.PROMPTS, NUM_TEXTS)
    tokens = [token for prompt in held_out for token in tokenizer.encode(prompt.text, add_special_tokens=False).ids]
    rng = random.Random(0)
    found = []
    for index in range(count):
        start = rng.randrange(len(tokens) - prompt_tokens)
        piece = tuple(tokens[start : start + rng.randint(1, prompt_tokens)])
        found.append(Request(f"r{index}", piece, rng.randint(1, max_tokens), ignore_eos=True))
    return found


class Memory:
    """Resident MiB of each of a server's processes, after every hundredth answer."""

    def __init__(self, server: Server) -> None:
        self._processes = {role: psutil.Process(pid_of(server, role)) for role in ROLES}
        self._answered = 0
        self.read: dict[str, list[float]] = {role: [] for role in ROLES}

    def __call__(self, completion: Completion) -> None:
        self._answered += 1
        if self._answered % EVERY == 0:
            for role, process in self._processes.items():
                self.read[role].append(process.memory_info().rss / 2**20)

    def quarters(self, role: str) -> tuple[float, float]:
        """Medians of the second and of the last quarter."""
        read = self.read[role]
        quarter = len(read) // 4
        return median(read[quarter : 2 * quarter]), median(read[-quarter:])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and files one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--prompt-tokens", type=int, default=96, help="of the longest prompt")
    parser.add_argument("--max-tokens", type=int, default=32, help="of the longest answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=workload.count_layers(workload.TARGET))
    parser.add_argument("--cores", type=parse_cores, default=cores())
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "soak.csv")
    options = parser.parse_args(argv)
    if options.requests < 8 * EVERY:
        parser.error(f"--requests: at least {8 * EVERY}, of which four quarters are made")
    settings = {"history_tokens": HISTORY_TOKENS, "share_history": True}
    speculative = {"method": "double", "num_speculative_tokens": 16, "model": str(workload.DRAFT), "double": settings}
    arm = Arm("double", speculative)
    asked = requests(options.requests, options.prompt_tokens, options.max_tokens)
    with tempfile.TemporaryDirectory(prefix="vllm-double-soak-") as folder:
        target = workload.inflated(workload.TARGET, options.layers, Path(folder))
        base = ServerConfig(target, tuple(options.cores), max_num_seqs=options.batch)
        with Fleet([arm], base, Path(folder)) as fleet, tqdm(total=options.requests, unit="request") as bar:
            server = fleet.server(arm)
            memory = Memory(server)

            def answered(completion: Completion) -> None:
                memory(completion)
                bar.update()

            started = time.monotonic()
            asyncio.run(play(server.url, asked, options.batch, answered))
            seconds = time.monotonic() - started
            grown = counters(server.metrics())
    row: dict[str, rows.Value] = {
        "requests": options.requests, "batch": options.batch, "layers": options.layers, "seconds": seconds,
        "tokens": grown["vllm:generation_tokens_total"], "tokens_per_forward": grown["vllm:generation_tokens_total"]
        / grown["vllm:double_request_forwards_total"],
    }  # fmt: skip
    growths = []
    for role in ROLES:
        second, last = memory.quarters(role)
        growths.append(last / second)
        row |= {f"{role}_second_mib": second, f"{role}_last_mib": last, f"{role}_growth": growths[-1]}
    row["ok"] = max(growths) <= GROWTH
    print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    rows.append(options.output, row | rows.provenance("benchmarks.soak"))
    return int(not row["ok"])


if __name__ == "__main__":
    sys.exit(main())
