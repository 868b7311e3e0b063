"""Retrieval from a request's own prompt and output."""

from collections.abc import Sequence

from vllm_double.retrieval.automaton import SuffixAutomaton
from vllm_double.retrieval.base import Continuation, Source, Tokens
from vllm_double.retrieval.buffers import MAX_CONTINUATION, Buffer, Scratch

__all__ = ["ContextRetriever"]

_MIN_CAPACITY = 256
# Tokens that extend indexes before it returns (under half a millisecond); more wait for `work`.
_AT_ONCE = 512
# Tokens that `work` indexes of one request before it turns to the next.
_SLICE = 512


class _Request:
    """A text, of which the automaton knows the first ``automaton.num_tokens`` tokens."""

    __slots__ = ("automaton", "indexed", "length", "text")

    def __init__(self, tokens: Tokens, max_match: int) -> None:
        capacity = max(_MIN_CAPACITY, 1 << len(tokens).bit_length())
        self.text = Buffer(capacity)
        self.text.write(0, tokens)
        self.length = len(tokens)
        self.indexed = 0
        self.automaton = SuffixAutomaton(capacity, max_match)

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens in all."""
        self.automaton.reserve(num_tokens)
        text = Buffer(self.automaton.capacity)
        text.tokens[: self.length] = self.text.tokens[: self.length]
        self.text = text

    def index(self, end: int) -> None:
        """Index what is before end."""
        self.automaton.extend_from(self.text.address, self.indexed, end)
        self.indexed = end


class ContextRetriever(Source):
    """Continues a request with what followed the same words earlier in the same request.

    Let ``indexed`` be the part of the text that is indexed: all of it, except while a long prompt waits
    for `work`. One step of a lookup takes as context the longest suffix of text + tail +
    (tokens returned so far), of at most ``max_match`` tokens, that occurs in ``indexed`` with a token of
    ``indexed`` behind it. Its total is the number of such occurrences (they may overlap). It returns the
    token that followed most often, with that count; of equally frequent ones that which followed last. Steps
    end with ``max_tokens``, or before a context would be shorter than the first one (``match_length``). So a
    continuation that reaches the end of the text goes on where the text's own end occurred before, as in
    periodic text. Occurrences inside the tail don't count. `reference.scan` is the same in a few obvious
    lines.

    While tokens wait, a lookup is exact for the part that is indexed, and still matches the text's true end.

    Not thread-safe. Costs: benchmarks/retrieval_bench.py. Memory per token: `automaton`, and 4 bytes of text.
    """

    name = "context"

    def __init__(self, max_match: int = 32) -> None:
        """Contexts have at most ``max_match`` tokens. Call `automaton.warm_up` before the first start."""
        if max_match < 1:
            raise ValueError(f"max_match must be at least 1, not {max_match}")
        self.max_match = max_match
        self._requests: dict[int, _Request] = {}
        # Keys with tokens to index, next first: a dictionary keeps the order and drops any key in O(1).
        self._queue: dict[int, None] = {}
        self._scratch = Scratch(max_match)

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """Copy and queue a prompt, int32 [n]. ValueError: the key is in use, or a token is negative."""
        if key in self._requests:
            raise ValueError(f"request {key} is started already")
        self._requests[key] = _Request(tokens, self.max_match)
        if len(tokens):
            self._queue[key] = None

    def stop(self, key: int, keep: bool = False) -> None:
        """Forget the request and free its memory: its text is of use to itself only. KeyError: unknown key."""
        del self._requests[key]
        self._queue.pop(key, None)

    def forget(self) -> None:
        """Nothing is kept of requests that ended."""

    def work(self, budget_tokens: int) -> None:
        """Index at most ``budget_tokens`` queued tokens, taking turns between the requests that wait."""
        while self._queue and budget_tokens > 0:
            key = next(iter(self._queue))
            del self._queue[key]
            request = self._requests[key]
            end = min(request.length, request.indexed + min(_SLICE, budget_tokens))
            budget_tokens -= end - request.indexed
            request.index(end)
            if end < request.length:
                self._queue[key] = None

    @property
    def num_waiting(self) -> int:
        """Tokens that wait for `work`."""
        return sum(self._requests[key].length - self._requests[key].indexed for key in self._queue)

    def num_indexed(self, key: int) -> int:
        """Tokens of the request that are indexed. KeyError: unknown key."""
        return self._requests[key].indexed

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append committed tokens. KeyError: unknown key. ValueError: a negative token, none is appended."""
        request = self._requests[key]
        end = request.length + len(tokens)
        if end > request.automaton.capacity:
            request.reserve(end)
        request.text.write(request.length, tokens)
        request.length = end
        if end - request.indexed > _AT_ONCE:
            self._queue[key] = None
            return
        request.index(end)
        if self._queue:
            self._queue.pop(key, None)

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """What followed the longest suffix of text + tail; see the class. None: no suffix occurs.

        KeyError: unknown key. ValueError: ``max_tokens`` not between 1 and MAX_CONTINUATION (1024), or a negative token.
        """
        request = self._requests[key]
        if not 1 <= max_tokens <= MAX_CONTINUATION:
            raise ValueError(f"max_tokens must be between 1 and {MAX_CONTINUATION}, not {max_tokens}")
        feed, num_tail = self._scratch.feed, len(tail)
        from_end = request.indexed == request.length and num_tail < self.max_match
        if from_end:
            num_feed = num_tail
            if num_tail:
                feed.write(0, tail)
        else:
            num_tail = min(num_tail, self.max_match)
            num_text = min(request.length, self.max_match - num_tail)
            num_feed = num_text + num_tail
            feed.write(0, request.text.tokens[request.length - num_text : request.length])
            feed.write(num_text, tail[len(tail) - num_tail :])
        return request.automaton.lookup(self._scratch, num_feed, from_end, max_tokens)

    def text(self, key: int) -> Tokens:
        """The whole text, int32 [n]; a view that is good until the next `extend`. KeyError: unknown key."""
        request = self._requests[key]
        return request.text.tokens[: request.length]

    def source(self, key: int) -> tuple[int, int]:
        """Where in the text the first token of a lookup was found last, and how many tokens before it are those of the text's
        end; (-1, 0): nowhere, or tokens wait for `work`. KeyError: unknown key."""
        request = self._requests[key]
        return request.automaton.source() if request.indexed == request.length else (-1, 0)

    def check_integrity(self) -> None:
        """Raise AssertionError where queue, texts and automata contradict each other. Slow: for tests."""
        waiting = {key for key, request in self._requests.items() if request.indexed < request.length}
        assert waiting == set(self._queue), "the queue holds exactly the requests with waiting tokens"
        for request in self._requests.values():
            assert request.indexed <= request.length <= len(request.text.tokens) == request.automaton.capacity
            assert request.indexed == request.automaton.num_tokens
            request.automaton.check_integrity(request.text.tokens[: request.indexed])
