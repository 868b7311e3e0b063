"""Whether the draft model is of use to a request."""

__all__ = ["DraftUse"]

_TRIAL_TOKENS = 64  # by which the draft is judged
_LEAST_SHARE = 0.02  # of the committed tokens that the draft has to bring
_FIRST_REST, _LONGEST_REST = 256, 1024  # tokens; each rest is twice as long as the one before, while trials fail


class DraftUse:
    """Whether the draft model is of use to one request. Where retrieval brings all that is accepted, the draft only takes
    memory bandwidth from a target beside it, and time from other requests: it rests, and is tried again.
    """

    __slots__ = ("_brought", "_committed", "_next_rest", "_rest")

    def __init__(self) -> None:
        self._committed = self._brought = 0
        self._rest, self._next_rest = 0, _FIRST_REST

    @property
    def is_resting(self) -> bool:
        return self._rest > 0

    def observe(self, committed: int, brought: int) -> bool:
        """So many tokens were committed, ``brought`` of them by the draft; True where it rests from now on."""
        if self._rest > 0:
            self._rest -= min(committed, self._rest)
            return False
        self._committed += committed
        self._brought += brought
        if self._committed < _TRIAL_TOKENS:
            return False
        is_of_use = self._brought >= _LEAST_SHARE * self._committed
        self._committed = self._brought = 0
        if is_of_use:
            self._next_rest = _FIRST_REST
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        return not is_of_use
