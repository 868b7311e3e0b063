"""The frontier over all requests: which nodes the next draft forward takes, and what becomes of its answer.

Anytime best-first drafting: each iteration takes the most probable nodes that are not computed yet. Where every node lists
one child this is PEARL (2408.11850); where the chain's nodes get siblings, Saguaro's verification outcomes (2603.03251).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from vllm_double.draft import _tree_steps as at
from vllm_double.draft.engine.base import SAMPLING_DTYPE, Batch, DraftEngine
from vllm_double.draft.noise_coupling import Listing, NoiseCoupling
from vllm_double.draft.page_pool import PagePool
from vllm_double.draft.request_tree import MAX_AHEAD, DraftRequest
from vllm_double.retrieval.base import Source
from vllm_double.transport.messages import MAX_CHILDREN, NODE_DTYPE, Admit, Commit, Forget, Release

__all__ = ["MIN_ASKED_PROB", "Frontier", "FrontierLimits"]

_INDEX_TOKENS_PER_ITERATION = 1024
MIN_ASKED_PROB = 0.02
"""Sources are not asked what follows a path less probable than this: it takes longer than it brings."""
_MIN_BELIEF = 0.5  # a retrieved token that is less sure than this is left to the draft


@dataclass(frozen=True, slots=True)
class FrontierLimits:
    """Bounds of one draft iteration.

    num_speculative_tokens: no work deeper than this behind any outcome of the verification.
    nodes_per_iteration: nodes that one forward takes at most (every waiting request gets one in any case).
    children_per_node: alternatives of a computed node that may be drafted behind. 1 is PEARL's single path. The target is told
        the first MAX_CHILDREN of them.
    prefill_tokens: committed tokens that one forward catches up on at most.
    min_path_prob: a path less probable than this is not worked on: on a CPU the draft takes memory bandwidth from the target.
    """

    num_speculative_tokens: int
    nodes_per_iteration: int = 8
    children_per_node: int = 64
    prefill_tokens: int = 256
    min_path_prob: float = 1e-3


class Frontier:
    """All admitted requests, their trees and the pages of one draft engine."""

    def __init__(
        self, engine: DraftEngine, limits: FrontierLimits, retrievers: Sequence[Source] = (), prefix_caching: bool = True
    ) -> None:
        if limits.children_per_node < 1:
            raise ValueError(f"children_per_node is {limits.children_per_node}, not at least 1")
        self._limits = limits
        self._max_length = engine.max_length
        self._vocab_size = engine.vocab_size
        self._page_size = engine.page_size
        self._num_children = min(limits.children_per_node, engine.vocab_size)
        self._pool = PagePool(engine.num_pages, prefix_caching)
        self._retrievers = list(retrievers)
        self._requests: dict[int, DraftRequest] = {}
        self._steps = at.steps()
        self._work = _Work(limits, engine.max_length, -(-engine.max_length // engine.page_size))
        self._starved = False
        self._coupling = NoiseCoupling()
        self.num_late_commands = 0
        self.num_committed = 0
        self.num_foreseen = 0
        self.num_prefix_queries = 0  # tokens at admission
        self.num_prefix_hits = 0  # those of them that were in the prefix cache

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_retrieved(self) -> int:
        """Retrieved tokens that the draft has read."""
        return int(self._work.header[at.NUM_RETRIEVED])

    @property
    def num_confirmed(self) -> int:
        """Those of them that it would have said itself."""
        return int(self._work.header[at.NUM_CONFIRMED])

    # ---- commands ---------------------------------------------------------------------------------------------

    def apply(self, command: Admit | Commit | Release | Forget) -> None:
        """Follow the target. A command for an unknown request comes late (its release was quicker) and is counted."""
        if isinstance(command, Forget):
            for retriever in self._retrievers:
                retriever.forget()
            return
        request = self._requests.get(command.handle)
        if isinstance(command, Admit):
            if request is not None:
                self.num_late_commands += 1
                return
            request = DraftRequest(
                command, self._pool, self._page_size, self._num_children, self._limits.num_speculative_tokens, self._max_length
            )
            self._requests[command.handle] = request
            self._work.serve(list(self._requests.values()))
            self.num_prefix_queries += command.base
            self._commit(request, 0, command.tokens)
        elif request is None:
            self.num_late_commands += 1
        elif isinstance(command, Release):
            self._forget(request, keep=command.keep)
        elif self._commit(request, command.keep, command.tokens) and not self._is_foreign(command.chain):
            longest = self._limits.num_speculative_tokens
            request.follow(command.chain[:longest], np.log(np.clip(command.chain_probs[:longest], 1e-9, 1.0)))
            request.is_awaited = command.waits

    def _commit(self, request: DraftRequest, keep: int, tokens: npt.NDArray[np.int32]) -> bool:
        """False where nothing can be drafted for the text any more, and the request is forgotten."""
        try:
            if self._is_foreign(tokens):
                raise ValueError("a token that the draft model does not know")
            was_whole, is_rewind = request.is_whole, keep < request.length
            new = tokens.tolist()
            self.num_foreseen += request.commit(keep, new)
        except ValueError:  # or something of the text was lost on the way
            self.num_late_commands += 1
            self._forget(request)
            return False
        self.num_committed += len(new)
        for listing, token in request.drawn(len(new)):
            self._coupling.learn(request.temperature, listing, token)
        if not request.is_whole:
            return True  # the text at admission is still arriving
        for retriever in self._retrievers:
            if was_whole and not is_rewind:
                retriever.extend(request.handle, new)
                continue
            if was_whole:
                retriever.stop(request.handle, keep=False)
            retriever.start(request.handle, request.tokens.copy(), request.tenant)
        return True

    def _is_foreign(self, tokens: npt.NDArray[np.int32]) -> bool:
        """Whether a token lies beyond the draft's vocabulary, which may be smaller than the target's."""
        return len(tokens) > 0 and int(tokens.max()) >= self._vocab_size

    # ---- one iteration ----------------------------------------------------------------------------------------

    def select(self) -> Batch:
        """The most useful work for one forward; no rows where there is none. Copy `tail_copies` before it."""
        if self._starved:
            self._reclaim()
        work, pool = self._work, self._pool.address
        # A target that waits gets its next token soonest from a forward of few nodes.
        num_awaited = sum(request.is_awaited for request in work.requests)
        budget = self._limits.nodes_per_iteration
        work.begin(min(num_awaited or budget, budget), bool(self._retrievers))
        self._catch_up()
        while (outcome := self._steps.select(work.address, pool)) != at.DONE:
            if outcome == at.STARVED:
                self._starved = True
                break
            asked = work.requests[work.header[at.ASKED_TREE]]
            if outcome == at.ASKS:
                self._retrieve(asked, int(work.header[at.ASKED_NODE]), int(work.header[at.ASKED_ROOM]))
            else:
                asked.reserve(2 * (self._limits.nodes_per_iteration + 1))
        for retriever in self._retrievers:
            retriever.work(_INDEX_TOKENS_PER_ITERATION)
        return work.batch(self._coupling)

    @property
    def tail_copies(self) -> list[tuple[int, int, int]]:
        """(source page, destination page, used slots) of the tail pages that the latest batch's branches leave others with."""
        return self._work.copies()

    def _catch_up(self) -> None:
        """Committed tokens that the draft has not read: short gaps first, so that a long prompt silences nobody."""
        work = self._work
        num_waiting = self._steps.waiting(work.address, work.scratch_at)
        if not num_waiting:
            return
        waiting = [(index, work.requests[index]) for index in work.scratch[:num_waiting].tolist()]
        for _, request in waiting:
            self.num_prefix_hits += request.match_prefix()
        waiting.sort(key=lambda entry: entry[1].length - entry[1].num_cached)
        budget = self._limits.prefill_tokens
        for index, request in waiting:
            if budget <= 0:
                break
            num_tokens = min(request.length - request.num_cached, budget)
            reads_root = request.is_whole and request.num_cached + num_tokens == request.length
            request.reserve(1)
            if not self._steps.read(work.address, self._pool.address, index, num_tokens, reads_root):
                self._starved = True
                break
            budget -= num_tokens
            if reads_root and self._retrievers:
                if self._steps.ask(work.address, index, 0):
                    self._retrieve(request, 0, int(work.header[at.ASKED_ROOM]))
                self._steps.look_ahead(request.address, 0)

    def _retrieve(self, request: DraftRequest, node: int, room: int) -> None:
        """A Retrieval Forward (Double, 2601.05524): what is retrieved behind a node is read in the same forward as the node.

        Where the draft then says otherwise, its word counts.
        """
        work = self._work
        num_tail = self._steps.path_to(request.address, node, work.scratch_at)
        tail = work.scratch[:num_tail].tolist()
        best: list[tuple[int, float]] = []
        for retriever in self._retrievers:
            found = retriever.lookup(request.handle, tail, room)
            if found is not None:
                pairs = zip(found.tokens, found.beliefs, strict=True)
                sure = takewhile(lambda pair: pair[1] >= _MIN_BELIEF and pair[0] < self._vocab_size, pairs)
                best = max(best, list(sure), key=len)
        if best:
            work.scratch[: len(best)] = [token for token, _ in best]
            work.beliefs[: len(best)] = [math.log(belief) for _, belief in best]
            self._steps.retrieved(request.address, node, len(best), work.scratch_at, work.beliefs_at)

    def expand(self, tokens: npt.NDArray[np.int32], probs: npt.NDArray[np.float32]) -> npt.NDArray[np.void]:
        """Grow the trees by the latest batch's answer, int32 and float32 [outputs, children]; returns NODE_DTYPE records."""
        work = self._work
        for index in set(work.runs[: work.header[at.NUM_RUNS], at.TREE].tolist()):
            work.requests[index].insert_prefix()
        records = np.zeros(len(tokens), dtype=NODE_DTYPE)
        if not len(tokens):
            return records
        tokens = np.ascontiguousarray(tokens, np.int32)
        probs = np.fmax(probs, np.float32(0.0), dtype=np.float32)  # a draft that overflows, and so says NaN, says nothing
        listings = self._couple(tokens, probs) if work.latest.is_sampled else []
        log_probs = np.log(np.maximum(probs, np.float32(1e-9)))
        num_listed = tokens.shape[1]
        tokens_at, probs_at, log_probs_at, records_at = (a.ctypes.data for a in (tokens, probs, log_probs, records))
        num_told = min(num_listed, MAX_CHILDREN)
        self._steps.expand(work.address, num_listed, tokens_at, probs_at, log_probs_at, records_at, num_told)
        for output, listing in listings:
            length, prefix_hash = int(records["position"][output]), int(records["prefix_hash"][output])
            work.request_of(output).note_listing(length, prefix_hash, listing)
        return records

    def _couple(self, tokens: npt.NDArray[np.int32], probs: npt.NDArray[np.float32]) -> list[tuple[int, Listing]]:
        """Turn probabilities of sampled requests into chances to be drawn, in place; returns what is to be noted of whom."""
        from double_kernels import quick_gumbel_noise  # imports torch, which a plan for greedy requests does not need

        batch = self._work.latest
        sampling = batch.output_sampling
        outputs = np.flatnonzero(sampling["noise_scale"] > 0)
        sampling, listed = sampling[outputs], tokens[outputs]
        noise = quick_gumbel_noise(sampling["seed"], batch.output_positions[outputs], listed)
        with np.errstate(divide="ignore"):
            log_probs = np.log(probs[outputs])
        probs[outputs] = self._coupling.chances(sampling["temperature"], log_probs, noise)
        return [(output, Listing(*one)) for output, *one in zip(outputs.tolist(), listed, log_probs, noise, strict=True)]

    # ---- pages ------------------------------------------------------------------------------------------------

    def _reclaim(self) -> None:
        """Pages ran out: give up all continuations; if that is not enough, the texts that were admitted last."""
        self._starved = False
        for request in self._requests.values():
            request.drop_tree()
        needed = sum(map(self._num_lacking, self._requests.values()))
        for request in reversed(list(self._requests.values())):
            if needed <= self._pool.num_free:
                break
            needed -= self._num_lacking(request)
            self._forget(request)

    def _num_lacking(self, request: DraftRequest) -> int:
        """Pages that the request's text and one token more need beyond those that it has."""
        return -(-(min(request.length, self._max_length) + 1) // self._page_size) - request.num_trunk_pages

    def _forget(self, request: DraftRequest, keep: bool = False) -> None:
        """``keep``: whether the sources may offer its text to later requests."""
        if request.is_whole:  # the sources know a text once all of it at admission is here
            for retriever in self._retrievers:
                retriever.stop(request.handle, keep)
        request.release()
        del self._requests[request.handle]
        self._work.serve(list(self._requests.values()))

    def check_integrity(self) -> None:
        """Assert that no page is lost or wrongly shared and that every tree is sound."""
        tables: list[Sequence[int]] = []
        for request in self._requests.values():
            request.check_integrity()
            tables.extend(request.held_pages())
        self._pool.check_integrity(tables)


class _Work:
    """What compiled steps choose for one forward: arrays that grow with the number of requests, and are used again.

    ``address`` is that of the header. scratch: int32, for paths and other short lists; beliefs: float32 [MAX_AHEAD].
    """

    def __init__(self, limits: FrontierLimits, max_length: int, max_pages: int) -> None:
        self._limits = limits
        self._max_pages = max_pages
        self._minimum = np.log([limits.min_path_prob, MIN_ASKED_PROB])
        self.header = np.zeros(at.ITERATION_LENGTH, np.int64)
        self.address = self.header.ctypes.data
        self.header[[at.NUM_SPECULATIVE, at.MAX_MODEL_LENGTH]] = limits.num_speculative_tokens, max_length
        self.header[at.MINIMUM_AT] = self._minimum.ctypes.data
        self.beliefs = np.zeros(MAX_AHEAD, np.float32)
        self.beliefs_at = self.beliefs.ctypes.data
        self.requests: list[DraftRequest] = []
        self.latest = Batch.of([])
        self.runs = np.zeros((0, 6), np.int32)
        self.serve([])

    def serve(self, requests: list[DraftRequest]) -> None:
        """From now on these are all requests."""
        self.requests = requests
        self._trees = np.array([request.address for request in requests], np.int64)
        self._sampling = np.array([request.sampling for request in requests], SAMPLING_DTYPE)
        self.header[[at.NUM_TREES, at.TREES_AT]] = len(requests), self._trees.ctypes.data
        # Each request is caught up with, and has one node beside the budget.
        needed = 2 * len(requests) + self._limits.nodes_per_iteration
        if needed > len(self.runs):
            self._allocate(2 * needed)

    def _allocate(self, num_runs: int) -> None:
        self._queue_keys, self._queue = np.zeros(num_runs), np.zeros((num_runs, 3), np.int32)
        self.runs = np.zeros((num_runs, 6), np.int32)
        self._copies, self._outputs = np.zeros((num_runs, 3), np.int32), np.zeros((num_runs, 2), np.int32)
        self._pages = np.zeros((num_runs, self._max_pages), np.int32)
        self.scratch = np.zeros(max(num_runs, 4 * self._limits.num_speculative_tokens, MAX_AHEAD) + 1, np.int32)
        self.scratch_at = self.scratch.ctypes.data
        arrays = (self._queue_keys, self._queue, self.runs, self._copies, self._outputs)
        self.header[at.QUEUE_KEYS_AT : at.OUTPUTS_AT + 1] = [array.ctypes.data for array in arrays]
        self.header[at.MAX_RUNS] = num_runs

    def begin(self, budget: int, has_sources: bool) -> None:
        """An empty iteration, of so many nodes at most."""
        self.header[at.BUDGET], self.header[at.HAS_SOURCES] = budget, has_sources
        self.header[at.NUM_RUNS : at.NUM_TOKENS + 1] = 0
        self.header[at.NUM_QUEUED] = at.NOT_BEGUN

    def copies(self) -> list[tuple[int, int, int]]:
        """(source page, destination page, used slots), to be copied before the forward."""
        return list(map(tuple, self._copies[: self.header[at.NUM_COPIES]].tolist()))  # type: ignore[arg-type]

    def request_of(self, output: int) -> DraftRequest:
        """Whose an output of the latest batch is."""
        return self.requests[int(self._outputs[output, 0])]

    def batch(self, coupling: NoiseCoupling) -> Batch:
        """What was chosen, for the engine."""
        self._sampling["noise_scale"] = [coupling.noise_scale(request.temperature) for request in self.requests]
        num_runs, num_tokens = int(self.header[at.NUM_RUNS]), int(self.header[at.NUM_TOKENS])
        numbers = np.empty(3 * num_runs + 1, np.int32)
        starts, num_outputs, query_start = numbers[:num_runs], numbers[num_runs : 2 * num_runs], numbers[2 * num_runs :]
        batch = Batch(
            np.empty(num_tokens, np.int64), query_start, starts, num_outputs,
            self._sampling[self.runs[:num_runs, at.TREE]], self._pages[:num_runs],
        )  # fmt: skip
        self.latest = batch
        arrays = (batch.token_ids, starts, query_start, num_outputs, self._pages)
        tokens_at, starts_at, query_at, counts_at, pages_at = (array.ctypes.data for array in arrays)
        at.steps().lay_out(self.address, tokens_at, starts_at, query_at, counts_at, pages_at, self._max_pages)
        return batch
