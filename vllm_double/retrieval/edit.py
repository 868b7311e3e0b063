"""Retrieval for replies that repeat a shown text with changes: it goes on copying behind a change, and repeats replacements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from vllm_double.retrieval.base import Continuation, Source, Tokens
from vllm_double.retrieval.context import ContextRetriever

__all__ = ["EditRetriever"]

_MIN_MATCH = 8  # copying is taken to have begun where so many tokens are those of an earlier place
_WINDOW = 64  # tokens behind a change among which the place is looked for where copying goes on
_SURE = 2  # tokens by which that place is known
_LONGEST_CHANGE = 32  # a change of more tokens is none: copying has ended
_LONGEST_NAME = 8  # tokens of what is replaced again wherever it comes
_MAX_REPLACEMENTS = 64

_Words: TypeAlias = "tuple[int, ...]"
_Replacements: TypeAlias = "dict[int, tuple[_Words, _Words]]"


class _Copying:
    """Where in a text its end is being copied from.

    source: place of the next token to be copied; -1: nothing is being copied.
    end: places from here on are the copy itself.
    run: tokens that were foreseen since copying began or went on.
    change: tokens since the copy departed from the text, which happened at ``source``; empty while it has not.
    due: what is still to come of a replacement, ``source`` being behind what it replaces already.
    replacements: by its first token, what was replaced last and what came instead; shared with copies, which do not change it.
    """

    __slots__ = ("change", "due", "end", "is_real", "replaced", "replacements", "run", "source", "text")

    def __init__(self, text: Tokens, replacements: _Replacements, is_real: bool) -> None:
        self.text = text
        self.replacements = replacements
        self.is_real = is_real
        self.end = 0
        self.begin(-1, 0)

    def begin(self, source: int, run: int) -> None:
        """Copying begins, or goes on, at ``source``."""
        self.source = source
        self.run = run
        self.change: list[int] = []
        self.due: _Words = ()
        self.replaced: _Words = ()

    def copy(self) -> _Copying:
        """The same, to be tried on tokens that are not committed."""
        other = _Copying(self.text, self.replacements, False)
        other.source, other.run, other.change = self.source, self.run, list(self.change)
        other.due, other.replaced, other.end = self.due, self.replaced, self.end
        return other

    def step(self, token: int) -> None:
        """One more token of the copy."""
        if self.source < 0:
            return
        if self.change:
            self.change.append(token)
            self._try_to_go_on()
            return
        is_new = not self.due
        if is_new and self.replacements:
            self.replaced, self.due = self._replacement(self.text[self.source : self.source + _LONGEST_NAME].tolist(), 0)
            self.source += len(self.replaced)
        if self.due:
            if token == self.due[0]:
                self.due = self.due[1:]
                self.run += 1
                return
            # It does not hold everywhere.
            if self.is_real:
                self.replacements.pop(self.replaced[0], None)
            if is_new:
                self.source -= len(self.replaced)
            self.due = ()
        if self.source < len(self.text) and self.text[self.source] == token:
            self.source += 1
            self.run += 1
        else:
            self.change = [token]

    def _replacement(self, words: list[int], place: int) -> tuple[_Words, _Words]:
        """What stands at a place of ``words`` and was replaced before, and what comes instead; empty: nothing."""
        found = self.replacements.get(words[place]) if place < len(words) else None
        if found is None or tuple(words[place : place + len(found[0])]) != found[0]:
            return (), ()
        return found

    def _place_behind_change(self, num_sure: int) -> int:
        """The nearest place behind the last ``num_sure`` tokens, at or behind where the copy departed; -1: none."""
        if len(self.change) < num_sure:
            return -1
        last = self.change[-num_sure:]
        window = self.text[self.source : min(self.source + _WINDOW, self.end)].tolist()
        for place in range(len(window) - num_sure + 1):
            if window[place : place + num_sure] == last:
                return self.source + place + num_sure
        return -1

    def _try_to_go_on(self) -> None:
        place = self._place_behind_change(_SURE)
        if place >= 0:
            old, new = self.text[self.source : place - _SURE].tolist(), self.change[:-_SURE]
            while old and new and old[-1] == new[-1]:
                del old[-1], new[-1]
            if self.is_real and 0 < len(old) <= _LONGEST_NAME and 0 < len(new) <= _LONGEST_NAME:
                self.replacements.pop(old[0], None)
                self.replacements[old[0]] = tuple(old), tuple(new)
                if len(self.replacements) > _MAX_REPLACEMENTS:
                    del self.replacements[next(iter(self.replacements))]
            self.begin(place, _SURE)
        elif len(self.change) > _LONGEST_CHANGE:
            self.begin(-1, 0)

    @property
    def is_plain(self) -> bool:
        """Whether the copy has followed the text for so long that the context is as sure of the next token."""
        return self.run >= _MIN_MATCH and not self.change and not self.due

    def is_plain_behind(self, tail: Sequence[int]) -> bool:
        """Whether that is so behind ``tail`` too, and nothing is going to be replaced; found out cheaply."""
        if self.replacements or not self.is_plain:
            return False
        return not tail or self.text[self.source : self.source + len(tail)].tolist() == list(tail)

    def ahead(self, max_tokens: int) -> tuple[list[int], int]:
        """The next tokens of the copy, at most ``max_tokens``, and how many before them speak for it.

        None of them where the copied text itself goes on and a long run speaks for it: there the context says the same.
        """
        place, run = self.source, self.run
        is_plain = self.is_plain
        if self.change:
            place, run = self._place_behind_change(1), 1
            if place < 0:
                # Most changes replace: what comes behind what was replaced is the nearest guess.
                place, run = self.source + 1, 0
        words = self.text[place : place + max_tokens + _LONGEST_NAME].tolist()
        tokens, place = list(self.due), 0
        while len(tokens) < max_tokens and place < len(words):
            old, new = self._replacement(words, place)
            if old:
                tokens.extend(new)
                place += len(old)
                is_plain = False
            else:
                tokens.append(words[place])
                place += 1
        return ([] if is_plain else tokens[:max_tokens]), run


class EditRetriever(Source):
    """Continues a reply that repeats a text of its own request with changes, as edits of code do.

    Where at least ``_MIN_MATCH`` tokens are those of an earlier place, that place is being copied. Behind a token that departs
    from it a suffix automaton knows nothing for a while. Here the copy goes on: behind a replaced token, or where the next
    tokens are found again within ``_WINDOW`` tokens. What was replaced by what is remembered, as in the renaming of a
    variable, and offered instead wherever the copied text has it again, until that is refused once.

    Reads the texts and the automata of ``context``, which has to be told everything first. Not thread-safe.
    """

    name = "edit"

    def __init__(self, context: ContextRetriever) -> None:
        self._context = context
        self._requests: dict[int, _Copying] = {}

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """See Source."""
        if key in self._requests:
            raise ValueError(f"request {key} is started already")
        self._requests[key] = _Copying(self._context.text(key), {}, True)

    def stop(self, key: int, keep: bool = False) -> None:
        """See Source."""
        del self._requests[key]

    def forget(self) -> None:
        """Nothing is kept of requests that ended."""

    def work(self, budget_tokens: int) -> None:
        """Nothing waits."""

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """See Source. The context has them already."""
        copying = self._requests[key]
        copying.text = self._context.text(key)
        for token in tokens:
            copying.step(token)
        if copying.source < 0 or copying.change:
            source, length = self._context.source(key)
            if length >= _MIN_MATCH:
                copying.begin(source, length)
                copying.end = len(copying.text) - length

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """See Source. None: nothing is being copied."""
        copying = self._requests[key]
        if copying.source < 0 or copying.is_plain_behind(tail):
            return None
        if tail:
            copying = copying.copy()
            for token in tail:
                copying.step(token)
            if copying.source < 0:
                return None
        tokens, run = copying.ahead(max_tokens)
        if not tokens:
            return None
        ones = [1] * len(tokens)
        return Continuation.of(tokens, 1 + run, ones, ones)
