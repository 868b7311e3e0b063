"""Retrieval from what the target answered to earlier requests of the same tenant."""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from vllm_double.retrieval._steps import HEADER_LENGTH, SEPARATOR, steps
from vllm_double.retrieval.automaton import SuffixAutomaton
from vllm_double.retrieval.base import Continuation, Source, Tokens
from vllm_double.retrieval.buffers import MAX_CONTINUATION, Recent, Scratch

__all__ = ["HistoryRetriever"]

# Room of a tenant's first generation, and what any is charged at least: otherwise a tenant for each request had no bound.
_SMALLEST = 1 << 8
_GROWTH = 8
# A tenant that has the whole history for itself loses a quarter of it at a time.
_SHARE = 4
_SHORTEST_TEXT = 2


class _Generation:
    """Texts that are forgotten together. ``serial`` counts all generations of a history; ``least`` is charged in any case."""

    __slots__ = ("automaton", "least", "serial", "tenant")

    def __init__(self, serial: int, tenant: "_Tenant", capacity: int, least: int, max_match: int) -> None:
        self.serial = serial
        self.tenant = tenant
        self.least = least
        self.automaton = SuffixAutomaton(capacity, max_match)

    @property
    def charge(self) -> int:
        """Tokens that it counts for."""
        return max(self.automaton.num_tokens, self.least)


class _Tenant:
    """The generations of one partition, newest first. ``version`` is another one after every change of what they hold."""

    __slots__ = ("_headers", "_headers_at", "_headers_version", "generations", "name", "version")

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.generations: deque[_Generation] = deque()
        self.version = 0
        self._headers = np.empty((0, HEADER_LENGTH), np.int64)
        self._headers_at = 0
        self._headers_version = 0

    @property
    def headers_at(self) -> int:
        """Address of the automata's headers as they are now, int64 [generations, HEADER_LENGTH]."""
        if self._headers_version != self.version:
            self._headers = np.array([generation.automaton.header for generation in self.generations])
            self._headers_at = self._headers.ctypes.data
            self._headers_version = self.version
        return self._headers_at


class _Request:
    """``recent``: the end of its text; ``fresh``: how many of these the cursors have not seen; ``output``: since its start."""

    __slots__ = ("cursors", "cursors_at", "fresh", "output", "recent", "tenant", "version")

    def __init__(self, tenant: str | None, tokens: Tokens, max_match: int) -> None:
        self.tenant = tenant
        self.recent = Recent(max_match)
        self.recent.append(tokens[-max_match:])
        self.fresh = 0
        self.output = array("i")
        self.version = 0
        self.cursors = np.zeros((0, 2), np.int64)
        self.cursors_at = 0


