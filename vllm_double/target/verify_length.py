"""What verifying draft tokens costs and gives.

A token is verified while it pays for what it costs the target: tokens are taken in falling order of their probability to be
accepted, as long as each raises the batch's expected tokens per second. `_choose_steps.pay_threshold` finds where that ends.
"""

__all__ = ["least_threshold", "speed_up"]


def least_threshold(num_rows: int, fixed: float, per_token: float) -> float:
    """What `pay_threshold` is at least, whatever the tokens: to verify one more pays if the probability that it is accepted
    exceeds what it costs in tokens of plain decoding, and the batch never decodes slower than that."""
    return per_token * num_rows / (fixed + per_token * num_rows)


def speed_up(
    rounds: float, rows: float, committed: float, proposed: float, propose_seconds: float, fixed: float, per_token: float
) -> float:
    """Tokens per second of some rounds over those of plain decoding, as far as the target's process can tell.

    rounds: target forwards, over ``rows`` > 0 rows in all, which gave ``committed`` tokens. proposed: tokens to verify.
    propose_seconds: time that proposing took. fixed, per_token: the target's step time in seconds without and per query token.
    What the draft takes from a target that shares its machine is in ``fixed`` either way, and not seen.
    """
    plain = fixed * rounds + per_token * rows
    return committed / rows * plain / (plain + per_token * proposed + propose_seconds)
