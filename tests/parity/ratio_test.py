"""What shared noise must not be combined with: a wrong way to verify, which the tests of losslessness have to find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from double_kernels import gumbel_noise

from tests.parity.distribution import PROMPT, VOCAB, Case, Rows, TokenModel

__all__ = ["RatioTest"]


class RatioTest:
    """The draft's token is accepted by the ratio of probabilities, and otherwise the residual is sampled. See Stepper.

    is_shared: the draft's token and that of the residual are drawn with the same noise, which biases the text; False: each with
    noise of its own, which is the usual rejection sampling. For one temperature, without filters.
    """

    def __init__(self, seed: int, is_shared: bool = True) -> None:
        self._random = np.random.default_rng(seed)
        self._is_shared = is_shared

    def start(self, cases: Sequence[Case], rows: Rows) -> None:
        """See Stepper."""
        self._seeds = self._random.integers(-(1 << 63), 1 << 63, (2, len(rows.case)))

    def step(self, model: TokenModel, cases: Sequence[Case], rows: Rows) -> None:
        """See Stepper. One token per row and step."""
        (temperature,) = {case.rule.temperature for case in cases}
        before, latest = rows.last_two().T
        target_probs = _softmax(model.logits[before, latest] / temperature)
        draft_probs = _softmax(model.draft_logits[before, latest] / temperature)
        positions = (len(PROMPT) - 1 + rows.lengths)[:, None]
        noise, other_noise = (gumbel_noise(seeds[rows.place, None], positions, np.arange(VOCAB)) for seeds in self._seeds)
        drafts = (np.log(draft_probs) + noise).argmax(axis=1)
        row = np.arange(len(drafts))
        is_accepted = self._random.random(len(drafts)) * draft_probs[row, drafts] < target_probs[row, drafts]
        residual = np.maximum(target_probs - draft_probs, 1e-30)
        recovered = (np.log(residual) + (noise if self._is_shared else other_noise)).argmax(axis=1)
        rows.extend(np.where(is_accepted, drafts, recovered)[:, None])


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(axis=1, keepdims=True)
