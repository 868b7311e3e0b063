"""Whether the draft model is of any use here: one with other weights, or with broken ones, drafts as fast as any other."""

import logging

from vllm_double.target.stats import Counters

__all__ = ["DraftHealth"]

_logger = logging.getLogger(__name__)

_JUDGED_TOKENS = 512  # committed ones of which the draft's candidates are known
_LEAST_RIGHT = 0.05  # of them were its first candidate; one word said for ever comes to that
_NOT_FINITE = (
    "Logits of the draft model are not finite (vllm:double_worker_answers_not_finite): its weights or its dtype are broken. "
    "It drafts nothing there; retrieval goes on."
)
_USELESS = (
    "The draft model's first candidate was right for %d of the last %d tokens: it is of no use to this target. Its weights may "
    "be incomplete, or it may belong to another target. Retrieval goes on."
)


class DraftHealth:
    """``is_useless``: the draft's logits are not finite, or next to nothing of what it said lately was right.

    Each of the two is logged once.
    """

    def __init__(self) -> None:
        self.is_useless = False
        self._was_finite = self._was_useful = True
        self._num_examples = self._num_right = 0

    def judge(self, counters: Counters) -> None:
        """By what has been counted since it was judged last."""
        if counters.worker.get("answers_not_finite", 0.0) > 0.0:
            self.is_useless = True
            if self._was_finite:
                self._was_finite = False
                _logger.warning(_NOT_FINITE)
            return
        num_examples = counters.draft_first_examples - self._num_examples
        num_right = counters.draft_first_accepted - self._num_right
        if num_examples < _JUDGED_TOKENS:
            return
        self._num_examples, self._num_right = counters.draft_first_examples, counters.draft_first_accepted
        self.is_useless = num_right < _LEAST_RIGHT * num_examples
        if self.is_useless and self._was_useful:
            self._was_useful = False
            _logger.warning(_USELESS, num_right, num_examples)
