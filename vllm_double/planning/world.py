"""A scripted world: the real round, drafting loop and transport, with tables for models and a simulated clock.

A draft forward moves the clock, and the target's steps end while it moves, as they would beside it. No vLLM, no Ray, no real
clock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_double.draft.engine.base import Batch
from vllm_double.draft.forward_budget import SIZES, nodes_for
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.worker import DraftWorker
from vllm_double.planning.script import NUM_LISTED, VOCAB_SIZE, Script, Tables, Text, Times, texts
from vllm_double.retrieval.base import Continuation, Source, Tokens
from vllm_double.target.proposer import Proposer, RequestParams, Row
from vllm_double.target.step_cost import StepCost
from vllm_double.transport.inprocess import in_process_pair

__all__ = ["Outcome", "ScriptedEngine", "ScriptedRetriever", "SimulatedClock", "simulate"]

_PAGE_SIZE = 64
_LOOKS = 20  # of a waiting target, in the time of a draft forward
_MATCH_LENGTH = 8  # of each lookup hit


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
        """Let time pass, and a due event happen."""
        end = self.now + seconds
        while self._event is not None and self._due <= end:
            event, self._event = self._event, None
            self.now = self._due
            event()
        self.now = end


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a simulation. ``speedup``: over decoding without drafts, in the same times and batch.

    rounds: steps of the target. forwards: sum of the requests' forwards. chain_length: draft tokens verified per forward.
    waits: of the target for the draft, per round.
    """

    speedup: float
    tokens_per_forward: float
    hit_rate: float
    chain_length: float
    rounds: int
    forwards: int
    waits: float


class ScriptedEngine:
    """DraftEngine whose answer depends on the last token and the noise behind it, and whose forwards take simulated time."""

    page_size = _PAGE_SIZE
    vocab_size = VOCAB_SIZE

    def __init__(self, tables: Tables, times: Times, clock: SimulatedClock, max_length: int, num_pages: int) -> None:
        self.max_length = max_length
        self.num_pages = num_pages
        self._tables = tables
        self._times = times
        self._clock = clock

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward."""
        self._clock.advance(self._times.draft_forward(len(batch.token_ids)))
        last = batch.token_ids[batch.output_indices].astype(np.uint64)
        return self._tables.children(last, num_children, batch.output_sampling["seed"], batch.output_positions)

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """Pages hold nothing here."""


@dataclass(frozen=True, slots=True)
class _End:
    """A text's last token, where it is, and how many tokens retrieval knows behind it."""

    seed: int
    position: int
    token: int
    left: int


class ScriptedRetriever(Source):
    """Source that knows the copied runs of the script; each side has one."""

    name = "scripted"

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._ends: dict[int, _End] = {}

    def start(self, key: int, tokens: Tokens, tenant: str | None) -> None:
        """See Source."""
        prompt, *others = tokens.tolist()
        end = _End(self._tables.seed(prompt), 0, prompt, self._tables.copied_behind(prompt, 0))
        self._ends[key] = self._walk(end, others)

    def stop(self, key: int, keep: bool) -> None:
        """See Source."""
        del self._ends[key]

    def forget(self) -> None:
        """See Source."""

    def work(self, budget_tokens: int) -> None:
        """See Source."""

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """See Source."""
        self._ends[key] = self._walk(self._ends[key], tokens)

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """See Source. Behind a run's end it goes on with something else than the target does."""
        end = self._walk(self._ends[key], tail)
        if end.left == 0:
            return None
        tokens: list[int] = []
        last = end.token
        for place in range(max_tokens):
            known = place < end.left
            last = self._tables.target(last, end.seed, end.position + place) if known else self._tables.elsewhere(last)
            tokens.append(last)
        return Continuation.of(tokens, _MATCH_LENGTH, [1] * len(tokens), [1] * len(tokens))

    def _walk(self, end: _End, tokens: Sequence[int]) -> _End:
        last, left = end.token, end.left
        for position, token in enumerate(tokens, end.position):
            if left > 0 and token != self._tables.target(last, end.seed, position):
                left = 0  # it left the run
            last, left = token, self._tables.copied_behind(token, left)
        return _End(end.seed, end.position + len(tokens), last, left)


