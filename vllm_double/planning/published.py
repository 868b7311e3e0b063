"""The published methods over scripted texts, round by round, in the times of `Times`.

Each is idealised in its favour: no latency between the two models, the best of all draft lengths, and drafting at full speed
beside the target. A batch steps together, and a finished request leaves it.

At a temperature above 0 their drafts are sampled and accepted by the ratio of probabilities, which accepts the most that is
possible (`Tables.verified`). A rejected token cannot be the outcome of its round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vllm_double.planning.script import Text, Times

__all__ = ["Play", "best", "double", "fan_outs", "pearl", "saguaro", "speculative"]

_Setting = TypeVar("_Setting")


@dataclass(slots=True)
class Play:
    """The cost of decoding the texts: seconds and rounds (target steps); summed over requests, forwards, draft forwards, and
    retrieved tokens that draft forwards confirmed (their mean is AMT)."""

    seconds: float = 0.0
    rounds: int = 0
    forwards: int = 0
    draft_forwards: int = 0
    matched: int = 0

    def speedup(self, times: Times, batch: int, num_tokens: int) -> float:
        """Over decoding without drafts, which takes a step for each of the ``num_tokens - 1`` tokens behind a prompt of one."""
        return times.step(batch) * (num_tokens - 1) / self.seconds


@dataclass(slots=True)
class _Row:
    """A request: its text, tokens committed, and drafted tokens that wait to be verified behind them."""

    text: Text
    length: int = 1
    chain: int = 0


def best(settings: Iterable[_Setting], play: Callable[[_Setting], Play]) -> tuple[_Setting, Play]:
    """The fastest setting, and its play."""
    return min(((setting, play(setting)) for setting in settings), key=lambda tried: tried[1].seconds)


def speculative(scripted: Sequence[Text], times: Times, num_tokens: int, draft_length: int) -> Play:
    """Speculative decoding (Leviathan et al., 2211.17192): draft, verify, one after the other. A round gives
    (1 - a^(k+1)) / (1 - a) tokens for an acceptance of a and a draft of k."""
    play, rows = Play(), [_Row(text) for text in scripted]
    while rows:
        play.seconds += draft_length * times.draft_forward(len(rows)) + times.step(len(rows) * (1 + draft_length)) + times.gap
        rows = _commit(play, rows, [min(row.text.agreed[row.length], draft_length) for row in rows], num_tokens)
    return play


def pearl(scripted: Sequence[Text], times: Times, num_tokens: int, draft_length: int) -> Play:
    """PEARL (2408.11850): while the target verifies, the draft makes ``draft_length`` tokens as if all were accepted.

    The target's token behind the chain verifies the first new token (pre-verify). If that is right, the others are the next
    chain (post-verify). If not, or after a rejection within the chain, the target has nothing to verify for a round.
    So a round gives at most ``draft_length`` tokens, and the speed-up is at most C = target step / draft forward.
    """
    play, rows = Play(), [_Row(text) for text in scripted]
    while rows:
        drafting = draft_length * times.draft_forward(len(rows))
        verifying = times.step(sum(1 + row.chain for row in rows))
        play.seconds += max(drafting, verifying) + times.gap
        accepted = [min(row.text.agreed[row.length], row.chain) for row in rows]
        for row in rows:
            row.chain = draft_length - 1 if row.text.agreed[row.length] > row.chain else 0
        rows = _commit(play, rows, accepted, num_tokens)
    return play


def fan_outs(acceptance: float, tail: float, draft_length: int, num_outcomes: int) -> list[int]:
    """Saguaro's geometric fan-out: how many tokens it prepares behind 0, 1, .. ``draft_length`` accepted ones.

    With a chance of a^k (1 - a) of k accepted tokens, a^K of all, and a miss in F^-r of the cases, the fewest misses for a sum
    of ``num_outcomes`` come from F_k in proportion to that chance to the power of 1 / (1 + r). Rounded, at least 1.
    """
    power = 1.0 / (1.0 + tail)
    chances = [acceptance**k * (1 - acceptance) for k in range(draft_length)] + [acceptance**draft_length]
    total = sum(chance**power for chance in chances)
    return [max(1, round(num_outcomes * chance**power / total)) for chance in chances]


def saguaro(scripted: Sequence[Text], times: Times, num_tokens: int, fan_out: Sequence[int]) -> Play:
    """Speculative speculative decoding (Saguaro, 2603.03251), with fan_out[k] outcomes for k accepted tokens of a draft of
    ``len(fan_out) - 1``: while the target verifies, the draft prepares a draft for each outcome.

    An outcome is the number of accepted tokens and the target's token behind them, which after a rejection is not the draft's
    first. Nothing is kept for a later round. If the outcome of one request was not prepared, all wait for drafts made just in
    time.
    """
    play, rows = Play(), [_Row(text) for text in scripted]
    draft_length, num_outcomes = len(fan_out) - 1, sum(fan_out)
    is_hit = False
    while rows:
        if not is_hit:
            play.seconds += draft_length * times.draft_forward(len(rows))
        preparing = draft_length * times.draft_forward(num_outcomes * len(rows))
        verifying = times.step(len(rows) * (1 + draft_length))
        play.seconds += max(preparing, verifying) + times.gap
        accepted = [min(row.text.agreed[row.length], draft_length) for row in rows]
        is_hit = all(
            row.text.ranks[row.length + count] < fan_out[count] + (count < draft_length)
            for row, count in zip(rows, accepted, strict=True)
        )
        rows = _commit(play, rows, accepted, num_tokens)
    return play


def double(scripted: Sequence[Text], times: Times, num_tokens: int, draft_forwards: int, num_retrieved: int = 10) -> Play:
    """The published Double (2601.05524): PEARL, with retrieval on both sides; ``num_retrieved`` tokens at a time.

    Each of the ``draft_forwards`` beside a target step reads retrieved tokens and keeps those that are the draft's own first
    (Retrieval Forward), so that it gives 1 + AMT tokens instead of 1 and the speed-up is at most C (1 + AMT). The target
    verifies retrieved tokens behind the chain (authoritative retrieval). A rejection within the chain discards these and the
    draft's work.
    """
    play, rows = Play(), [_Row(text) for text in scripted]
    while rows:
        known = [min(_at(row.text.copied, row.length + row.chain), num_retrieved) for row in rows]
        verifying = times.step(sum(1 + row.chain for row in rows) + sum(num_retrieved for found in known if found))
        drafts = [_Draft(row.text, row.length, row.chain) for row in rows]
        drafting = sum(
            times.draft_forward(sum(draft.forward(num_retrieved) for draft in drafts)) for _ in range(draft_forwards)
        )
        play.seconds += max(drafting, verifying) + times.gap
        play.draft_forwards += draft_forwards * len(rows)
        play.matched += sum(draft.made for draft in drafts) - draft_forwards * len(rows)
        accepted = []
        for row, draft, found in zip(rows, drafts, known, strict=True):
            if row.text.agreed[row.length] < row.chain:
                accepted.append(row.text.agreed[row.length])
                row.chain = 0
                continue
            accepted.append(row.chain + found)
            # The retrieved tokens and the one behind them are the draft's too, or its work is lost.
            row.chain = draft.made - found - 1 if draft.num_right > found else 0
        rows = _commit(play, rows, accepted, num_tokens)
    return play


class _Draft:
    """A draft behind the chain of a request: ``num_right`` of the ``made`` tokens are the target's."""

    def __init__(self, text: Text, length: int, chain: int) -> None:
        self.made = self.num_right = 0
        self._text = text
        self._start = length + chain
        self._is_right = text.agreed[length] >= chain

    def forward(self, num_retrieved: int) -> int:
        """One Retrieval Forward; returns the tokens that it read."""
        if not self._is_right:
            self.made += 1
            return 1
        place = self._start + self.made
        known, agreed = min(_at(self._text.copied, place), num_retrieved), _at(self._text.agreed, place)
        self.made += min(known, agreed) + 1
        self.num_right += min(min(known, agreed) + 1, agreed)
        self._is_right = self.num_right == self.made
        return 1 + (num_retrieved if known else 0)


def _at(counts: Sequence[int], place: int) -> int:
    """0 beyond the end of a text."""
    return counts[place] if place < len(counts) else 0


def _commit(play: Play, rows: list[_Row], accepted: Sequence[int], num_tokens: int) -> list[_Row]:
    """Commit each row's accepted tokens and the target's token behind them; returns the unfinished rows."""
    play.rounds += 1
    play.forwards += len(rows)
    for row, count in zip(rows, accepted, strict=True):
        row.length += count + 1
    return [row for row in rows if row.length < num_tokens]
