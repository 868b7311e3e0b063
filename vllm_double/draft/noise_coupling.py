"""How likely it is that the target draws a token that the draft lists, when the draft knows the target's noise.

The target draws the argmax of ``log p + G``, the draft knows ``log q`` and ``G``. What it does not know, ``log p - log q``, is
taken for noise of its own: the chance of a token is then a conditional logit (McFadden 1974) of ``a log q + b G``. Both weights
are learnt by temperature from what was drawn: a / b ranks the list, and both together say how sure that ranking is. a = b is
right for a draft whose errors do not depend on how likely a token is; a very sure draft has a large a.
"""

import numpy as np
import numpy.typing as npt

from vllm_double.target.calibration import NUM_TEMPERATURES, temperature_bucket

__all__ = ["NoiseCoupling"]

_FIRST_WEIGHT = 2.2  # of log q and of the noise, before anything is learnt
_PRIOR = 25.0  # curvature of what is believed before anything is learnt: as much as some 20 tokens teach
_DECAY = 0.998  # by which what was learnt before counts less with each token
_BOUNDS = 0.2, 20.0
_LISTED_PRIOR = 50.0  # tokens


class NoiseCoupling:
    """Weights of log q and noise, by temperature bucket; `learn` follows them by Newton's steps on the log-likelihood."""

    def __init__(self) -> None:
        self._weights = np.full((NUM_TEMPERATURES, 2), _FIRST_WEIGHT)
        self._curvature = np.tile(_PRIOR * np.eye(2), (NUM_TEMPERATURES, 1, 1))
        self._tried = np.full(NUM_TEMPERATURES, _LISTED_PRIOR)
        self._listed = np.full(NUM_TEMPERATURES, _LISTED_PRIOR)

    def noise_scale(self, temperature: float) -> float:
        """The weight of the noise beside log q by which lists are ranked; 0 if the request is greedy."""
        if temperature == 0.0:
            return 0.0
        log_q_weight, noise_weight, _ = self.weights(temperature)
        return noise_weight / log_q_weight

    def weights(self, temperature: float) -> tuple[float, float, float]:
        """Of log q and of the noise in a token's score, and the sum of the chances of a list: how often it holds what is drawn.

        The chances are the softmax of the scores, times that sum.
        """
        bucket = temperature_bucket(temperature)
        log_q_weight, noise_weight = self._weights[bucket].tolist()
        return log_q_weight, noise_weight, float(self._listed[bucket] / self._tried[bucket])

    def learn(
        self, temperature: float, tokens: npt.NDArray[np.int32], log_probs: npt.NDArray[np.float32],
        noise: npt.NDArray[np.float32], drawn: int,
    ) -> None:  # fmt: skip
        """Take note of what the target drew where the draft had listed ``tokens`` [n], with log q and noise [n]."""
        bucket = temperature_bucket(temperature)
        places = np.flatnonzero(tokens == drawn)
        if self._tried[bucket] > 20 * _LISTED_PRIOR:
            self._tried[bucket] /= 2
            self._listed[bucket] /= 2
        self._tried[bucket] += 1
        if not len(places) or not np.isfinite(log_probs[places[0]]):
            return
        self._listed[bucket] += 1
        known = np.isfinite(log_probs)
        features = np.stack([log_probs[known], noise[known]], axis=1).astype(np.float64)
        scores = features @ self._weights[bucket]
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        mean = chances @ features
        centred = features - mean
        curvature = self._curvature[bucket]
        curvature *= _DECAY
        curvature += centred.T @ (centred * chances[:, None])
        curvature += (1 - _DECAY) * _PRIOR * np.eye(2)
        drawn_features = np.array([log_probs[places[0]], noise[places[0]]], dtype=np.float64)
        self._weights[bucket] += np.linalg.solve(curvature, drawn_features - mean)
        np.clip(self._weights[bucket], *_BOUNDS, out=self._weights[bucket])