def simulate(
    script: Script, times: Times, *, num_tokens: int, batch: int = 1, num_speculative_tokens: int = 16,
    nodes_per_iteration: int | None = None, children_per_node: int = 64, min_path_prob: float = 1e-3,
    step_cost: StepCost | None = None, may_wait: bool = True, num_learnt_tokens: int = 0,
) -> Outcome:  # fmt: skip
    """Decode ``num_tokens`` tokens for each of ``batch`` requests with the real proposer and the real draft worker.

    num_learnt_tokens: of each of as many requests before, which do not count; a server learns for longer than one answer.
    nodes_per_iteration: None is what the draft would choose by these times. step_cost: None is what the proposer learns.
    may_wait: whether the target may wait for the draft.
    """
    clock = SimulatedClock()
    tables = Tables(script)
    target_end, worker_end = in_process_pair(sleep=clock.advance)
    limits = FrontierLimits(
        num_speculative_tokens,
        nodes_per_iteration=nodes_per_iteration or nodes_for([times.draft_forward(size) for size in SIZES]),
        children_per_node=min(children_per_node, NUM_LISTED),
        min_path_prob=min_path_prob,
    )
    max_length = max(num_tokens, num_learnt_tokens) + 256
    engine = ScriptedEngine(tables, times, clock, max_length, num_pages=batch * (max_length // _PAGE_SIZE + 2000))
    at_target, at_draft = ([ScriptedRetriever(tables)] if script.copied > 0 else [] for _ in range(2))
    worker = DraftWorker(engine, worker_end, limits, clock, at_draft)
    proposer = Proposer(num_speculative_tokens, target_end, at_target, clock, may_wait=may_wait)
    if step_cost is not None:
        proposer.step_cost = step_cost
    scripted = texts(tables, 2 * batch if num_learnt_tokens else batch, max_length)

    def decode(some: Sequence[Text], length: int) -> float:
        began, target = clock.now, _Target(some, times, clock, proposer, length, script.temperature)
        while target.ended_at is None:
            if not worker.turn():
                clock.advance(times.draft / 8)
        return target.ended_at - began

    if num_learnt_tokens:
        decode(scripted[batch:], num_learnt_tokens)
    before = _counts(proposer)
    seconds = decode(scripted[:batch], num_tokens)
    committed, rows, hits, lookups, proposed, rounds, waits = (_counts(proposer) - before).tolist()
    return Outcome(
        speedup=times.step(batch) * (num_tokens - 1) / seconds,
        tokens_per_forward=committed / rows,
        hit_rate=hits / max(lookups, 1),
        chain_length=proposed / rows,
        rounds=rounds,
        forwards=rows,
        waits=waits / rounds,
    )


def _counts(proposer: Proposer) -> npt.NDArray[np.int64]:
    counters = proposer.counters
    names = ("committed_tokens", "rows", "hits", "lookups", "proposed_tokens", "rounds", "waits")
    return np.array([getattr(counters, name) for name in names])


class _Target:
    """The target's process: steps that end at their time, verify, and propose."""

    def __init__(
        self, scripted: Sequence[Text], times: Times, clock: SimulatedClock, proposer: Proposer, num_tokens: int,
        temperature: float,
    ) -> None:  # fmt: skip
        self.ended_at: float | None = None
        self._times = times
        self._clock = clock
        self._proposer = proposer
        self._num_tokens = num_tokens
        self._texts = {f"r{index}": text.tokens for index, text in enumerate(scripted)}
        self._lengths = dict.fromkeys(self._texts, 1)
        self._chains: dict[str, list[int]] = {name: [] for name in self._texts}
        for name, text in zip(self._texts, scripted, strict=True):
            params = RequestParams(temperature, num_tokens + 200, frozenset(), seed=text.seed)
            proposer.admit(name, text.tokens[:1].copy(), params)
        self._begin()

    def _begin(self) -> None:
        self._num_query = sum(1 + len(chain) for chain in self._chains.values())
        self._seconds = self._times.step(self._num_query)
        self._clock.at(self._clock.now + self._seconds, self._end)

    def _end(self) -> None:
        rows = []
        for name, chain in self._chains.items():
            start = self._lengths[name]
            drawn = self._texts[name][start : start + len(chain) + 1].tolist()
            num_accepted = next((place for place, token in enumerate(chain) if token != drawn[place]), len(chain))
            self._lengths[name] = start + num_accepted + 1
            rows.append(Row(name, self._texts[name][: start + num_accepted + 1], num_accepted + 1, chain))
        self._proposer.step_cost.observe(self._num_query, self._seconds)
        self._go_on(rows, self._proposer.round(rows))

    def _go_on(self, rows: Sequence[Row], steps: Generator[None, None, list[list[int]]]) -> None:
        """The round, which may wait for the draft."""
        try:
            next(steps)
        except StopIteration as end:
            self._verify(rows, end.value)
        else:
            self._clock.at(self._clock.now + self._times.draft / _LOOKS, lambda: self._go_on(rows, steps))

    def _verify(self, rows: Sequence[Row], chains: Sequence[list[int]]) -> None:
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
