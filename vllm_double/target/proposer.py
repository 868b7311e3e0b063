"""The round on the target's side, between two target forwards: drain, commit, graft, choose, tell, and maybe wait.

Knows neither vLLM nor Ray nor a clock: the integration hands in rows, the worker is one end of two logs, time is passed in.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_double.prefix_hash import mix, seed
from vllm_double.retrieval.base import Continuation, Source
from vllm_double.target.calibration import NUM_BUCKETS, Calibration, temperature_bucket
from vllm_double.target.draft_use import DraftUse
from vllm_double.target.speculation_trie import DRAFT, Edge, PathToken, SpeculationTrie
from vllm_double.target.stats import Counters
from vllm_double.target.step_cost import StepCost
from vllm_double.target.verify_length import chain_lengths
from vllm_double.target.waiting import Rates, WaitRule
from vllm_double.transport.base import TargetEnd
from vllm_double.transport.messages import Admit, Commit, Forget, Nodes, Release

__all__ = ["Proposer", "RequestParams", "Row"]

_INDEX_TOKENS_PER_ROUND = 2048
_ADMIT_TOKENS_PER_COMMAND = 8192
_ADMIT_TOKENS_PER_ROUND = 65536
_DRAIN_BYTES_PER_ROUND = 1 << 20
_MAX_STOPS = 1024  # that the worker is told of: what it drafts behind others is of no use, and harmless
_CHILDREN_READ = 3  # of a drafted node: a less probable one is never the best way on
_MIN_REACH = 0.01  # a retrieved path is taken no further than this
_RATE_WEIGHT = 0.02  # of a row's forward in the mean of tokens per forward
_PLACE_TOKENS = 8  # a place in the text is known again by so many tokens before it
_MAX_REFUSED = 1024  # refusals that are remembered for a request


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What of a request matters to drafting.

    temperature: 0 is greedy. max_length: tokens of prompt and output together that the text can have at most.
    stop_token_ids: tokens after which nothing counts. tenant: whose earlier texts the request may be offered; None: it named
    nobody. use_drafts: False if drafts were declined. use_worker: False if the draft model cannot read the prompt.
    seed: of the noise that tokens are drawn with, int64. top_k (0: off), top_p, min_p: what they are drawn from.
    """

    temperature: float
    max_length: int
    stop_token_ids: frozenset[int]
    tenant: str | None = None
    use_drafts: bool = True
    use_worker: bool = True
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def temperatures(self) -> int:
        """See `temperature_bucket`."""
        return temperature_bucket(self.temperature)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the target's batch after sampling.

    tokens: int32 [n], the whole text with what was just sampled. num_sampled: how many of them were just sampled; 0 while
    the prompt is being read. verified: the draft tokens that the target really verified in this step.
    """

    request_id: str
    tokens: npt.NDArray[np.int32]
    num_sampled: int
    verified: Sequence[int]


@dataclass(slots=True)
class _Request:
    """A live request. ``session`` is the worker's session that knows it under ``handle``; 0 where none does."""

    key: int
    params: RequestParams
    length: int
    trie: SpeculationTrie
    handle: int = 0
    session: int = 0
    told: int = 0  # length of the text that the worker has been told
    was_heard: bool = False  # the worker has drafted since it was told of the request, or since its last rest
    use: DraftUse = field(default_factory=DraftUse)
    finished: bool = False
    missed: bool = False  # nothing was ready behind the last committed token when the round began
    waited: bool = False  # and the target waited for its chain
    chain: list[PathToken] = field(default_factory=list)
    # Retrieved tokens that the target did not want, each behind the tokens before it; oldest first.
    refused: dict[tuple[int, ...], None] = field(default_factory=dict)
    refused_tokens: set[int] = field(default_factory=set)  # all that were ever among them


def _no_nap() -> None:
    """Look again at once."""


@dataclass(slots=True, eq=False)
class _Live:
    """A row of this round that wants drafts, with the best path behind its text."""

    index: int
    row: Row
    request: _Request
    path: list[PathToken] = field(default_factory=list)


