"""What one round costs the target: real channel, real retrieval, nodes as a served draft publishes them.

    python -m benchmarks.round_bench

Rows of results/round.csv, by batch and temperature: quantiles in microseconds of a round, and of its CPU time, with admissions
and the ends of requests that come with it. One request in eight finishes in every round, and another one is admitted with a
prompt of 2,000 tokens; the history holds a million tokens. Between two rounds 32 MB are touched, as a forward does, and what
waits is indexed. The worker's nodes lie around the text that the target then says, some beside it.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rows
from benchmarks.stats import quantile
from vllm_double.operations.circuit_breaker import CircuitBreaker
from vllm_double.prefix_hash import mix, seed
from vllm_double.retrieval.sources import Sources
from vllm_double.target._round_steps import SLOT_BITS
from vllm_double.target.batch import Batch
from vllm_double.target.guarded_proposer import GuardedProposer
from vllm_double.target.proposer import Proposer, RequestParams
from vllm_double.transport.messages import NODE_DTYPE, Admit, Commit, Release
from vllm_double.transport.shared import SharedDraftChannel, SharedTargetChannel

__all__ = ["main"]

VOCAB, K = 3072, 16
PROMPT_TOKENS, ANSWER_TOKENS, HISTORY_TOKENS = 2000, 4096, 1_000_000
NODES_PER_ITERATION = 12
NODES = {1: 160, 4: 400, 8: 690, 16: 900, 32: 1200, 64: 1500, 256: 2400}
"""Nodes that are published in a round, by batch."""
_SLOW_STEP_S = 1.0  # of the draft: the target asks itself whether to wait, and never does
NUM_CHILDREN = NODE_DTYPE["tokens"].shape[0]


class Texts:
    """What the target says: phrases of 30 tokens, most of which come again."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.phrases = self.rng.integers(1, VOCAB, (4000, 30), dtype=np.int32)

    def make(self, num_tokens: int) -> np.ndarray:
        text = self.phrases[self.rng.zipf(1.3, num_tokens // 30 + 1) % 4000].reshape(-1)[:num_tokens]
        noise = self.rng.random(num_tokens) < 0.03
        text = np.where(noise, self.rng.integers(1, VOCAB, num_tokens, dtype=np.int32), text)
        return np.ascontiguousarray(text, np.int32)


class Worker:
    """The draft's end: knows the texts, and publishes nodes in records of some iterations."""

    def __init__(self, end: SharedDraftChannel) -> None:
        self.end = end
        self.rng = np.random.default_rng(1)
        self.hashes: dict[int, tuple[int, int]] = {}  # root hash and position by handle
        self.names: dict[int, int] = {}  # request numbers by handle

    def receive(self, name_of: Callable[[int], int]) -> None:
        """name_of: the request's number by its handle."""
        for command in self.end.receive():
            if isinstance(command, Admit):
                self.hashes[command.handle] = seed(command.handle), len(command.tokens)
                self.names[command.handle] = name_of(command.handle)
            elif isinstance(command, Commit):
                value, position = self.hashes[command.handle]
                for token in command.tokens.tolist():
                    value = mix(value, token)
                self.hashes[command.handle] = value, position + len(command.tokens)
            elif isinstance(command, Release):
                self.hashes.pop(command.handle, None)
                self.names.pop(command.handle, None)

    def publish(self, texts: dict[int, np.ndarray], num_nodes: int) -> None:
        """Along what will be said, and beside it: the first child is right most of the time."""
        handles = list(self.hashes)
        each = max(1, num_nodes // max(len(handles), 1))
        parts = []
        for handle in handles:
            value, position = self.hashes[handle]
            text = texts[self.names[handle]]
            nodes = np.zeros(each, NODE_DTYPE)
            path = text[position : position + min(each, 2 * K)].tolist()
            names, positions, right = [], [], []
            for depth, token in enumerate([*path, 1]):
                names.append(value)
                positions.append(position + depth)
                right.append(token)
                value = mix(value, token)
            others = self.rng.integers(0, 1 << 62, each)
            for index in range(each):
                on_path = index < min(len(path), each // 3 + 1)
                nodes["prefix_hash"][index] = names[index] if on_path else int(others[index])
                nodes["position"][index] = positions[index if on_path else index % len(positions)]
            nodes["handle"], nodes["count"] = handle, NUM_CHILDREN
            nodes["tokens"] = self.rng.integers(1, VOCAB, (each, NUM_CHILDREN))
            num_path = min(len(path), each // 3 + 1)
            hits = self.rng.random(num_path) < 0.8
            nodes["tokens"][:num_path, 0] = np.where(hits, right[:num_path], nodes["tokens"][:num_path, 0])
            probs = np.sort(self.rng.dirichlet(np.full(NUM_CHILDREN + 2, 0.3), each), axis=1)[:, ::-1][:, :NUM_CHILDREN]
            nodes["probs"] = probs
            parts.append(nodes)
        if not parts:
            return
        everything = np.concatenate(parts)
        self.rng.shuffle(everything)
        for start in range(0, len(everything), NODES_PER_ITERATION):
            self.end.publish(everything[start : start + NODES_PER_ITERATION])


class Engine:
    """A target of ``batch`` rows, whose requests come and go."""

    def __init__(self, batch: int, temperature: float) -> None:
        self.rng = np.random.default_rng(2)
        self.source = Texts()
        self.channel = SharedTargetChannel()
        self.worker = Worker(SharedDraftChannel.attach(self.channel.address))
        sources = Sources(history_tokens=HISTORY_TOKENS, share_history=True).open()
        self.fill_history(sources)
        proposer = Proposer(K, self.channel, sources, time.perf_counter, VOCAB)
        proposer.counters.worker = {"step_seconds": _SLOW_STEP_S}
        self.slots = proposer._slots
        self.proposer = GuardedProposer(proposer, CircuitBreaker(time.monotonic))
        for num_tokens in range(1, 40):
            self.proposer.step_cost.observe(num_tokens, 0.02 + 0.0004 * num_tokens)
        self.params = RequestParams(temperature, 100_000, frozenset({0}), seed=7)
        self.batch = batch
        self.texts: dict[int, np.ndarray] = {}
        self.rows: list[int] = []  # request numbers by row
        self.buffer = np.zeros((batch, PROMPT_TOKENS + ANSWER_TOKENS), np.int32)
        self.lengths = np.zeros(batch, np.int32)
        self.chains: dict[int, list[int]] = {}
        self.last = 0
        self.cold = np.zeros(32 << 20, np.uint8)

    def new_request(self, row: int) -> int:
        self.last += 1
        self.texts[self.last] = self.source.make(PROMPT_TOKENS + ANSWER_TOKENS)
        self.chains[self.last] = []
        self.buffer[row, :PROMPT_TOKENS] = self.texts[self.last][:PROMPT_TOKENS]
        self.lengths[row] = PROMPT_TOKENS
        return self.last

    def index(self) -> None:
        """What the thread beside the forward does."""
        while self.proposer.index():
            pass

    def name_of(self, handle: int) -> int:
        """The request that a handle was given to."""
        slot = handle & ((1 << SLOT_BITS) - 1)
        return next(int(name) for name, its_slot in self.slots.items() if its_slot == slot)

    def fill_history(self, sources: Sequence[Any]) -> None:
        (history,) = (source for source in sources if source.name == "history")
        for _ in range(HISTORY_TOKENS // 4000):
            text = self.source.make(4000)
            history.start(0, text[:10], None)
            history.extend(0, text[10:].tolist())
            history.stop(0, True)
            history.work(8192)

    def round(self, num_nodes: int) -> tuple[float, float]:
        """One; returns its seconds and those of its thread's CPU, without what the benchmark itself does."""
        ends = [row for row in range(len(self.rows)) if self.rng.random() < 1 / 8]
        free = list(range(len(self.rows), self.batch)) + ends
        gone = [self.rows[row] for row in ends]
        self.rows.extend([0] * (self.batch - len(self.rows)))
        for row in free:
            self.rows[row] = self.new_request(row)
        fresh = [self.rows[row] for row in free]
        prompts = [self.buffer[row, :PROMPT_TOKENS].copy() for row in free]  # as the V1 runner's adapter hands them over
        self.cold += 1
        cpu, started = time.thread_time(), time.perf_counter()
        for number in gone:
            self.proposer.finish(str(number))
        for number, prompt in zip(fresh, prompts, strict=True):
            self.proposer.admit(str(number), prompt, self.params)
        seconds, cpu = time.perf_counter() - started, time.thread_time() - cpu
        self.index()
        sampled, verified = [], []
        for row, number in enumerate(self.rows):
            chain, start, text = self.chains[number], int(self.lengths[row]), self.texts[number]
            num_right = 0
            while num_right < len(chain) and text[start + num_right] == chain[num_right]:
                num_right += 1
            self.lengths[row] = end = start + num_right + 1
            self.buffer[row, start:end] = text[start:end]
            sampled.append(num_right + 1)
            verified.append(chain)
        names = [str(number) for number in self.rows]
        self.worker.receive(self.name_of)
        self.worker.publish(self.texts, num_nodes)
        self.cold += 1
        cpu_started, started = time.thread_time(), time.perf_counter()
        batch = Batch.at(names, self.buffer, range(len(names)), self.lengths.tolist(), sampled, verified)
        chains = self.proposer.propose(batch)
        seconds, cpu = seconds + time.perf_counter() - started, cpu + time.thread_time() - cpu_started
        self.chains = dict(zip(self.rows, chains, strict=True))
        for number in gone:
            del self.texts[number]
        return seconds, cpu


def measure(batch: int, temperature: float, rounds: int) -> dict[str, rows.Value]:
    """One row."""
    engine = Engine(batch, temperature)
    for _ in range(30):
        engine.round(NODES[batch])
    gc.collect()
    gc.freeze()
    before = engine.proposer.counters.proposed_tokens
    seconds, cpu = zip(*[engine.round(NODES[batch]) for _ in range(rounds)], strict=True)
    proposed = (engine.proposer.counters.proposed_tokens - before) / rounds / batch
    engine.channel.close()
    row: dict[str, rows.Value] = {"batch": batch, "temperature": temperature, "nodes_per_round": NODES[batch]}
    row |= {f"p{int(100 * q)}_us": 1e6 * quantile(seconds, q) for q in (0.2, 0.5, 0.8, 0.99)} | {"max_us": 1e6 * max(seconds)}
    row |= {f"cpu_p{int(100 * q)}_us": 1e6 * quantile(cpu, q) for q in (0.2, 0.5, 0.8, 0.99)}
    return row | {"chain_length": proposed, "rounds": rounds}


def main() -> None:
    """Appends one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 256])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "round.csv")
    options = parser.parse_args()
    for batch in options.batches:
        for temperature in options.temperatures:
            row = measure(batch, temperature, options.rounds)
            print(row, flush=True)
            rows.append(options.output, row | rows.provenance("benchmarks.round_bench"))


if __name__ == "__main__":
    main()
