"""The speed-up of each method for one deployment: this loop simulated, the published methods as `published` plays them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_double.planning.published import best, double, fan_outs, pearl, saguaro, speculative
from vllm_double.planning.script import Script, Tables, Times, texts
from vllm_double.planning.world import Outcome, simulate

__all__ = ["METHODS", "Deployment", "Prediction", "predict"]

METHODS = ("speculative", "PEARL", "Saguaro", "Double", "ours")
"""Plain speculative decoding, the published parallel methods, and this loop."""

_LONGEST_DRAFT = 64
_NUM_OUTCOMES = (8, 16, 32)  # that Saguaro prepares
_DRAFT_SECONDS = 1e-3  # only ratios matter
_LEARNT_TOKENS = 400  # by ours, before: the settings of the published methods are the best ones for the very text
_MARGIN = 256  # tokens of a text behind the last one that is asked for


@dataclass(frozen=True, slots=True)
class Deployment:
    """The measured numbers of a deployment.

    cost_ratio: C, the target's step at batch 1 over a draft forward, measured while both run.
    token_cost: share of a target step that each further token adds. draft_token_cost: the same of the draft.
    gap: time that a proposer adds between two target forwards, in draft forwards.
    """

    cost_ratio: float
    batch: int
    token_cost: float
    draft_token_cost: float
    gap: float

    @property
    def times(self) -> Times:
        target, draft = self.cost_ratio * _DRAFT_SECONDS, _DRAFT_SECONDS
        return Times(target, draft, self.token_cost * target, self.draft_token_cost * draft, self.gap * draft)


@dataclass(frozen=True, slots=True)
class Prediction:
    """``speedups`` over decoding without drafts, by method; ``draft_length``: the best one of plain speculative decoding."""

    deployment: Deployment
    speedups: dict[str, float]
    draft_length: int
    ours: Outcome


def predict(script: Script, deployment: Deployment, num_tokens: int, num_speculative_tokens: int = 16) -> Prediction:
    """Decode ``num_tokens`` tokens for each request of the batch by every method, over the same texts."""
    times, batch = deployment.times, deployment.batch
    scripted = texts(Tables(script), batch, num_tokens + _MARGIN)
    is_sampled = script.temperature > 0
    # The published methods plan with the acceptance of sampled drafts.
    acceptance = float(np.mean([text.accepted[1:] for text in scripted])) if is_sampled else script.acceptance
    lengths = range(1, num_speculative_tokens + 1)
    # As many forwards as the draft makes beside a target step.
    beside = range(1, 1 + max(1, min(_LONGEST_DRAFT, int(times.step(batch) / times.draft_forward(batch)))))
    fans = [fan_outs(acceptance, script.tail, length, number) for length in lengths for number in _NUM_OUTCOMES]
    draft_length, plain = best(lengths, lambda length: speculative(scripted, times, num_tokens, length))
    plays = {
        "speculative": plain,
        "PEARL": best(beside, lambda length: pearl(scripted, times, num_tokens, length))[1],
        "Saguaro": best(fans, lambda fan_out: saguaro(scripted, times, num_tokens, fan_out))[1],
    }
    plays["Double"] = plays["PEARL"]  # which it is without retrieval
    if script.copied > 0:
        plays["Double"] = best(beside, lambda forwards: double(scripted, times, num_tokens, forwards))[1]
    ours = simulate(
        script, times, num_tokens=num_tokens, batch=batch, num_speculative_tokens=num_speculative_tokens,
        num_learnt_tokens=_LEARNT_TOKENS,
    )  # fmt: skip
    speedups = {name: play.speedup(times, batch, num_tokens) for name, play in plays.items()}
    return Prediction(deployment, speedups | {"ours": ours.speedup}, draft_length, ours)
