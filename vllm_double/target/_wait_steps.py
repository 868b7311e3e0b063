"""The figures of the rule of waiting, for the live rows of a round: compiled calls. See `waiting`.

``tries``: `speculation_trie.Tries`; ``live``: `batch.Live`; ``means``: `means.Means`. step_s: of the draft. fixed, per_token:
see `StepCost.estimate`.
"""

from typing import Any

from vllm_double.jit import view_part
from vllm_double.target._round_steps import DECAY

FIRST_STEPS = 1.5  # draft steps until the first token comes, before any wait was measured: the rest of one, and one
_MOST_STEPS = 8
_GUESS_WEIGHT = 8.0  # of what is believed before anything is measured
_ACCEPTED, _HITS_AFTER_NOTHING, _HITS_AFTER_CHAIN, _TOKENS_OF_HIT = 0.5, 0.9, 0.8, 2.0  # which is this


def tokens_per_s(means: Any, num_rows: int, fixed: float, per_token: float) -> float:
    """What the batch decodes without waiting, by what its forwards have given lately and take."""
    lately = means.batch[0]
    seconds = fixed + per_token * num_rows * (1.0 + lately.chain_length)
    return lately.tokens_per_row * num_rows / seconds  # type: ignore[no-any-return]


def next_worth(tries: Any, live: Any, means: Any, picked: Any, price: float) -> float:
    """Tokens that verifying the draft's next tokens for the picked live rows brings, less what they cost (``price`` each); who
    is not worth it is not verified."""
    return _worth(tries, live, means, picked, len(picked), price, 0)


def choose_awaited(tries: Any, live: Any, means: Any, session: Any, step_s: float, fixed: float, per_token: float,
                   awaited: Any) -> int:  # fmt: skip
    """The live rows for whose next draft tokens the target waits, to ``awaited``; returns how many: all to which one is worth
    its verification, or none."""
    num = 0
    if _all_have_drafted(tries) and step_s > 0.0:
        rate = _tokens_per_s(means, live.summary[0], fixed, per_token)
        for one in range(live.summary[0]):
            request = tries.requests[live.slots[one]]
            may_draft = request.session != 0 and request.session == session and request.has_drafted and request.pause == 0
            is_worth_it = _next_accept_prob(tries, live, means, one, 0) > rate * per_token
            if may_draft and is_worth_it and live.path_lengths[one] < live.limits[one]:
                awaited[num] = one
                num += 1
        if num > 0 and not _pays_to_begin(tries, live, means, awaited, num, step_s, rate, rate * per_token):
            num = 0
        if num == 0:  # what earlier waits took counts less, so that one is tried again some day
            _fade(means.first_s)
            _fade(means.hits_after_wait)
    return num


@view_part
def _all_have_drafted(tries: Any) -> bool:
    """Whether the worker has drafted for all requests that it may know since their admission, but for paused ones."""
    for slot in range(len(tries.requests)):
        request = tries.requests[slot]
        if request.session != 0 and not request.has_drafted and request.pause == 0:
            return False
    return True


@view_part
def _pays_to_begin(tries: Any, live: Any, means: Any, awaited: Any, num: int, step_s: float, rate: float, price: float) -> bool:
    best, gain = 0.0, 0.0
    seconds, next_s = mean(means.first_s, 0, FIRST_STEPS * step_s, 1.0), mean(means.next_s, 0, step_s, 1.0)
    for step in range(_MOST_STEPS):
        worth = _worth(tries, live, means, awaited, num, price, step)
        gain += worth
        best = max(best, gain - rate * seconds)
        if worth <= rate * next_s:
            break  # nor is any later one
        seconds += next_s
    num_missed = 0
    for index in range(num):
        num_missed += int(live.path_lengths[awaited[index]] == 0)
    # An outcome that is prepared is worth this much more than one for which the target waits.
    tokens_of_hit = mean(means.tokens_of_hit, 0, _TOKENS_OF_HIT, _GUESS_WEIGHT)
    worth_of_hit = max((tokens_of_hit - 1.0) * num_missed - best, 0.0)
    after_chain = mean(means.hits_after_chain, 0, _HITS_AFTER_CHAIN, _GUESS_WEIGHT)
    after_wait = mean(means.hits_after_wait, 0, after_chain, _GUESS_WEIGHT)
    fewer_hits = mean(means.hits_after_nothing, 0, _HITS_AFTER_NOTHING, _GUESS_WEIGHT) - after_wait
    return best > max(fewer_hits, 0.0) * worth_of_hit


@view_part
def _worth(tries: Any, live: Any, means: Any, picked: Any, num: int, price: float, step: int) -> float:
    total = 0.0
    for index in range(num):
        total += max(_next_accept_prob(tries, live, means, picked[index], step) - price, 0.0)
    return total


@view_part
def _next_accept_prob(tries: Any, live: Any, means: Any, one: int, step: int) -> float:
    """That everything up to the draft's next token is accepted, or up to the one ``step`` tokens behind it."""
    temperature, length = tries.requests[live.slots[one]].temperature, live.path_lengths[one]
    acceptance = mean(means.accepted, temperature, _ACCEPTED, _GUESS_WEIGHT)
    if length == 0:
        acceptance = mean(means.accepted_after_miss, temperature, acceptance, _GUESS_WEIGHT)
    accept_prob = acceptance if length == 0 else acceptance * live.paths[one, length - 1].accept_prob
    return accept_prob * acceptance**step  # type: ignore[no-any-return]


@view_part
def mean(sums: Any, index: int, guess: float, guess_weight: float) -> float:
    """A decaying mean that begins with a guess of so much weight."""
    return (guess * guess_weight + sums[index].total) / (guess_weight + sums[index].weight)  # type: ignore[no-any-return]


@view_part
def _fade(sums: Any) -> None:
    sums[0].total *= DECAY
    sums[0].weight *= DECAY


_tokens_per_s = view_part(tokens_per_s)
