"""The lookups by scanning: slow, obvious, and the definition that the automata are compared with."""

from collections.abc import Sequence

from vllm_double.retrieval.automaton import SEPARATOR
from vllm_double.retrieval.base import Continuation

__all__ = ["recall", "scan"]


def scan(text: Sequence[int], indexed: int, tail: Sequence[int], max_tokens: int, max_match: int) -> Continuation | None:
    """`ContextRetriever.lookup` for a text whose first ``indexed`` tokens are indexed. O(n) a length."""
    return _continue(list(text[:indexed]), [*text, *tail], max_tokens, max_match)


def recall(
    generations: Sequence[Sequence[int]], context: Sequence[int], max_tokens: int, max_match: int
) -> Continuation | None:
    """`HistoryRetriever.lookup` in generations of separated texts, newest first."""
    lengths = [_longest_followed_suffix(list(searched), list(context), max_match)[0] for searched in generations]
    if not any(lengths):
        return None
    return _continue(list(generations[lengths.index(max(lengths))]), list(context), max_tokens, max_match)


def _continue(searched: list[int], context: list[int], max_tokens: int, max_match: int) -> Continuation | None:
    tokens: list[int] = []
    counts: list[int] = []
    totals: list[int] = []
    match_length = 0
    for _ in range(max_tokens):
        length, followers = _longest_followed_suffix(searched, context, max_match)
        if length < max(match_length, 1):
            break
        match_length = match_length or length
        # The most frequent follower; of equally frequent ones that which was seen last.
        last_seen = {token: i for i, token in enumerate(followers)}
        token = max(last_seen, key=lambda token: (followers.count(token), last_seen[token]))
        if token == SEPARATOR:
            break
        tokens.append(token)
        counts.append(followers.count(token))
        totals.append(len(followers))
        context.append(token)
    return Continuation(tokens, match_length, counts, totals) if tokens else None


def _longest_followed_suffix(searched: list[int], context: list[int], max_match: int) -> tuple[int, list[int]]:
    """The longest suffix of context that occurs in searched with a token behind it: its length, at most
    max_match, and the tokens behind its occurrences in text order."""
    for length in range(min(max_match, len(context)), 0, -1):
        suffix = context[-length:]
        followers = [searched[end] for end in range(length, len(searched)) if searched[end - length : end] == suffix]
        if followers:
            return length, followers
    return 0, []