class HistoryRetriever(Source):
    """Continues a request with what followed the same words in outputs of earlier requests of its tenant.

    An output is indexed when its request stops: tokens that the target gave, nothing of the prompt. A request without a tenant
    neither reads nor leaves anything, unless ``share_unnamed``: then all of these are one tenant's. Tenants never see each
    other's texts, because the time that an answer takes would tell what they are.

    A tenant's texts lie in generations. A text goes to the newest one, which is closed when it is full; the first has room for
    256 tokens (or its first text), later ones for eight times their predecessor's, up to a quarter of ``max_tokens``. While all
    generations of all tenants together hold more than ``max_tokens``, each counted as 256 at least, the one that has waited
    longest for another text is given up, whole. Texts longer than a generation keep their end.

    A lookup answers from one generation: that in which the longest suffix of text + tail, of at most ``max_match`` tokens,
    occurs; of equally long ones the newest. There it is `ContextRetriever`'s lookup over texts that each end with a separator:
    contexts do not reach across it, it counts as a token that followed, and a continuation ends where it followed most often.
    `reference.recall` is the same in a few obvious lines.

    Not thread-safe. Costs: benchmarks/retrieval_bench.py.
    """

    name = "history"

    def __init__(self, max_tokens: int, max_match: int = 32, *, share_unnamed: bool = False) -> None:
        """Room for ``max_tokens`` tokens of all tenants. Call `automaton.warm_up` before the first start."""
        if max_tokens < 1 or max_match < 1:
            raise ValueError(f"max_tokens and max_match must be at least 1, not {max_tokens} and {max_match}")
        self.max_tokens = max_tokens
        self.max_match = max_match
        self._share_unnamed = share_unnamed
        self._largest = 1 << max(1, (max_tokens // _SHARE).bit_length() - 1)
        self._steps = steps()
        self._requests: dict[int, _Request | None] = {}  # None: it neither reads nor leaves anything
        self._tenants: dict[str | None, _Tenant] = {}
        # By serial; the one that has waited longest for another text comes first.
        self._generations: OrderedDict[int, _Generation] = OrderedDict()
        self._waiting: deque[tuple[str | None, Tokens]] = deque()
        # The text that is being indexed: its generation, and how much of it is done.
        self._current: tuple[_Generation, Tokens, int] | None = None
        self._num_tokens = 0
        self._charge = 0  # of all generations
        self._last_serial = 0
        self._version = 0
        self._scratch = Scratch()

    # ---- requests ---------------------------------------------------------------------------------------------

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """Begin a request with its prompt, int32 [n]. ValueError: the key is in use, or one of its last tokens is negative."""
        if key in self._requests:
            raise ValueError(f"request {key} is started already")
        is_known = tenant is not None or self._share_unnamed
        self._requests[key] = _Request(tenant, tokens, self.max_match) if is_known else None

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append committed tokens. KeyError: unknown key. ValueError: a negative token, none is appended."""
        request = self._requests[key]
        if request is None or len(tokens) == 0:
            return
        request.recent.append(tokens)
        request.output.extend(tokens)
        request.fresh = min(request.fresh + len(tokens), self.max_match)

    def stop(self, key: int, keep: bool) -> None:
        """End the request; later ones may be offered its output if ``keep``. KeyError: unknown key."""
        request = self._requests.pop(key)
        if keep and request is not None and len(request.output) >= _SHORTEST_TEXT:
            text = np.append(np.frombuffer(request.output, np.int32)[1 - self._largest :], np.int32(SEPARATOR))
            self._waiting.append((request.tenant, text))

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """What followed the longest suffix of text + tail; see the class. None: nothing did.

        KeyError: unknown key. ValueError: ``max_tokens`` not between 1 and MAX_CONTINUATION (1024), or a negative token.
        """
        request = self._requests[key]
        if not 1 <= max_tokens <= MAX_CONTINUATION:
            raise ValueError(f"max_tokens must be between 1 and {MAX_CONTINUATION}, not {max_tokens}")
        tenant = self._tenants.get(request.tenant) if request is not None else None
        if request is None or tenant is None:
            return None
        num_generations, headers_at = len(tenant.generations), tenant.headers_at
        if request.version != tenant.version:
            request.version = tenant.version
            request.cursors = np.zeros((num_generations, 2), np.int64)
            request.cursors_at = request.cursors.ctypes.data
            request.fresh = min(request.recent.length, self.max_match)
        num_kept = request.fresh
        feed_at = request.recent.write_behind(tail, 0) - 4 * num_kept
        request.fresh = 0
        found = self._steps.recall(
            num_generations, headers_at, request.cursors_at, feed_at, num_kept, num_kept + len(tail), self._scratch.out_address,
            max_tokens,
        )  # fmt: skip
        return self._scratch.continuation(*found)

    # ---- the index --------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens that are indexed, a separator for each text among them."""
        return self._num_tokens

    @property
    def num_waiting(self) -> int:
        """Tokens that wait for `work`."""
        current = len(self._current[1]) - self._current[2] if self._current is not None else 0
        return current + sum(len(text) for _, text in self._waiting)

    @property
    def num_bytes(self) -> int:
        """Bytes that the index has written to."""
        return sum(generation.automaton.num_bytes[0] for generation in self._generations.values())

    def work(self, budget_tokens: int) -> None:
        """Index at most ``budget_tokens`` tokens of outputs, oldest request first."""
        while budget_tokens > 0:
            if self._current is None:
                if not self._waiting:
                    return
                tenant, text = self._waiting.popleft()
                self._current = (self._room_for(tenant, len(text)), text, 0)
            generation, text, start = self._current
            stop = min(len(text), start + budget_tokens)
            self._charge -= generation.charge
            generation.automaton.extend(text, start, stop)
            self._charge += generation.charge
            self._touch(generation.tenant)
            self._num_tokens += stop - start
            budget_tokens -= stop - start
            self._current = (generation, text, stop) if stop < len(text) else None
            while self._charge > self.max_tokens:
                self._evict()

    def forget(self) -> None:
        """Drop all texts, those of running requests too: the weights changed."""
        self._waiting.clear()
        while self._generations:
            self._evict()
        for request in self._requests.values():
            if request is not None:
                del request.output[:]

    def _room_for(self, name: str | None, num_tokens: int) -> _Generation:
        """The tenant's newest generation, or a new one if that has no room for so many tokens."""
        tenant = self._tenants.setdefault(name, _Tenant(name))
        capacity = least = min(_SMALLEST, self._largest)
        if tenant.generations:
            newest = tenant.generations[0]
            full = newest.automaton.capacity
            if newest.automaton.num_tokens + num_tokens <= full:
                self._generations.move_to_end(newest.serial)
                return newest
            capacity = min(_GROWTH * full, self._largest)
        while capacity < num_tokens:
            capacity *= 2
        self._last_serial += 1
        generation = _Generation(self._last_serial, tenant, capacity, least, self.max_match)
        tenant.generations.appendleft(generation)
        self._generations[generation.serial] = generation
        self._charge += generation.charge
        return generation

    def _evict(self) -> None:
        """Give up the generation whose latest text is the oldest: of its tenant's the one that was begun first."""
        _, generation = self._generations.popitem(last=False)
        self._num_tokens -= generation.automaton.num_tokens
        self._charge -= generation.charge
        tenant = generation.tenant
        tenant.generations.pop()
        self._touch(tenant)
        if self._current is not None and self._current[0] is generation:
            self._current = None
        if not tenant.generations:
            del self._tenants[tenant.name]

    def _touch(self, tenant: _Tenant) -> None:
        self._version += 1
        tenant.version = self._version

    def check_integrity(self) -> None:
        """Raise AssertionError where generations, tenants and counts contradict each other."""
        held = [generation for tenant in self._tenants.values() for generation in tenant.generations]
        assert {id(g) for g in held} == {id(g) for g in self._generations.values()}
        assert self._num_tokens == sum(generation.automaton.num_tokens for generation in held)
        assert self._charge == sum(generation.charge for generation in held) <= self.max_tokens
        for tenant in self._tenants.values():
            serials = [generation.serial for generation in tenant.generations]
            assert serials and serials == sorted(serials, reverse=True)
            assert serials == [serial for serial in reversed(self._generations) if serial in serials], "order of eviction"
            assert all(generation.tenant is tenant for generation in tenant.generations)