class Proposer:
    """All live requests of one engine. ``end`` is None where retrieval alone drafts. ``clock`` gives seconds.

    ``vocab_size``: of the target; prompts can hold ids beyond it (of images, say), which are not offered. ``may_wait``:
    whether the target may wait for the draft.
    """

    def __init__(
        self, num_speculative_tokens: int, end: TargetEnd | None, retrievers: Sequence[Source],
        clock: Callable[[], float], vocab_size: int = sys.maxsize, may_wait: bool = True,
    ) -> None:  # fmt: skip
        self.counters = Counters()
        self.calibration = Calibration()
        self.step_cost = StepCost()
        self._num_tokens = num_speculative_tokens
        self._end = end
        self._retrievers = list(retrievers)
        self._clock = clock
        self._vocab_size = vocab_size
        self._may_wait = may_wait
        self.wait_rule = WaitRule()
        self._tokens_per_row, self._chain_length = 1.0, 0.0  # of a forward, lately
        self._late_beat = -1  # the heartbeat of a worker that was waited for in vain
        self._requests: dict[str, _Request] = {}
        self._by_handle: dict[int, _Request] = {}
        self._to_say: list[Release | Forget] = []
        self._admit_budget = _ADMIT_TOKENS_PER_ROUND
        self._last_key = 0
        self._epoch = 0  # of the draft's prefix cache

    # ---- lifecycle --------------------------------------------------------------------------------------------

    def admit(self, request_id: str, tokens: npt.NDArray[np.int32], params: RequestParams) -> None:
        """A request enters with its prompt, or with a new text under a known id. Cheap: indexing goes in slices."""
        self.finish(request_id)
        key = self._new_key()
        request = _Request(key, params, len(tokens), self._new_trie(key, len(tokens), params))
        self._requests[request_id] = request
        if params.use_drafts:
            for retriever in self._retrievers:
                retriever.start(key, tokens, params.tenant)
            self._admit_to_worker(request, tokens)

    def finish(self, request_id: str) -> None:
        """A request leaves, finished or aborted. Unknown ids are ignored: vLLM reports those that never ran, too."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.params.use_drafts:
            for retriever in self._retrievers:
                retriever.stop(request.key, keep=True)
            self._dismiss(request, keep=True)
        del self._requests[request_id]

    def forget_history(self) -> None:
        """The target's weights changed: nothing that it said before is offered again, by either side."""
        for retriever in self._retrievers:
            retriever.forget()
        for request in self._requests.values():
            request.trie.ungraft()  # what was found for the chains to come
        if Forget() not in self._to_say:  # some load weights one by one
            self._to_say.append(Forget())
        self.reset_prefix_cache()

    def forget_step_cost(self) -> None:
        """What steps have cost so far tells nothing of those to come."""
        self.step_cost = StepCost()

    def reset_prefix_cache(self) -> None:
        """What the draft has read so far is not found by requests that are admitted to it from now on."""
        self._epoch += 1

    def reset(self) -> dict[str, RequestParams]:
        """Drop the state of all live requests on both sides, sound or not; returns what they are. History stays."""
        requests, handles = self._requests, self._by_handle
        self._requests, self._by_handle = {}, {}
        for request in requests.values():
            for retriever in self._retrievers:
                with suppress(Exception):  # it may have failed in the middle of anything
                    retriever.stop(request.key, keep=False)
        self._to_say.extend(Release(handle, keep=False) for handle in handles)
        with suppress(Exception):
            self._say()
        return {request_id: request.params for request_id, request in requests.items()}

    # ---- the round --------------------------------------------------------------------------------------------

    def propose(self, rows: Sequence[Row], nap: Callable[[], None] = _no_nap) -> list[list[int]]:
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

    def round(self, rows: Sequence[Row]) -> Generator[None, None, list[list[int]]]:
        """As `propose`; whenever it yields it is to be resumed a fraction of a draft step later."""
        started = self._clock()
        self._admit_budget = _ADMIT_TOKENS_PER_ROUND
        self._count_absence()
        self._drain()
        self._say()
        live = [_Live(index, rows[index], request) for index, request in self._commit_all(rows)]
        for one in live:
            one.path = self._graft(one.request, one.row.tokens)
        missed = [one for one in live if not one.path]
        for one in missed:
            one.request.missed = True
        awaited = self._awaited(missed, len(live))
        self._choose(set(live).difference(awaited), live)
        waited = yield from self._wait(awaited, live)
        chains: list[list[int]] = [[] for _ in rows]
        for one in live:
            chains[one.index] = [step.token for step in one.request.chain]
        for retriever in self._retrievers:
            retriever.work(_INDEX_TOKENS_PER_ROUND)
        self.counters.proposed(self._clock() - started - waited, [one.request.chain for one in live])
        return chains

    def _commit_all(self, rows: Sequence[Row]) -> list[tuple[int, _Request]]:
        """Take in what was sampled; returns the rows that want drafts."""
        live: list[tuple[int, _Request]] = []
        for index, row in enumerate(rows):
            request = self._requests.get(row.request_id)
            if request is None or row.num_sampled == 0:
                continue
            self._commit(request, row)
            if request.params.use_drafts and not request.finished:
                live.append((index, request))
        return live

    def _choose(self, chosen: set[_Live], live: Sequence[_Live]) -> None:
        """Cut the paths of ``chosen``, as long as they pay beside those of all, and tell the worker."""
        lengths = chain_lengths([[step.reach for step in one.path] for one in live], *self.step_cost.estimate())
        for one, length in zip(live, lengths, strict=True):
            if one in chosen:
                one.request.chain = one.path[:length]
                self._tell(one.request, one.row.tokens)

    # ---- waiting ----------------------------------------------------------------------------------------------

    def _awaited(self, missed: Sequence[_Live], num_rows: int) -> list[_Live]:
        """The rows with nothing to verify for whose first draft tokens the target waits: all that may get some, or none."""
        if not missed or self._end is None or not self._may_wait or not self._is_prompt(self._end):
            return []
        awaited = [one for one in missed if self._may_draft(one.request)]
        acceptances = [self.wait_rule.acceptance(one.request.params.temperatures) for one in awaited]
        if self.wait_rule.pays_to_begin(acceptances, self._rates(num_rows)):
            return awaited
        self.wait_rule.observe_no_wait()
        return []

    def _may_draft(self, request: _Request) -> bool:
        """Whether the worker has the request, and is to draft for it."""
        longest = min(self._num_tokens, request.params.max_length - request.length - 1)
        return longest > 0 and self._is_known(request) and request.was_heard and not request.use.is_resting

    def _wait(self, awaited: Sequence[_Live], live: Sequence[_Live]) -> Generator[None, None, float]:
        """Wait for the first draft tokens of these rows, while that pays; returns the seconds."""
        if not awaited or self._end is None:
            return 0.0
        rule, end, rates = self.wait_rule, self._end, self._rates(len(live))
        for one in awaited:
            one.request.waited = True
            self._tell(one.request, one.row.tokens, waits=True)
        began = seen = came = self._clock()
        beat, num_known = end.heartbeat, 0
        while True:
            yield
            self._drain()
            now = self._clock()
            if end.heartbeat != beat:
                beat, seen = end.heartbeat, now
            for one in awaited:
                one.path = one.request.trie.best_path(self._num_tokens)
            num_before, num_known = num_known, sum(len(one.path) for one in awaited)
            if num_known > num_before:
                if num_before:
                    rule.observe_next(now - came)
                else:
                    rule.observe_first(now - began)
                came = now
                reaches = [
                    (one.path[-1].reach if one.path else 1.0) * rule.acceptance(one.request.params.temperatures)
                    for one in awaited
                ]
                if not rule.pays_to_go_on(reaches, rates):
                    break
            if now - seen > rule.silence_s or now - came > rule.first_s + rule.silence_s:
                self._late_beat = beat
                break
        for one in awaited:
            one.path = self._graft(one.request, one.row.tokens)
        self._choose(set(awaited), live)
        self.counters.waited(now - began, num_known > 0)
        return now - began

    def _is_prompt(self, end: TargetEnd) -> bool:
        """Whether the worker can be expected to answer at once: it is not late, and reads nobody's prompt."""
        if end.heartbeat == self._late_beat:
            return False
        self.wait_rule.step_s = self.counters.worker.get("step_seconds", 0.0)
        return all(request.was_heard for request in self._by_handle.values() if not request.use.is_resting)

    def _rates(self, num_rows: int) -> Rates:
        """What the batch decodes, by what its forwards take and have given lately."""
        fixed, per_token = self.step_cost.estimate()
        seconds = fixed + per_token * num_rows * (1.0 + self._chain_length)
        return Rates(self._tokens_per_row * num_rows / seconds, per_token)

    def rest(self) -> None:
        """A round without drafts: hear the worker out, and tell it what there was no room for."""
        self._count_absence()
        self._drain()
        self._say()

    def _count_absence(self) -> None:
        self.counters.rounds_without_worker += self._end is not None and self._end.session == 0

    def _drain(self) -> None:
        """Take in what the worker has drafted since the last round."""
        if self._end is None:
            return
        for report in self._end.drain(_DRAIN_BYTES_PER_ROUND):
            if not isinstance(report, Nodes):
                self.counters.worker = report.values
                continue
            records = report.records
            best = slice(0, _CHILDREN_READ)
            for handle, prefix_hash, position, count, tokens, probs in zip(
                records["handle"].tolist(),
                records["prefix_hash"].tolist(),
                records["position"].tolist(),
                records["count"].tolist(),
                records["tokens"][:, best].tolist(),
                records["probs"][:, best].tolist(),
                strict=True,
            ):
                request = self._by_handle.get(handle)
                if request is not None:
                    request.was_heard = not request.use.is_resting
                if request is None or position < request.length:
                    self.counters.late_nodes += 1
                elif count >= _CHILDREN_READ:
                    request.trie.insert(prefix_hash, position, tokens, probs)
                elif count > 0:
                    request.trie.insert(prefix_hash, position, tokens[:count], probs[:count])

    def _commit(self, request: _Request, row: Row) -> None:
        """Walk the trie by what the target said; every listed child on the way is an example for the calibration."""
        known = len(row.tokens) - row.num_sampled
        if known != request.length:
            self._rewind(request, row.tokens[:known])
        new = [] if request.finished else row.tokens[known:].tolist()
        for place, token in enumerate(new):
            # Sampled tokens can run past the end of the text: only the scheduler trims them.
            if token in request.params.stop_token_ids or known + place + 1 >= request.params.max_length:
                del new[place + 1 :]
                request.finished = True
                break
        num_accepted = min(len(new), row.num_sampled - 1)
        self.counters.committed(len(new), num_accepted, row.verified, request.chain)
        self._tokens_per_row += _RATE_WEIGHT * (len(new) - self._tokens_per_row)
        self._chain_length += _RATE_WEIGHT * (len(row.verified) - self._chain_length)
        self._judge_draft(request, row.verified, len(new), num_accepted)
        request.chain = []
        request.length = known + row.num_sampled
        if not request.params.use_drafts:
            return
        for retriever in self._retrievers:
            retriever.extend(request.key, new)
        if request.finished:
            if new:
                self._tell_end(request, row.tokens[: known + len(new)])
            return
        trie, temperatures = request.trie, request.params.temperatures
        for place, token in enumerate(new, known):
            wrong = []
            if (first := trie.first_drafted()) is not None:
                self.counters.draft_first_examples += 1
                self.counters.draft_first_accepted += first == token
                self.wait_rule.observe_token(temperatures, request.missed and place == known, first == token)
            for source, raw, said in trie.examples():
                self.calibration.observe(source, raw, temperatures, said == token)
                self.counters.draft_listed_accepted += source == DRAFT and said == token
                if source != DRAFT and said != token:
                    wrong.append(said)
            if wrong or token in request.refused_tokens:
                request.refused_tokens.update(wrong)
                before = row.tokens[max(0, place - _PLACE_TOKENS) : place].tolist()
                _note_refusals(request.refused, before, wrong, token)
            trie.commit(token)
        self.counters.harvested(trie.has_hit)
        self.wait_rule.observe_forward(request.waited, len(row.verified), not request.missed, len(new), trie.has_hit)
        request.missed = request.waited = False

    def _judge_draft(self, request: _Request, verified: Sequence[int], num_new: int, num_accepted: int) -> None:
        """While it rests the worker is told nothing, and has soon no work left; then it is told all that it missed.

        It is judged by what was verified while it was there to draft.
        """
        if not request.use.is_resting and not (verified and request.was_heard and self._is_known(request)):
            return
        brought = sum(step.source == DRAFT for step in request.chain[:num_accepted])
        if request.use.observe(num_new, brought):
            self.counters.draft_rests += 1
            request.was_heard = False

    def _graft(self, request: _Request, tokens: npt.NDArray[np.int32]) -> list[PathToken]:
        """Retrieved continuations become edges of the same trie, behind the root and behind the best path so far.

        Returns the best path with them.
        """
        trie = request.trie
        limit = min(self._num_tokens, request.params.max_length - request.length - 1)
        if limit <= 0:
            return []
        recent = tokens[-_PLACE_TOKENS:].tolist() if request.refused else []
        for retriever in self._retrievers:
            found = retriever.lookup(request.key, (), limit)
            if found is not None:
                trie.graft(trie.root_hash, trie.position, self._edges_of(found, retriever.name, request, recent))
        path = trie.best_path(limit)
        if 0 < len(path) < limit and self._retrievers:
            self._extend_by_retrieval(request, path, limit, recent)
        stops = request.params.stop_token_ids
        for place, step in enumerate(path):
            if step.token in stops:
                return path[: place + 1]
        return path

    def _extend_by_retrieval(self, request: _Request, path: list[PathToken], limit: int, recent: list[int]) -> None:
        """Behind the end of a path, where the trie knows nothing, the best of what is retrieved is the way on."""
        tail = [step.token for step in path]
        best: list[Edge] = []
        most = 0.0
        for retriever in self._retrievers:
            found = retriever.lookup(request.key, tail, limit - len(tail))
            if found is not None:
                edges = self._edges_of(found, retriever.name, request, recent + tail, path[-1].reach)
                gain = sum(itertools.accumulate((edge.prob for edge in edges), operator.mul))
                if gain > most:
                    best, most = edges, gain
        if not best:
            return
        end_hash = request.trie.root_hash
        for token in tail:
            end_hash = mix(end_hash, token)
        request.trie.graft(end_hash, request.trie.position + len(tail), best)
        reach = path[-1].reach
        for edge in best:
            reach *= edge.prob
            path.append(PathToken(edge.token, edge.prob, edge.source, reach))

    def _edges_of(
        self, found: Continuation, source: str, request: _Request, recent: list[int], reach: float = 1.0
    ) -> list[Edge]:
        """Retrieved tokens with their calibrated chance, as far as they are worth a place in the trie.

        ``recent``: tokens that they come behind, if something was refused; ``reach``: of these.
        """
        edges: list[Edge] = []
        place_tokens = list(recent)
        curve = self.calibration.curve(source, request.params.temperatures)
        for token, raw in zip(found.tokens, found.beliefs, strict=True):
            prob = curve[int(raw * NUM_BUCKETS)]
            reach *= prob
            if reach < _MIN_REACH or token >= self._vocab_size:
                break
            if request.refused:
                place_tokens.append(token)
                if tuple(place_tokens[-_PLACE_TOKENS - 1 :]) in request.refused:
                    break
            edges.append(Edge(token, prob, source, raw))
        return edges

    # ---- the worker -------------------------------------------------------------------------------------------

    def _tell(self, request: _Request, tokens: npt.NDArray[np.int32], waits: bool = False) -> None:
        """Send what was committed and which chain is now being verified; admit the request where it is not known."""
        if self._end is None or not request.params.use_worker or request.use.is_resting:
            return
        if not self._is_known(request):
            self._dismiss(request)
            self._admit_to_worker(request, tokens)
        if request.session == 0:
            return
        chain = np.array([step.token for step in request.chain], dtype=np.int32)
        probs = np.array([step.prob for step in request.chain], dtype=np.float32)
        command = Commit(request.handle, request.told, tokens[request.told :], chain, probs, waits)
        if self._end.send(command):
            request.told = len(tokens)
        else:
            self._dismiss(request)  # it is admitted again, whole, when there is room

    def _is_known(self, request: _Request) -> bool:
        """Whether the worker that is up was told of the request."""
        return self._end is not None and request.session != 0 and request.session == self._end.session

    def _tell_end(self, request: _Request, tokens: npt.NDArray[np.int32]) -> None:
        """Send how the text ends, for the history of the draft's side, which goes without it where there is no room."""
        if self._end is not None and self._is_known(request):
            nothing = np.empty(0, dtype=np.int32)
            self._end.send(Commit(request.handle, request.told, tokens[request.told :], nothing, nothing.astype(np.float32)))

    def _admit_to_worker(self, request: _Request, tokens: npt.NDArray[np.int32]) -> None:
        """Admit under a fresh handle, so that records of an earlier admission cannot be mistaken; chunk by chunk."""
        end = self._end
        if end is None or not request.params.use_worker or self._admit_budget < 0:
            return
        session = end.session
        if session == 0:
            return
        self._admit_budget -= len(tokens)
        if request.handle:
            self.counters.resynchronisations += 1
        handle = request.handle = self._new_key()
        params = request.params
        chunk = _ADMIT_TOKENS_PER_COMMAND
        empty = np.empty(0, dtype=np.int32)
        self._by_handle[handle] = request  # from now on the worker may know it
        if not end.send(
            Admit(
                handle,
                len(tokens),
                tokens[:chunk],
                params.temperature,
                params.max_length,
                tuple(itertools.islice(params.stop_token_ids, _MAX_STOPS)),
                params.tenant or "",
                self._epoch,
                params.seed,
                params.top_k,
                params.top_p,
                params.min_p,
            )
        ):
            del self._by_handle[handle]
            return
        if end.session != session:  # another worker came meanwhile: which of the two was told?
            del self._by_handle[handle]
            self._to_say.append(Release(handle, keep=False))
            return
        request.session, request.told, request.was_heard = session, len(tokens), False
        for start in range(chunk, len(tokens), chunk):
            if not end.send(Commit(handle, start, tokens[start : start + chunk], empty, np.empty(0, dtype=np.float32))):
                self._dismiss(request)
                return
        request.trie = self._new_trie(handle, len(tokens), params)

    def _dismiss(self, request: _Request, keep: bool = False) -> None:
        """Have the worker forget the request, now or when there is room to say so."""
        if self._end is None:
            return
        if request.session != 0:
            self._by_handle.pop(request.handle, None)
            if request.session == self._end.session:
                self._to_say.append(Release(request.handle, keep))
            request.session = 0
        self._say()

    def _say(self) -> None:
        """Tell the worker what there was no room for."""
        while self._to_say and self._end is not None and self._end.send(self._to_say[0]):
            del self._to_say[0]

    def _rewind(self, request: _Request, tokens: npt.NDArray[np.int32]) -> None:
        """The text is not what was committed last (a KV transfer failed, say): begin again with what it is now."""
        self.counters.rewinds += 1
        request.length = len(tokens)
        request.finished = False
        request.chain = []
        if request.params.use_drafts:
            for retriever in self._retrievers:
                retriever.stop(request.key, keep=False)
                retriever.start(request.key, tokens, request.params.tenant)
            self._dismiss(request)
            request.trie = self._new_trie(request.key, len(tokens), request.params)

    def _new_trie(self, handle: int, length: int, params: RequestParams) -> SpeculationTrie:
        return SpeculationTrie(seed(handle), length, self.calibration.curve(DRAFT, params.temperatures))

    def _new_key(self) -> int:
        self._last_key += 1
        return self._last_key

    @property
    def num_requests(self) -> int:
        """Live requests."""
        return len(self._requests)

    def check_integrity(self) -> None:
        """Assert that tries stand where the texts end and that every handle leads to its request."""
        for request in self._requests.values():
            request.trie.check_integrity()
            assert request.finished or not request.params.use_drafts or request.trie.position == request.length
        for handle, request in self._by_handle.items():
            assert request.handle == handle and request.session != 0


def _note_refusals(refused: dict[tuple[int, ...], None], before: list[int], wrong: list[int], right: int) -> None:
    """Remember which retrieved tokens were wrong behind these, and that another may be offered again."""
    refused.pop((*before, right), None)
    for token in wrong:
        refused[(*before, token)] = None
    while len(refused) > _MAX_REFUSED:
        del refused[next(iter(refused))]
