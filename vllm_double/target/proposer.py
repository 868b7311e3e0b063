"""The round on the target's side, between two target forwards: drain, commit, look up, choose, send, and maybe wait.

Knows neither vLLM nor Ray nor a clock: the integration hands in rows, the worker is one end of two logs, time is passed in.
Each step of the round is one call for the whole batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.base import Found, Queries, Source
from vllm_double.retrieval.known_noise import know_noise
from vllm_double.target._round_steps import NO_ROOM
from vllm_double.target._trie_steps import NONE
from vllm_double.target.batch import Batch, Live, Row, Summary
from vllm_double.target.calibration import Calibration
from vllm_double.target.draft_link import DraftLink
from vllm_double.target.lookups import Lookups
from vllm_double.target.request_table import RequestParams, RequestTable
from vllm_double.target.round_calls import calls
from vllm_double.target.speculation_trie import Search
from vllm_double.target.stats import Counters
from vllm_double.target.step_cost import StepCost
from vllm_double.target.verify_length import least_threshold
from vllm_double.target.waiting import Waiting
from vllm_double.transport.base import TargetChannel

__all__ = ["Proposer", "RequestParams", "Row"]

Ints = npt.NDArray[np.int32]


def _no_nap() -> None:
    """Look again at once."""


class _Round(NamedTuple):
    """What holds during one round. fixed_s, token_s: of a target step, see `StepCost.estimate`."""

    batch: Batch
    live: Live
    summary: Summary
    fixed_s: float
    token_s: float

    @property
    def floor(self) -> float:
        """No token with a lower probability to be accepted will be verified."""
        return least_threshold(self.summary.num_live, self.fixed_s, self.token_s)


class Proposer:
    """All live requests of one engine. ``channel`` is None if retrieval alone drafts. ``clock`` gives seconds.

    ``vocab_size``: of the target; prompts can hold ids beyond it (of images, say), which are not offered. ``may_wait``:
    whether the target may wait for the draft. Prompts and answers are indexed by `index`, which somebody must call.
    ``renew_sources``: makes other sources, empty ones, in the place of those whose state may be broken.
    """

    def __init__(
        self, num_speculative_tokens: int, channel: TargetChannel | None, sources: Sequence[Source],
        clock: Callable[[], float], vocab_size: int = sys.maxsize, may_wait: bool = True,
        renew_sources: Callable[[], Sequence[Source]] | None = None,
    ) -> None:  # fmt: skip
        self.calibration = Calibration(source.name for source in sources)
        self.counters = Counters(tuple(self.calibration.sources))
        self.step_cost = StepCost()
        self.table = RequestTable(num_speculative_tokens, vocab_size)
        self.link = DraftLink(channel, self.table, self.counters)
        self.waiting = Waiting(self.link, self.counters, clock)
        self._use(sources)
        self._renew_sources = renew_sources
        self._clock = clock
        self._may_wait = may_wait and channel is not None
        self._calls = calls()
        self._slots: dict[str, int] = {}
        self._search = Search.empty(num_speculative_tokens)
        self._make_room(1, 1)

    def _use(self, sources: Sequence[Source]) -> None:
        indices = [self.calibration.sources.index(source.name) for source in sources]
        self.lookups = Lookups(sources, indices, self.table.max_chain)

    def _make_room(self, num_rows: int, num_new: int) -> None:
        """For so many rows, and so many sampled tokens in all."""
        self._live = Live.empty(num_rows, self.table.max_chain, num_new)
        self._everyone = np.arange(num_rows, dtype=np.int32)
        self._awaited_rows = np.zeros(num_rows, np.int32)

    # ---- lifecycle --------------------------------------------------------------------------------------------

    def admit(self, request_id: str, tokens: npt.NDArray[np.int32], params: RequestParams) -> None:
        """A request enters with its prompt, or with a new text under a known id."""
        self.finish(request_id)
        slot = self._slots[request_id] = self.table.add(params, len(tokens))
        if params.use_drafts:
            self.lookups.start(slot, tokens, params.tenant)
            self.link.admit(slot, tokens)

    def finish(self, request_id: str) -> None:
        """A request leaves, finished or aborted. Unknown ids are ignored: vLLM reports those that never ran, too."""
        slot = self._slots.get(request_id)
        if slot is None:
            return
        if self.table.params[slot].use_drafts:
            self.lookups.stop(slot, self._length(slot), keep=True)
            self.link.release(slot, keep=True)
        del self._slots[request_id]
        self.table.remove(slot)

    def index(self, budget_tokens: int) -> bool:
        """Index at most so many tokens of prompts and finished answers, for each source; whether more may wait."""
        return self.lookups.index(budget_tokens)

    def _length(self, slot: int) -> int:
        return int(self.table.tries.requests["length"][slot])

    def forget_history(self) -> None:
        """The target's weights changed: nothing that it said before is offered again, by either side."""
        self.lookups.forget()
        self._calls.forget_retrieved(self.table.tries)  # what was found for the chains to come
        self.link.forget_history()

    def forget_step_cost(self) -> None:
        """What steps have cost so far tells nothing of those to come."""
        self.step_cost = StepCost()

    def reset_prefix_cache(self) -> None:
        """What the draft has read so far is not found by requests that are admitted to it from now on."""
        self.link.reset_prefix_cache()

    def reset(self) -> None:
        """Drop the state of all live requests on both sides, sound or not. History stays if the sources are sound."""
        if self.lookups.is_broken and self._renew_sources is not None:
            with suppress(Exception):
                self._use(self._renew_sources())
        for slot in self._slots.values():
            self.lookups.drop(slot)
        self._slots = {}
        self.table.clear()
        with suppress(Exception):
            self.link.release_all()

    def knows(self, request_id: str) -> bool:
        """Whether the request is live."""
        return request_id in self._slots

    # ---- the round --------------------------------------------------------------------------------------------

    def propose(self, rows: Batch | Sequence[Row], nap: Callable[[], None] = _no_nap) -> list[list[int]]:
        """The chains that the target verifies next, one per row; empty if nothing is worth it. ``nap`` lets a fraction of a
        draft step pass."""
        steps = self.round(rows)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                chains: list[list[int]] = end.value
                return chains
            nap()

    def round(self, rows: Batch | Sequence[Row]) -> Generator[None, None, list[list[int]]]:
        """As `propose`; whenever it yields it is to be resumed a fraction of a draft step later."""
        started, waited = self._clock(), 0.0
        batch = rows if isinstance(rows, Batch) else Batch.of(rows)
        self.link.begin_round()
        self._drain()
        self.link.flush()
        now = self._commit(batch)
        everyone = self._everyone[: now.summary.num_live]
        self._find_paths(now, everyone)
        awaited = self._awaited(now)
        self._choose(now, np.setdiff1d(everyone, awaited) if len(awaited) else everyone)
        if len(awaited):
            waited = yield from self._wait(now, awaited)
        chains = self._chains(now)
        self.counters.proposed(self._clock() - started - waited)
        return chains

    def pause(self) -> None:
        """A round without drafts: drain the worker's channel, and send what there was no room for."""
        self.link.begin_round()
        self._drain()
        self.link.flush()

    def _drain(self) -> None:
        """Take in what the worker has drafted since the last round."""
        for nodes in self.link.receive():
            self._calls.file_nodes(self.table.tries, self.counters.tally, nodes)

    def _commit(self, batch: Batch) -> _Round:
        """Take in what was sampled."""
        rows, lookups = batch.rows, self.lookups
        rows.slots[:] = [self._slots.get(request_id, NONE) for request_id in batch.request_ids]
        while True:
            live = self._live
            status = self._calls.commit(
                self.table.tries, self.calibration.tables, self.counters.tally, self.waiting.means, rows, live,
                self.link.session, lookups.bundle.indexes(),
            )  # fmt: skip
            if status == NONE:
                break
            if status == NO_ROOM:
                self._make_room(2 * len(rows.slots), 2 * int(rows.num_sampled.sum()))
            else:
                self._rewind(int(rows.slots[status]), batch.text(status)[: rows.lengths[status] - rows.num_sampled[status]])
        summary = Summary(*live.summary.tolist())
        lookups.extend(live, summary.num_grown, summary.num_told)
        if summary.num_ended:
            self.link.send_ends(batch, live.ended[: summary.num_ended], live.ended_slots[: summary.num_ended], live.ends)
        return _Round(batch, live, summary, *self.step_cost.estimate())

    def _find_paths(self, now: _Round, picked: Ints) -> None:
        """The best paths of the picked live rows, with what the sources know behind their texts and behind these paths."""
        lookups, live, num = self.lookups, now.live, len(picked)
        if not num:
            return
        lookups.make_room(num)
        given = self.table.tries, self.calibration.tables, self._search, now.batch.rows, live, picked, now.floor
        if lookups.are_bundled:
            unknown = self._calls.find_whole_paths(*given, lookups.found, lookups.indices, lookups.bundle.indexes())
            self.lookups.is_broken = unknown != NONE
            assert not self.lookups.is_broken
            return
        self._calls.ask(live, picked)
        queries = Queries(live.keys[:num], live.tails[:num], live.tail_lengths[:num], live.tail_limits[:num])
        requests = self.table.tries.requests[queries.keys]
        for take in (self._calls.find_paths, self._calls.extend_paths):
            found = lookups.ask(queries)
            if now.summary.num_sampled:
                positions = requests["length"] + queries.tail_lengths - 1
                know_noise(map(Found, *found), requests["temperature"] > 0, requests["seed"], positions)
            take(*given, found, lookups.indices)

    def _choose(self, now: _Round, chosen: Ints) -> None:
        """Cut the paths of the chosen live rows, as long as they pay beside those of all, and send them to the worker."""
        live, num = now.live, now.summary.num_live
        self._calls.cut_chains(self.table.tries, self.counters.tally, live, chosen, now.fixed_s, now.token_s)
        which = slice(num) if len(chosen) == num else chosen  # a slice costs a tenth
        self.link.send_commits(now.batch, live.rows[which], live.slots[which])

    def _chains(self, now: _Round) -> list[list[int]]:
        """Of all rows of the batch."""
        num, live = now.summary.num_live, now.live
        chains: list[list[int]] = [[] for _ in now.batch.request_ids]
        lengths = self.table.tries.requests["chain_length"][live.slots[:num]].tolist()
        for row, path, length in zip(live.rows[:num].tolist(), live.paths["token"][:num].tolist(), lengths, strict=True):
            chains[row] = path[:length]
        return chains

    def _rewind(self, slot: int, tokens: npt.NDArray[np.int32]) -> None:
        """The text is not what was committed last (a KV transfer failed, say): begin again with what it is now."""
        self.counters.rewinds += 1
        request, params = self.table.tries.requests[slot], self.table.params[slot]
        request["finished"], request["chain_length"] = False, 0
        if params.use_drafts:
            self.lookups.stop(slot, 0, keep=False)
            self.lookups.start(slot, tokens, params.tenant)
            self.link.release(slot)
        self.table.restart(slot, int(request["key"]), len(tokens))

    # ---- waiting ----------------------------------------------------------------------------------------------

    def _awaited(self, now: _Round) -> Ints:
        """The live rows for whose next draft tokens the target waits: all to which one is worth its verification, or none."""
        num = 0
        if self._may_wait and now.summary.num_live and self.waiting.is_prompt():
            num = self._calls.choose_awaited(
                self.table.tries, now.live, self.waiting.means, self.link.session, self.waiting.step_s, now.fixed_s,
                now.token_s, self._awaited_rows,
            )  # fmt: skip
        return self._awaited_rows[:num]

    def _wait(self, now: _Round, awaited: Ints) -> Generator[None, None, float]:
        """Wait for the next draft tokens of these live rows, and choose; returns the seconds."""
        tries, live = self.table.tries, now.live
        slots = live.slots[awaited]
        tries.requests["waited"][slots] = tries.requests["missed"][slots]
        self.link.send_commits(now.batch, live.rows[awaited], slots, waits=True)
        found, no_sources, means = self.lookups.found, self.lookups.indices[:0], self.waiting.means
        tokens_per_s = self._calls.tokens_per_s(means, now.summary.num_live, now.fixed_s, now.token_s)

        def look() -> tuple[int, float]:
            self._drain()
            self._calls.find_paths(
                tries, self.calibration.tables, self._search, now.batch.rows, live, awaited, now.floor, found, no_sources
            )
            worth = self._calls.next_worth(tries, live, means, awaited, tokens_per_s * now.token_s)
            return int(live.path_lengths[awaited].sum()), worth

        num_known = int(live.path_lengths[awaited].sum())
        waited = yield from self.waiting.wait(look, tokens_per_s, num_known)
        self._find_paths(now, awaited)
        self._choose(now, awaited)
        return waited

    @property
    def num_requests(self) -> int:
        """Live requests."""
        return len(self._slots)

    def check_integrity(self) -> None:
        """Assert that the arena is sound and that every handle leads to its request. Slow: for tests."""
        assert sorted(self._slots.values()) == sorted(self.table.params)
        self.table.check_integrity()
        self.link.check_integrity()
