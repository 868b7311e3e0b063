"""The lookups by scanning: slow, obvious, and the definition that the compiled ones are compared with."""

from collections.abc import Callable, Sequence

from vllm_double.retrieval.base import Continuation
from vllm_double.retrieval.suffix_automaton.automaton_steps import SEPARATOR

__all__ = ["recall", "scan", "scan_documents"]


def scan(text: Sequence[int], indexed: int, tail: Sequence[int], max_tokens: int, max_match: int) -> Continuation | None:
    """`ContextRetriever.lookup` for a text whose first ``indexed`` tokens are indexed. O(n) a length."""
    return _continue([text[:indexed]], [*text, *tail], max_tokens, max_match, _latest)


def recall(
    generations: Sequence[Sequence[int]], context: Sequence[int], max_tokens: int, max_match: int
) -> Continuation | None:
    """`HistoryRetriever.lookup` in generations of separated texts, newest first."""
    lengths = [_longest_followed_suffix([list(searched)], list(context), max_match)[0] for searched in generations]
    if not any(lengths):
        return None
    return _continue([generations[lengths.index(max(lengths))]], context, max_tokens, max_match, _latest)


def scan_documents(
    documents: Sequence[Sequence[int]], context: Sequence[int], max_tokens: int, max_match: int
) -> Continuation | None:
    """`DatastoreRetriever.lookup` for a corpus and a text + tail. O(n) a length."""
    return _continue(documents, context, max_tokens, max_match, _lowest)


def _latest(last_seen: int, _token: int) -> int:
    """Of equally frequent followers that which was seen last."""
    return last_seen


def _lowest(_last_seen: int, token: int) -> int:
    """Of equally frequent followers the lowest id."""
    return -token


def _continue(
    documents: Sequence[Sequence[int]],
    context: Sequence[int],
    max_tokens: int,
    max_match: int,
    preference: Callable[[int, int], int],
) -> Continuation | None:
    searched = [list(document) for document in documents]
    context = list(context)
    tokens: list[int] = []
    counts: list[int] = []
    totals: list[int] = []
    match_length = 0
    for _ in range(max_tokens):
        length, followers = _longest_followed_suffix(searched, context, max_match)
        if length < max(match_length, 1):
            break
        match_length = match_length or length
        last_seen = {token: i for i, token in enumerate(followers)}
        token = max(last_seen, key=lambda token: (followers.count(token), preference(last_seen[token], token)))
        if token == SEPARATOR:
            break
        tokens.append(token)
        counts.append(followers.count(token))
        totals.append(len(followers))
        context.append(token)
    return Continuation.of(tokens, match_length, counts, totals) if tokens else None


def _longest_followed_suffix(documents: list[list[int]], context: list[int], max_match: int) -> tuple[int, list[int]]:
    """The longest suffix of context that occurs in a document with a token behind it: its length, at most
    max_match, and the tokens behind its occurrences in text order."""
    for length in range(min(max_match, len(context)), 0, -1):
        suffix = context[-length:]
        followers = [
            document[end]
            for document in documents
            for end in range(length, len(document))
            if document[end - length : end] == suffix
        ]
        if followers:
            return length, followers
    return 0, []
