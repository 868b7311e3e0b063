"""Whether the draft model is of any use here: one with other weights, or with broken ones, drafts as fast as any other."""

import logging

from vllm_double.target.stats import Counters

__all__ = ["DraftHealth"]

_logger = logging.getLogger(__name__)

_JUDGED_TOKENS = 512  # committed ones of which the draft's candidates are known
_LEAST_RIGHT = 0.05  # of them were its first candidate; one word said for ever comes to that
_MOST_BROKEN = 0.05  # of the draft's answers: one that overflows for some prompt is of use to all others
_NOT_FINITE = (
    "Logits of the draft model are not finite (vllm:double_worker_answers_not_finite): its weights or its dtype are broken. "
    "It drafts nothing there; retrieval goes on."
)
_USELESS = (
    "The draft model's first candidate was right for %d of the last %d tokens: it is of no use to this target. Its weights may "
    "be incomplete, it may belong to another target, or requests may allow few tokens (grammars, biases). Retrieval goes on."
)


class DraftHealth:
    """``is_useless``: the draft's logits are not finite, or next to nothing of what it said lately was right.

    Each of the two is logged once.
    """

    def __init__(self) -> None:
        self.is_useless = False
        self._was_finite = self._was_useful = True
        self._judged = (0, 0, 0, 0)

    def judge(self, counters: Counters) -> None:
        """By what has been counted since it was judged last."""
        told = counters.worker
        totals = (
            counters.draft_first_examples, counters.draft_first_accepted, int(told.get("nodes_published", 0)),
            int(told.get("answers_not_finite", 0)),
        )  # fmt: skip
        # Those of a worker begin anew with the next one.
        grown = [total - before if total >= before else total for total, before in zip(totals, self._judged, strict=True)]
        num_examples, num_right, num_answers, num_broken = grown
        is_finite = num_broken <= _MOST_BROKEN * num_answers
        if is_finite and num_examples < _JUDGED_TOKENS:
            return
        self._judged = totals
        self.is_useless = not is_finite or num_right < _LEAST_RIGHT * num_examples
        if not is_finite and self._was_finite:
            self._was_finite = False
            _logger.warning(_NOT_FINITE)
        elif is_finite and self.is_useless and self._was_useful:
            self._was_useful = False
            _logger.warning(_USELESS, num_right, num_examples)
