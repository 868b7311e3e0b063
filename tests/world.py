"""A scripted world: the real round, drafting loop and logs, with tables for models and a simulated clock.

The draft's next-token distributions are drawn from a family (`Script`), and the target's greedy token is drawn from the draft's
distribution, so that the draft is as right as it says. A draft forward moves the clock; the target's steps end while it moves,
as they would beside it. Nothing here imports vLLM, Ray or a real clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_double.draft.base import Row as DraftRow
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.proposer import Proposer, RequestParams, Row
from vllm_double.retrieval.base import Continuation, Tokens
from vllm_double.transport.inprocess import in_process_pair

__all__ = ["Outcome", "Script", "ScriptedEngine", "ScriptedRetriever", "SimulatedClock", "Tables", "Times", "simulate"]

_VOCAB = 1 << 30  # so large that no text ever comes back to a token by chance
_QUANTILES = 1024
_PAGE_SIZE = 64


class SimulatedClock:
    """Seconds that pass only by `advance`. One event can wait; it happens while the clock passes its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due = float("inf")
        self._event: Callable[[], None] | None = None

    def __call__(self) -> float:
        return self.now

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Have ``event`` happen at a time that has not passed yet."""
        self._due, self._event = max(seconds, self.now), event

    def advance(self, seconds: float) -> None:
        """Let time pass, and what is due happen."""
        end = self.now + seconds
        while self._event is not None and self._due <= end:
            event, self._event = self._event, None
            self.now = self._due
            event()
        self.now = end


@dataclass(frozen=True, slots=True)
class Script:
    """What the models say, as a function of the last token.

    acceptance: mean of the draft's confidence in its first token, and how often that is the target's, in (0, 1].
    tail: where it is not, the chance that it is none of the draft's first r either is ``r ** -tail``.
    spread: sum of the parameters of the beta distribution of the draft's confidence; small: sure here, clueless there.
    copied, copy_length: share of the text that repeats something seen, in runs of so many tokens (mean); retrieval knows
        a run as soon as it has begun, and is wrong where it ends.
    """

    acceptance: float
    tail: float = 0.3
    spread: float = 1.5
    copied: float = 0.0
    copy_length: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.acceptance <= 1.0:
            raise ValueError(f"acceptance is {self.acceptance}, not in (0, 1]")
        if self.tail <= 0 or self.spread <= 0 or self.copy_length < 1 or not 0.0 <= self.copied < 1.0:
            raise ValueError("tail and spread must be positive, copy_length at least 1, copied in [0, 1)")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. A target step verifies t tokens in ``target + token * (t - 1)``, and ``gap`` passes before the next one.

    A draft forward of t tokens takes ``draft + draft_token * (t - 1)``.
    """

    target: float
    draft: float
    token: float = 0.0
    draft_token: float = 0.0
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation gave: ``speedup`` over decoding without drafts, in the same times and batch."""

    speedup: float
    tokens_per_forward: float
    hit_rate: float
    chain_length: float
    nodes_per_step: float
    rounds: int


class Tables:
    """Hashes of a token give the draft's confidence behind it, and the rank of the target's token in the draft's list."""

    def __init__(self, script: Script) -> None:
        self._script = script
        if script.acceptance < 1.0:
            rng = np.random.default_rng(0)
            a, b = script.acceptance * script.spread, (1 - script.acceptance) * script.spread
            self._confidence = np.quantile(rng.beta(a, b, 200_000), (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
        else:
            self._confidence = np.ones(_QUANTILES)

    def children(self, tokens: npt.NDArray[np.uint64], count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The draft's ``count`` best tokens behind each of ``tokens``, int32 and float32 [n, count]."""
        sure = self._confidence[(self._hash(tokens, 1) % _QUANTILES).astype(np.int64)]
        ranks = np.arange(1, count, dtype=np.float64)
        rest = ranks**-self._script.tail - (ranks + 1) ** -self._script.tail
        probs = np.concatenate([sure[:, None], (1 - sure)[:, None] * rest[None, :]], axis=1)
        # The first place is the surest one: where the tail's first token would be more probable, they change places.
        order = np.argsort(-probs, axis=1, kind="stable")
        named = self._names(tokens[:, None], np.arange(count, dtype=np.uint64)[None, :])
        return np.take_along_axis(named, order, 1), np.take_along_axis(probs, order, 1).astype(np.float32)

    def target(self, token: int) -> int:
        """The target's token behind ``token``."""
        last = np.array([token], np.uint64)
        sure = self._confidence[int(self._hash(last, 1)[0] % _QUANTILES)]
        if self._uniform(last, 2) < sure:
            rank = 0
        else:
            rank = int(min(self._uniform(last, 3) ** (-1.0 / self._script.tail), 1e9))
        return int(self._names(last, np.array([rank], np.uint64))[0])

    def _names(self, tokens: npt.NDArray[np.uint64], ranks: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        return (self._hash(tokens, 4 + ranks) % _VOCAB).astype(np.int32)

    def _uniform(self, tokens: npt.NDArray[np.uint64], salt: int) -> float:
        return (float(self._hash(tokens, salt)[0]) + 0.5) / 2.0**64

    def _hash(self, tokens: npt.NDArray[np.uint64], salt: int | npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """splitmix64 of token and salt."""
        salted = np.atleast_1d(np.asarray(salt, np.uint64)) + np.uint64(self._script.seed << 40)
        value = tokens * np.uint64(0x9E3779B97F4A7C15) + salted * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x94D049BB133111EB)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


class ScriptedEngine:
    """DraftEngine whose answer depends on the last token alone, and whose forwards take simulated time."""

    page_size = _PAGE_SIZE
    vocab_size = _VOCAB

    def __init__(self, tables: Tables, times: Times, clock: SimulatedClock, max_length: int, num_pages: int) -> None:
        self.max_length = max_length
        self.num_pages = num_pages
        self.num_nodes = 0
        self._tables = tables
        self._times = times
        self._clock = clock

    def forward(self, rows: Sequence[DraftRow], num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward."""
        num_tokens = sum(len(row.tokens) for row in rows)
        self._clock.advance(self._times.draft + self._times.draft_token * (num_tokens - 1))
        last = [token for row in rows for token in row.tokens[len(row.tokens) - row.num_outputs :]]
        self.num_nodes += len(last)
        return self._tables.children(np.array(last, np.uint64), num_children)

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """Pages hold nothing here."""


class ScriptedRetriever:
    """Retriever that knows the target's text where the script says that it is copied."""

    name = "scripted"

    def __init__(self, tables: Tables, script: Script) -> None:
        self._tables = tables
        self._script = script
        self._texts: dict[int, list[int]] = {}
        self._left: dict[int, int] = {}
        self._rng = np.random.default_rng(script.seed + 1)

    def start(self, key: int, tokens: Tokens, tenant: str | None) -> None:
        """See Retriever."""
        self._texts[key] = tokens.tolist()
        self._left[key] = 0

    def stop(self, key: int, keep: bool) -> None:
        """See Retriever."""
        del self._texts[key], self._left[key]

    def forget(self) -> None:
        """See Retriever."""

    def work(self, budget_tokens: int) -> None:
        """See Retriever."""

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """See Retriever. Runs begin and end by chance, so that the share of copied text is the script's."""
        script = self._script
        begin = script.copied / (1 - script.copied) / script.copy_length
        for token in tokens:
            self._texts[key].append(token)
            if self._left[key] > 0:
                self._left[key] -= 1
            elif self._rng.random() < begin:
                self._left[key] = int(self._rng.geometric(1 / script.copy_length))

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """See Retriever. Only the text's own end is looked up; the token behind a run's end is a wrong one."""
        left = self._left[key]
        if tail or left == 0:
            return None
        tokens: list[int] = []
        last = self._texts[key][-1]
        while len(tokens) < min(left, max_tokens):
            last = self._tables.target(last)
            tokens.append(last)
        if len(tokens) < max_tokens:
            tokens.append(tokens[-1] + 1)
        return Continuation(tokens, 8, [1] * len(tokens), [1] * len(tokens))


def simulate(
    script: Script, times: Times, *, num_tokens: int, batch: int = 1, num_speculative_tokens: int = 16,
    nodes_per_iteration: int = 8, children_per_node: int = 32, min_path_prob: float = 3e-3,
) -> Outcome:  # fmt: skip
    """Decode ``num_tokens`` tokens for each of ``batch`` requests with the real proposer and the real draft worker."""
    clock = SimulatedClock()
    tables = Tables(script)
    target_end, worker_end = in_process_pair(sleep=clock.advance)
    limits = FrontierLimits(
        num_speculative_tokens,
        nodes_per_iteration=nodes_per_iteration,
        children_per_node=children_per_node,
        min_path_prob=min_path_prob,
    )
    max_length = num_tokens + 256
    engine = ScriptedEngine(tables, times, clock, max_length, num_pages=batch * (max_length // _PAGE_SIZE + 2000))
    worker = DraftWorker(engine, worker_end, limits, clock)
    retrievers = [ScriptedRetriever(tables, script)] if script.copied > 0 else []
    proposer = Proposer(num_speculative_tokens, target_end, retrievers, clock)
    target = _Target(tables, times, clock, proposer, batch, num_tokens)
    while target.ended_at is None:
        if not worker.turn():
            clock.advance(times.draft / 8)
    counters = proposer.counters
    plain = (times.target + times.token * (batch - 1) + times.gap) * num_tokens
    forwards = counters.rows
    return Outcome(
        speedup=plain / target.ended_at,
        tokens_per_forward=counters.committed_tokens / forwards,
        hit_rate=counters.hits / max(counters.harvests, 1),
        chain_length=counters.proposed_tokens / forwards,
        nodes_per_step=engine.num_nodes / counters.rounds,
        rounds=counters.rounds,
    )


class _Target:
    """The target's process: steps that end at their time, verify, and propose."""

    def __init__(
        self, tables: Tables, times: Times, clock: SimulatedClock, proposer: Proposer, batch: int, num_tokens: int
    ) -> None:
        self.ended_at: float | None = None
        self._tables = tables
        self._times = times
        self._clock = clock
        self._proposer = proposer
        self._num_tokens = num_tokens
        self._texts: dict[str, npt.NDArray[np.int32]] = {}
        self._lengths: dict[str, int] = {}
        self._chains: dict[str, list[int]] = {}
        for index in range(batch):
            name = f"r{index}"
            text = np.zeros(num_tokens + 256, np.int32)
            text[0] = 7919 * (index + 1)
            self._texts[name], self._lengths[name], self._chains[name] = text, 1, []
            proposer.admit(name, text[:1].copy(), RequestParams(0.0, num_tokens + 200, frozenset()))
        self._begin()

    def _begin(self) -> None:
        num_query = sum(1 + len(chain) for chain in self._chains.values())
        self._seconds = self._times.target + self._times.token * (num_query - 1)
        self._num_query = num_query
        self._clock.at(self._clock.now + self._seconds, self._end)

    def _end(self) -> None:
        rows = []
        for name, chain in self._chains.items():
            text, length = self._texts[name], self._lengths[name]
            start = length
            for proposed in [*chain, None]:
                text[length] = self._tables.target(int(text[length - 1]))
                length += 1
                if proposed != text[length - 1]:
                    break
            self._lengths[name] = length
            rows.append(Row(name, text[:length], length - start, chain))
        self._proposer.step_cost.observe(self._num_query, self._seconds)
        chains = self._proposer.propose(rows)
        for row, chain in zip(rows, chains, strict=True):
            if self._lengths[row.request_id] < self._num_tokens:
                self._chains[row.request_id] = chain
            else:
                del self._chains[row.request_id]
                self._proposer.finish(row.request_id)
        if self._chains:
            self._clock.at(self._clock.now + self._times.gap, self._begin)
        else:
            self.ended_at = self._clock.now
