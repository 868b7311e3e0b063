"""The frontier over all requests: which nodes the next draft forward takes, and what becomes of its answer.

Anytime best-first drafting: each iteration takes the most probable nodes that are not computed yet. If every node lists
one child this is PEARL (2408.11850); if the draft tokens that the target verifies get siblings, Saguaro's verification outcomes
(2603.03251).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_double.draft.arena import DRAW, Ints, make_arena, make_forward, with_slots
from vllm_double.draft.compiled import steps
from vllm_double.draft.engine.base import SAMPLING_DTYPE, Batch, DraftEngine
from vllm_double.draft.lookups import Lookups
from vllm_double.draft.noise_coupling import NoiseCoupling
from vllm_double.draft.page_pool import PagePool
from vllm_double.draft.prefix import Prefix
from vllm_double.retrieval.base import Source, index_figures
from vllm_double.retrieval.known_noise import know_noise
from vllm_double.transport.messages import NODE_DTYPE, Admit, Command, Commit, Forget, Release

__all__ = ["MIN_ASKED_PROB", "DraftRequest", "Frontier", "FrontierLimits"]

MIN_ASKED_PROB = 0.02
"""Sources are not asked what follows a path less probable than this: it takes longer than it brings."""
_MIN_BELIEF = 0.5  # a retrieved token that is less sure than this is left to the draft
_NO_TOKENS, _NO_PROBS = np.zeros(0, np.int32), np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class FrontierLimits:
    """Bounds of one draft iteration.

    num_speculative_tokens: no work deeper than this behind any outcome of the verification.
    nodes_per_iteration: nodes that one forward takes at most (every waiting request gets one in any case).
    children_per_node: alternatives of a computed node that may be drafted behind. 1 is PEARL's single path. The target is sent
        the first MAX_CHILDREN of them.
    prefill_tokens: committed tokens that one forward catches up on at most.
    min_path_prob: a path less probable than this is not worked on: on a CPU the draft takes memory bandwidth from the target.
    max_nodes: nodes of all requests. If there are more, the least probable are evicted.
    """

    num_speculative_tokens: int
    nodes_per_iteration: int = 8
    children_per_node: int = 64
    prefill_tokens: int = 256
    min_path_prob: float = 1e-3
    max_nodes: int = 1 << 15


class DraftRequest:
    """One admission; the rest of its state is in the arena. is_reading: the prefix cache may know more of its text."""

    __slots__ = ("handle", "is_reading", "num_committed", "num_foreseen", "prefix", "slot", "temperature", "tenant")

    def __init__(self, admission: Admit, slot: int, pool: PagePool, page_size: int) -> None:
        self.handle, self.slot = admission.handle, slot
        self.tenant = admission.tenant or None
        self.temperature = admission.temperature
        self.prefix = Prefix(pool, page_size, self.tenant, admission.epoch)
        self.is_reading = True
        self.num_committed = self.num_foreseen = 0  # since its admission


class Frontier:
    """All admitted requests, their trees and the pages of one draft engine."""

    def __init__(
        self, engine: DraftEngine, limits: FrontierLimits, retrievers: Sequence[Source] = (), prefix_caching: bool = True
    ) -> None:
        if limits.children_per_node < 1:
            raise ValueError(f"children_per_node is {limits.children_per_node}, not at least 1")
        self._limits = limits
        self._page_size = engine.page_size
        self._num_children = min(limits.children_per_node, engine.vocab_size)
        self._pool = PagePool(engine.num_pages, prefix_caching)
        # Page 0 is nobody's, and the last text's continuation needs one.
        self.max_length = min(engine.max_length, (engine.num_pages - 2) * engine.page_size)
        """Texts of so many tokens, or more, are not drafted for."""
        self.dropped: set[int] = set()
        """Handles that the target uses, and that are not known: to be reported, and removed by the caller."""
        self._arena = make_arena(
            self._pool.pages, self._pool.totals, limits.max_nodes, self._num_children, engine.page_size, self.max_length,
            engine.vocab_size, limits.num_speculative_tokens,
        )  # fmt: skip
        self._free_slots: list[int] = []
        self._sampling, self._draws = np.zeros(0, SAMPLING_DTYPE), np.zeros(0, DRAW)  # by slot
        self._requests: dict[int, DraftRequest] = {}
        self._by_slot: dict[int, DraftRequest] = {}
        self._steps = steps()
        self._lookups = Lookups(retrievers)
        self._coupling, self._has_learnt = NoiseCoupling(), False
        self._make_room(num_slots=1)
        self._counters = dict.fromkeys(
            (
                "late_commands",
                "committed_tokens",
                "foreseen_tokens",
                "prefix_cache_queries",  # tokens at admission
                "prefix_cache_hits",  # those of them that were in the prefix cache
                "requests_evicted",
            ),
            0,
        )

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def counters(self) -> dict[str, int]:
        """By the names of `WorkerStats`."""
        totals = {name: int(self._pool.totals[name][0]) for name in ("retrieved_tokens", "confirmed_tokens", "nodes_evicted")}
        return self._counters | totals | index_figures(self._lookups.sources)

    # ---- commands ---------------------------------------------------------------------------------------------

    def apply(self, command: Command) -> None:
        """Follow the target. A command for an unknown request comes late (its release was quicker) and is counted."""
        if isinstance(command, Forget):
            self._lookups.forget()
            return
        request = self._requests.get(command.handle)
        if isinstance(command, Commit) and request is not None:
            self._commit(request, command.keep, command.tokens, command.chain, command.chain_probs, command.waits)
        elif isinstance(command, Release) and request is not None:
            self._release(request, command.keep)
        elif isinstance(command, Admit) and request is None:
            self._admit(command)
        else:
            self._counters["late_commands"] += 1
            if isinstance(command, Commit):
                self.dropped.add(command.handle)

    def _admit(self, command: Admit) -> None:
        self._counters["prefix_cache_queries"] += command.base
        if 2 * len(self._requests) >= self._limits.max_nodes:
            self._counters["requests_evicted"] += 1
            self.dropped.add(command.handle)
            return
        self._make_room(1, max(command.base, command.max_length), len(command.stop_token_ids))
        arena, slot = self._arena, self._free_slots.pop()
        entry = arena.requests[slot]
        entry["handle"], entry["num_admitted"], entry["max_length"] = command.handle, command.base, command.max_length
        entry["num_stops"], entry["is_sampled"] = len(command.stop_token_ids), command.temperature > 0
        arena.stops[slot, : len(command.stop_token_ids)] = command.stop_token_ids
        self._sampling[slot] = command.seed, command.temperature, 0.0, command.top_k, command.top_p, command.min_p
        self._draws["seed"][slot] = command.seed
        self._weigh_noise(slot, command.temperature)
        self._steps.admit(arena, slot)
        request = DraftRequest(command, slot, self._pool, self._page_size)
        self._requests[command.handle] = self._by_slot[slot] = request
        self._commit(request, 0, command.tokens, _NO_TOKENS, _NO_PROBS, False)

    def _make_room(self, num_slots: int = 0, text: int = 0, stops: int = 0) -> None:
        """For so many slots more, and a text of so many tokens."""
        before, width = self._arena.texts.shape
        if num_slots <= len(self._free_slots) and text <= width and stops <= self._arena.stops.shape[1]:
            return
        num_slots = before if num_slots <= len(self._free_slots) else max(2 * before, 8)
        self._arena = with_slots(self._arena, num_slots, text if text <= width else max(text, 2 * width), stops)
        self._sampling = np.concatenate([self._sampling, np.zeros(num_slots - before, SAMPLING_DTYPE)])
        self._draws = np.concatenate([self._draws, np.zeros(num_slots - before, DRAW)])
        self._free_slots += range(num_slots - 1, before - 1, -1)
        self._forward = make_forward(self._arena, self._limits.nodes_per_iteration, self._limits.prefill_tokens)

    def _commit(
        self, request: DraftRequest, keep: int, tokens: Ints, chain: Ints, chain_probs: npt.NDArray[np.float32], waits: bool
    ) -> None:
        """If nothing can be drafted for the text any more, the request is forgotten."""
        slot, entry = request.slot, self._arena.requests[request.slot]
        length, was_whole = int(entry["length"]), bool(entry["root"] >= 0)
        if keep < length:
            request.prefix.rewind(keep)
        if keep <= length and keep + len(tokens) > self._arena.texts.shape[1]:
            self._make_room(text=keep + len(tokens))
        if self._pool.totals["num_free_nodes"][0] <= len(chain):
            self._steps.evict(self._arena, 1.0, 0, len(chain) + 1)
        arrays = np.ascontiguousarray(tokens, np.int32), np.ascontiguousarray(chain, np.int32)
        num_foreseen = self._steps.commit(
            self._arena, self._forward, slot, keep, int(waits), *arrays, np.ascontiguousarray(chain_probs, np.float32)
        )
        if num_foreseen < 0:
            self._counters["late_commands"] += 1
            self._drop(request)
            return
        if was_whole:
            request.num_committed += len(tokens)
            request.num_foreseen += num_foreseen
        self._counters["foreseen_tokens"] += num_foreseen
        self._counters["committed_tokens"] += len(tokens)
        if self._forward.progress["num_lessons"][0]:
            self._learn(request)
        if not len(self._lookups) or self._arena.requests["root"][slot] < 0:
            return  # the text at admission is still arriving
        if was_whole and keep == length:
            self._lookups.extend(slot, tokens)
            return
        if was_whole:
            self._lookups.stop(slot, keep=False)
        self._lookups.start(slot, self._arena.texts[slot, : keep + len(tokens)].copy(), request.tenant)

    def _learn(self, request: DraftRequest) -> None:
        """From what was drawn behind the lists on the committed path."""
        for node, num_listed, drawn in self._forward.lessons[: self._forward.progress["num_lessons"][0]].tolist():
            listed = self._arena.listed[node, :num_listed]
            self._coupling.learn(request.temperature, listed["token"], listed["log_q"], listed["noise"], drawn)
        self._has_learnt = True

    def _weigh_noise(self, slot: int, temperature: float) -> None:
        """As has been learnt."""
        self._sampling["noise_scale"][slot] = self._coupling.noise_scale(temperature)
        self._draws[["log_q_weight", "noise_weight", "coverage"]][slot] = self._coupling.weights(temperature)

    def _release(self, request: DraftRequest, keep: bool = False) -> None:
        """``keep``: whether the sources may offer its text to later requests."""
        self._lookups.stop(request.slot, keep)
        self._steps.release(self._arena, request.slot)
        del self._requests[request.handle], self._by_slot[request.slot]
        self._free_slots.append(request.slot)

    def _drop(self, request: DraftRequest) -> None:
        self.dropped.add(request.handle)
        self._release(request)

    # ---- one iteration ----------------------------------------------------------------------------------------

    def select(self) -> Batch:
        """The most useful work for one forward; no rows if there is none. Copy `tail_copies` before it."""
        limits, steps = self._limits, self._steps
        if self._has_learnt:
            self._has_learnt = False
            for request in self._requests.values():
                self._weigh_noise(request.slot, request.temperature)
        if self._pool.totals["is_short"][0]:
            self._evict_requests()
        for request in self._requests.values():
            if request.is_reading:
                self._match_prefix(request)
        if self._pool.totals["num_free_nodes"][0] < 2 * len(self._forward.picks):
            self._evict_nodes()
        arena, forward = self._arena, self._forward
        steps.begin(arena, forward, limits.prefill_tokens)
        while steps.read_texts(arena, forward):
            if not steps.evict(arena, 1.0, int(forward.progress["lacking"][0]), 0):
                break
        min_asked = math.log(MIN_ASKED_PROB) if len(self._lookups) else 0.0
        if num_queries := steps.pick(arena, forward, limits.nodes_per_iteration, math.log(limits.min_path_prob), min_asked):
            answers = self._lookups.ask(forward, num_queries)
            slots, tail_lengths = forward.queries.keys[:num_queries], forward.queries.tail_lengths[:num_queries]
            is_sampled, lengths = arena.requests["is_sampled"][slots], arena.requests["length"][slots]
            know_noise(answers, is_sampled, self._sampling["seed"][slots], lengths + tail_lengths - 1)
            for found in answers:
                steps.note_found(arena, forward, found, _MIN_BELIEF)
        while steps.place(arena, forward):
            (progress,) = forward.progress
            progress["is_full"] = not steps.evict(arena, float(progress["bound"]), int(progress["lacking"]), 0)
        self._lookups.work()
        return self._batch()

    def _batch(self) -> Batch:
        forward, (progress,) = self._forward, self._forward.progress
        num_runs, num_tokens = int(progress["num_runs"]), int(progress["num_tokens"])
        starts, num_outputs, query_start = forward.layout
        return Batch(
            forward.token_ids[:num_tokens], query_start[: num_runs + 1], starts[:num_runs], num_outputs[:num_runs],
            self._sampling[forward.runs["slot"][:num_runs]], forward.tables[:num_runs],
        )  # fmt: skip

    @property
    def tail_copies(self) -> list[tuple[int, int, int]]:
        """(source page, destination page, used slots) of the tail pages that the latest batch's branches leave others with."""
        return self._forward.copies[: self._forward.progress["num_copies"][0]].tolist()  # type: ignore[no-any-return]

    def _match_prefix(self, request: DraftRequest) -> None:
        """Take from the prefix cache what it knows of a text that is yet to be read."""
        entry, size = self._arena.requests[request.slot], self._page_size
        if not entry["num_cached"] < entry["length"] < min(entry["max_length"], self._arena.limits["max_length"][0]):
            return
        if pages := request.prefix.known_pages(self._arena, request.slot):
            before = int(entry["num_cached"])
            self._steps.adopt(self._arena, request.slot, np.array(pages, np.int32))
            self._counters["prefix_cache_hits"] += int(entry["num_cached"]) - before
        request.is_reading = bool((entry["num_admitted"] - 1) // size > entry["num_cached"] // size)

    def expand(self, tokens: npt.NDArray[np.int32], probs: npt.NDArray[np.float32]) -> npt.NDArray[np.void]:
        """Grow the trees by the latest batch's answer, int32 and float32 [outputs, children]; returns NODE_DTYPE records."""
        records = np.zeros(len(tokens), dtype=NODE_DTYPE)
        tokens, probs = np.ascontiguousarray(tokens, np.int32), np.ascontiguousarray(probs, np.float32)
        num_filled = self._steps.expand(self._arena, self._forward, tokens, probs, self._draws, records)
        for slot in self._forward.filled[:num_filled].tolist():
            self._by_slot[slot].prefix.insert(self._arena, slot)
        return records

    # ---- when room runs out -----------------------------------------------------------------------------------

    def _evict_nodes(self) -> None:
        """Nodes run out: give up those that are less probable than the best that could be picked."""
        live = self._arena.requests[self._arena.requests["is_live"]]
        best = float(live["score"].max(initial=-math.inf))
        self._steps.evict(self._arena, best, 0, 2 * len(self._forward.picks))

    def _evict_requests(self) -> None:
        """Pages ran out for texts: give up the least useful texts, if there cannot be room for all, and then continuations."""
        self._drop_least_useful(self._num_obtainable)
        needed = sum(map(self._num_lacking, self._requests.values()))
        self._steps.evict(self._arena, 1.0, needed + len(self._requests), 0)
        self._drop_least_useful(lambda: self._pool.num_free)

    def _drop_least_useful(self, num_available: Callable[[], int]) -> None:
        """Until so many pages are enough for all texts: the requests that foresaw the fewest of their tokens, for each page."""
        needed = sum(map(self._num_lacking, self._requests.values()))
        while needed > num_available():
            request = min(reversed(list(self._requests.values())), key=self._use_of_a_page)
            needed -= self._num_lacking(request)
            self._counters["requests_evicted"] += 1
            self._drop(request)

    def _use_of_a_page(self, request: DraftRequest) -> float:
        num_pages = self._num_held(request) + self._num_lacking(request)
        share = (request.num_foreseen + 1) / (request.num_committed + 2)
        return share / num_pages if num_pages else math.inf  # to drop it would give none

    def _num_obtainable(self) -> int:
        """Pages that no text needs."""
        arena = self._arena
        held = [arena.trunks[one.slot, : self._num_held(one)] for one in self._requests.values()]
        return len(arena.pages) - 1 - len(np.unique(np.concatenate(held))) if held else len(arena.pages) - 1

    def _num_held(self, request: DraftRequest) -> int:
        """Pages with the cached text."""
        return -(-int(self._arena.requests["num_cached"][request.slot]) // self._page_size)

    def _num_lacking(self, request: DraftRequest) -> int:
        """Pages that the request's text and one token more need beyond those that it has."""
        entry = self._arena.requests[request.slot]
        length = int(entry["length"])
        is_read = length < min(int(entry["max_length"]), self.max_length) and not entry["has_ended"]
        return max(0, -(-(length + 1) // self._page_size) - self._num_held(request)) if is_read else 0
