"""The frontier over all requests: which nodes the next draft forward takes, and what becomes of its answer.

Anytime best-first drafting: each iteration takes the most probable nodes that are not computed yet. Where every node lists
one child this is PEARL (2408.11850); where the chain's nodes get siblings, Saguaro's verification outcomes (2603.03251).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_double.draft.base import DraftEngine, Row
from vllm_double.draft.pages import OutOfPagesError, PagePool
from vllm_double.draft.tree import Branch, DraftRequest, Node
from vllm_double.retrieval.base import Retriever
from vllm_double.transport.messages import MAX_CHILDREN, NODE_DTYPE, Admit, Commit, Forget, Release

__all__ = ["Frontier", "FrontierLimits", "Iteration"]

_INDEX_TOKENS_PER_ITERATION = 1024
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
    children_per_node: int = 32
    prefill_tokens: int = 256
    min_path_prob: float = 3e-3


@dataclass(slots=True)
class _Run:
    """One row of the next forward: consecutive tokens of one branch, the last of which are nodes of the tree."""

    request: DraftRequest
    branch: Branch
    start: int
    tokens: list[int]
    nodes: list[Node]


@dataclass(slots=True)
class Iteration:
    """One draft forward: copies of tail pages to make first, then its rows."""

    runs: list[_Run] = field(default_factory=list)
    tail_copies: dict[int, tuple[int, int]] = field(default_factory=dict)  # source page and used slots, by destination page
    fresh: set[int] = field(default_factory=set)  # identities of the nodes that this forward computes

    @property
    def copies(self) -> list[tuple[int, int, int]]:
        """(source page, destination page, used slots), to be copied before the forward."""
        return [(source, destination, used) for destination, (source, used) in self.tail_copies.items()]

    @property
    def rows(self) -> list[Row]:
        return [Row(run.branch.table, run.start, run.tokens, len(run.nodes), run.request.temperature) for run in self.runs]


class Frontier:
    """All admitted requests, their trees and the pages of one draft engine."""

    def __init__(
        self, engine: DraftEngine, limits: FrontierLimits, retrievers: Sequence[Retriever] = (), prefix_caching: bool = True
    ) -> None:
        if limits.children_per_node < 1:
            raise ValueError(f"children_per_node is {limits.children_per_node}, not at least 1")
        self._limits = limits
        self._max_length = engine.max_length
        self._vocab_size = engine.vocab_size
        self._page_size = engine.page_size
        self._pool = PagePool(engine.num_pages, prefix_caching)
        self._retrievers = list(retrievers)
        self._requests: dict[int, DraftRequest] = {}
        self._starved = False
        self._min_log_prob = math.log(limits.min_path_prob)
        self.num_late_commands = 0
        self.num_committed = 0
        self.num_foreseen = 0
        self.num_retrieved = 0
        self.num_confirmed = 0
        self.num_prefix_queries = 0  # tokens at admission
        self.num_prefix_hits = 0  # those of them that were in the prefix cache

    def __len__(self) -> int:
        return len(self._requests)

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
                command.handle, command.base, command.temperature, command.max_length, command.stop_token_ids,
                self._pool, self._page_size, command.tenant or None, command.epoch,
            )  # fmt: skip
            self._requests[command.handle] = request
            self.num_prefix_queries += command.base
            self._commit(request, 0, command.tokens)
        elif request is None:
            self.num_late_commands += 1
        elif isinstance(command, Release):
            self._forget(request, keep=command.keep)
        elif self._commit(request, command.keep, command.tokens) and not self._is_foreign(command.chain):
            request.follow(command.chain.tolist(), np.log(np.clip(command.chain_probs, 1e-9, 1.0)).tolist())

    def _commit(self, request: DraftRequest, keep: int, tokens: npt.NDArray[np.int32]) -> bool:
        """False where nothing can be drafted for the text any more, and the request is forgotten."""
        try:
            if self._is_foreign(tokens):
                raise ValueError("a token that the draft model does not know")
            was_whole, is_rewind = request.root is not None, keep < len(request.text)
            new = tokens.tolist()
            self.num_foreseen += request.commit(keep, new)
        except ValueError:  # or something of the text was lost on the way
            self.num_late_commands += 1
            self._forget(request)
            return False
        self.num_committed += len(new)
        if request.root is None:
            return True  # the text at admission is still arriving
        for retriever in self._retrievers:
            if was_whole and not is_rewind:
                retriever.extend(request.handle, new)
                continue
            if was_whole:
                retriever.stop(request.handle, keep=False)
            retriever.start(request.handle, np.array(request.text, dtype=np.int32), request.tenant)
        return True

    def _is_foreign(self, tokens: npt.NDArray[np.int32]) -> bool:
        """Whether a token lies beyond the draft's vocabulary, which may be smaller than the target's."""
        return len(tokens) > 0 and int(tokens.max()) >= self._vocab_size

    # ---- one iteration ----------------------------------------------------------------------------------------

    def select(self) -> Iteration:
        """The most useful work for one forward; no runs where there is none."""
        iteration = Iteration()
        if self._starved:
            self._reclaim()
        tips: dict[int, _Run] = {}  # the run that ends with a node, by the node's identity
        self._catch_up(iteration, tips)
        put_back: list[tuple[DraftRequest, Node]] = []
        heap = []
        for order, request in enumerate(self._requests.values()):
            best = self._best(request)
            if best is not None:
                # A request that was not served since its last commit comes before all others' second helpings.
                heap.append((request.num_expanded > 0, -best, order, request))
        heapq.heapify(heap)
        budget = self._limits.nodes_per_iteration
        while heap and (budget > 0 or not heap[0][0]):
            _, _, order, request = heapq.heappop(heap)
            node = request.take_candidate()
            try:
                budget -= self._add(iteration, tips, request, node, put_back)
            except OutOfPagesError:
                put_back.append((request, node))
                self._starved = True
                break
            best = self._best(request)
            if best is not None:
                heapq.heappush(heap, (request.num_expanded > 0, -best, order, request))
        for request, node in put_back:
            request.put_back(node)
        for retriever in self._retrievers:
            retriever.work(_INDEX_TOKENS_PER_ITERATION)
        return iteration

    def _best(self, request: DraftRequest) -> float | None:
        """Path log-probability of the request's best candidate, if that is worth a place in a forward."""
        if request.root is None or request.num_cached < len(request.text):
            return None
        limit = min(request.deepest_allowed(self._limits.num_speculative_tokens), self._max_length)
        while (best := request.best_candidate()) is not None:
            log_prob, position = best
            if log_prob < self._min_log_prob:
                return None
            if position < limit:
                return log_prob
            request.defer_candidate()
        return None

    def _catch_up(self, iteration: Iteration, tips: dict[int, _Run]) -> None:
        """Committed tokens that the draft has not read: short gaps first, so that a long prompt silences nobody."""
        waiting = [r for r in self._requests.values() if r.num_cached < len(r.text) and not self._is_idle(r)]
        for request in waiting:
            self.num_prefix_hits += request.match_prefix()
        waiting.sort(key=lambda request: len(request.text) - request.num_cached)
        budget = self._limits.prefill_tokens
        for request in waiting:
            if budget <= 0:
                break
            start = request.num_cached
            end = min(len(request.text), start + budget, self._max_length)
            reads_root = request.root is not None and end == len(request.text)
            try:
                branch = request.extend(None, end - start, iteration.tail_copies)
            except OutOfPagesError:
                self._starved = True
                break
            budget -= end - start
            run = _Run(request, branch, start, request.text[start:end], [])
            request.num_cached = end
            if reads_root:
                assert request.root is not None
                run.nodes.append(request.root)
                request.computed(request.root, branch)
                tips[id(request.root)] = run
                iteration.fresh.add(id(request.root))
                self._look_ahead(request, request.root)
            iteration.runs.append(run)

    def _is_idle(self, request: DraftRequest) -> bool:
        """The draft model cannot help where the text has ended, or is as long as it can read or as the request can get."""
        return len(request.text) >= min(self._max_length, request.max_length) or request.has_ended

    def _add(
        self, iteration: Iteration, tips: dict[int, _Run], request: DraftRequest, node: Node,
        put_back: list[tuple[DraftRequest, Node]],
    ) -> int:  # fmt: skip
        """Give ``node`` a place in the forward; returns how many. Raises OutOfPagesError."""
        parent = node.parent
        assert parent is not None, "the root is read with the committed text"
        run = tips.pop(id(parent), None)
        if run is not None:
            # A path that is already given (a chain with retrieved tokens) is read in one forward.
            try:
                request.extend(parent, 1, iteration.tail_copies)
            except OutOfPagesError:
                tips[id(parent)] = run
                raise
            run.tokens.append(node.token)
        elif parent.branch is None or id(parent) in iteration.fresh:
            put_back.append((request, node))  # its parent's keys and values come with this very forward
            return 0
        else:
            run = _Run(request, request.extend(parent, 1, iteration.tail_copies), node.position, [node.token], [])
            iteration.runs.append(run)
        run.nodes.append(node)
        request.computed(node, run.branch)
        tips[id(node)] = run
        iteration.fresh.add(id(node))
        self._look_ahead(request, node)
        return 1

    def _look_ahead(self, request: DraftRequest, node: Node) -> None:
        """A Retrieval Forward (Double, 2601.05524): what is retrieved behind a node is read in the same forward as the node.

        Where the draft then says otherwise, its word counts.
        """
        if not self._retrievers or node.children:
            return
        if not node.ahead:
            room = request.deepest_allowed(self._limits.num_speculative_tokens) - node.position - 1
            if room <= 0:
                return
            tail = request.path_to(node)
            best: list[tuple[int, float]] = []
            for retriever in self._retrievers:
                found = retriever.lookup(request.handle, tail, room)
                if found is None:
                    continue
                path = []
                for token, belief in zip(found.tokens, found.beliefs, strict=True):
                    if belief < _MIN_BELIEF or token >= self._vocab_size:
                        break
                    path.append((token, math.log(belief)))
                best = max(best, path, key=len)
            request.retrieved(node, best)
        request.look_ahead(node)

    def expand(
        self, iteration: Iteration, tokens: npt.NDArray[np.int32], probs: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.void]:
        """Grow the trees by the forward's answer, int32 and float32 [outputs, children]; returns NODE_DTYPE records."""
        for run in iteration.runs:
            run.request.insert_prefix()
        nodes = [(run.request, node) for run in iteration.runs for node in run.nodes]
        records = np.zeros(len(nodes), dtype=NODE_DTYPE)
        if not nodes:
            return records
        probs = np.fmax(probs, 0.0)  # a draft that overflows, and so says NaN, says nothing
        log_probs = np.log(np.maximum(probs, 1e-9)).tolist()
        token_lists = tokens.tolist()
        for index, (request, node) in enumerate(nodes):
            if node.is_retrieved:
                self.num_retrieved += 1
                self.num_confirmed += node.parent is not None and node.parent.alternatives[0] == node.token
            request.expand(node, token_lists[index], log_probs[index])
        records["handle"] = [request.handle for request, _ in nodes]
        records["prefix_hash"] = [node.prefix_hash for _, node in nodes]
        records["position"] = [node.position + 1 for _, node in nodes]
        told = min(tokens.shape[1], MAX_CHILDREN)
        records["count"] = told
        records["tokens"][:, :told] = tokens[:, :told]
        records["probs"][:, :told] = probs[:, :told]
        return records

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
        return -(-(min(len(request.text), self._max_length) + 1) // self._page_size) - len(request.trunk.table)

    def _forget(self, request: DraftRequest, keep: bool = False) -> None:
        """``keep``: whether the sources may offer its text to later requests."""
        if request.root is not None:  # the sources know a text once all of it at admission is here
            for retriever in self._retrievers:
                retriever.stop(request.handle, keep)
        request.release()
        del self._requests[request.handle]

    def check_integrity(self) -> None:
        """Assert that no page is lost or wrongly shared and that every tree is sound."""
        tables: list[Sequence[int]] = []
        for request in self._requests.values():
            request.check_integrity()
            tables.extend(branch.table[branch.first :] for branch in request.branches())
        self._pool.check_integrity(tables)
