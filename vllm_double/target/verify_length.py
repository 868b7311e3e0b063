"""How many draft tokens to verify: a token is added while it pays for what it costs the target.

Tokens are taken in falling order of their chance to be accepted, as long as each raises the batch's expected tokens per second.
"""

from collections.abc import Sequence

__all__ = ["chain_lengths", "speed_up"]


def chain_lengths(reaches: Sequence[Sequence[float]], fixed: float, per_token: float) -> list[int]:
    """Tokens to verify for each row of the batch.

    reaches: for each row the falling chances that its path is accepted up to each token.
    fixed, per_token: the target's step time in seconds without and per query token.
    """
    num_rows = len(reaches)
    expected = float(num_rows)
    seconds = fixed + per_token * num_rows
    threshold = 0.0
    for reach in sorted((reach for row in reaches for reach in row), reverse=True):
        if reach * seconds <= per_token * expected:
            threshold = reach
            break
        expected += reach
        seconds += per_token
    return [sum(reach > threshold for reach in row) for row in reaches]


def speed_up(
    rounds: float, rows: float, committed: float, proposed: float, propose_seconds: float, fixed: float, per_token: float
) -> float:
    """Tokens per second of some rounds over those of plain decoding, as far as the target's process can tell.

    rounds: target forwards, over ``rows`` > 0 rows in all, which gave ``committed`` tokens. proposed: tokens to verify.
    propose_seconds: time that proposing took. fixed, per_token: as for `chain_lengths`. What the draft takes from a target
    that shares its machine is in ``fixed`` either way, and not seen.
    """
    plain = fixed * rounds + per_token * rows
    return committed / rows * plain / (plain + per_token * proposed + propose_seconds)
