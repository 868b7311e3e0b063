"""What stands between a target's step and the proposer: a switch, and a circuit breaker.

The breaker opens after an exception of ours, and where drafting has cost more than it gave. All ways of being off are the
same: the state of all requests is dropped, on both sides, nothing is indexed, inserted or sent, and requests go on in plain
decoding. When it ends, each request is admitted again with its text as it then is, so that nothing has to be right about the
state that an exception leaves behind.

If a round fails again, a request of it may be what fails: the round's requests are suspects, and half of them at a time get
drafts again, until the one is found without which rounds succeed. It goes on without drafts.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vllm_double.operations.circuit_breaker import CircuitBreaker
from vllm_double.target.batch import Batch, Row
from vllm_double.target.calibration import Calibration
from vllm_double.target.draft_health import DraftHealth
from vllm_double.target.indexer import Turnstile
from vllm_double.target.lookups import Lookups
from vllm_double.target.proposer import Proposer
from vllm_double.target.request_table import RequestParams
from vllm_double.target.stats import Counters
from vllm_double.target.step_cost import StepCost
from vllm_double.target.verify_length import speed_up

__all__ = ["GuardedProposer"]

_logger = logging.getLogger(__name__)

_WAKE_TOKENS_PER_ROUND = 65536
_INDEX_TOKENS = 64  # for each source, in a slice
_JUDGED_ROUNDS = 256  # what they gave and cost decides whether drafting goes on
_LEAST_SPEED_UP = 0.99


class GuardedProposer:
    """A proposer that can be switched off, and whose exceptions end nobody's request: no method raises.

    All methods but `switch` and `index` belong to the thread of the target's steps. ``turnstile``: who else comes near the
    proposer.
    """

    def __init__(self, proposer: Proposer, breaker: CircuitBreaker, nap: Callable[[], None] = lambda: None) -> None:
        """nap: see Proposer.propose."""
        self.enabled = True
        self._nap = nap
        self.turnstile = Turnstile()
        self.breaker = breaker
        self.draft_health = DraftHealth()
        self._proposer = proposer
        self._is_drafting = True
        self._live: dict[str, RequestParams] = {}
        self._suspects: list[str] = []  # one of them may be why rounds fail
        self._tried: set[str] = set()  # those of them that get drafts
        self._waking = ""  # the request that is being admitted
        self._is_in_round = False
        # Who has come, with a text, and who has gone, without one: the proposer is told while the forward runs.
        self._changes: deque[tuple[str, npt.NDArray[np.int32] | None]] = deque()
        self._judged = self._totals()

    @property
    def counters(self) -> Counters:
        return self._proposer.counters

    @property
    def lookups(self) -> Lookups:
        return self._proposer.lookups

    @property
    def step_cost(self) -> StepCost:
        return self._proposer.step_cost

    @property
    def calibration(self) -> Calibration:
        return self._proposer.calibration

    def switch(self, enabled: bool, who: str, why: str) -> None:
        """Turn drafting off or on, from the next round on; from any thread."""
        if enabled != self.enabled:
            self.enabled = enabled
            _logger.warning("Drafting was switched %s by %s%s.", "on" if enabled else "off", who, f": {why}" if why else "")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """An exception inside ends here, and drafting pauses. For what is done for the proposer's sake."""
        with self.turnstile:
            try:
                yield
            except Exception:
                self._fail()

    def _fail(self) -> None:
        self.counters.failures += 1
        live, failed = self._live.copy(), self._suspects
        if self._waking in live:
            failed = [self._waking]
        elif self._is_in_round:
            awake = [name for name, params in live.items() if params.use_drafts and self._proposer.knows(name)]
            failed = [name for name in awake if name in self._tried] or awake
        was_trial = bool(self._suspects) and failed is not self._suspects
        if was_trial and len(failed) == 1:
            _logger.exception("A request goes on without drafts")
            self._live[failed[0]] = replace(live[failed[0]], use_drafts=False)
            failed = []
        elif was_trial:
            _logger.exception("Some requests go on without drafts, until it is found which of them are the reason")
        else:
            pause_s = self.breaker.failed("after an exception")
            _logger.exception("Requests go on without drafts; these are tried again in %.0f s", pause_s)
        self._waking, self._is_in_round = "", False
        self._suspect(failed)
        self._stop()

    def _suspect(self, names: list[str]) -> None:
        """These, of which one half is to be tried."""
        self._suspects = names
        self._tried = set(names[: (len(names) + 1) // 2])

    def _clear(self, batch: Batch) -> None:
        """The round was right."""
        if self._suspects:
            right = {name for name in batch.request_ids if self._proposer.knows(name)}
            self._suspect([name for name in self._suspects if name in self._live and name not in right])

    def index(self) -> bool:
        """Take in one request that has come or gone, or index a slice of what waits; whether more may wait.

        For an `Indexer`, which has the turnstile's lock.
        """
        try:
            if self._changes:
                self._take_in(*self._changes.popleft())
                return True
            return self._is_drafting and self._proposer.index(_INDEX_TOKENS)
        except Exception:
            self._fail()
            return False

    # ---- the proposer's methods -------------------------------------------------------------------------------

    def admit(self, request_id: str, tokens: npt.NDArray[np.int32], params: RequestParams) -> None:
        """See Proposer.admit. Costs next to nothing: the request is taken in by `index`, at the latest by its next round."""
        self._live[request_id] = params
        self._change(request_id, tokens)

    def finish(self, request_id: str) -> None:
        """See Proposer.finish; as `admit`."""
        self._live.pop(request_id, None)
        self._change(request_id, None)

    def forget_history(self) -> None:
        """See Proposer.forget_history."""
        with self.guard():
            self._proposer.forget_history()

    def forget_step_cost(self) -> None:
        """See Proposer.forget_step_cost."""
        self._proposer.forget_step_cost()

    def reset_prefix_cache(self) -> None:
        """See Proposer.reset_prefix_cache."""
        self._proposer.reset_prefix_cache()

    def propose(self, rows: Batch | Sequence[Row]) -> list[list[int]]:
        """See Proposer.propose; all chains are empty while there is no drafting."""
        batch = rows if isinstance(rows, Batch) else Batch.of(rows)
        chains = None
        with self.guard():
            if self._goes_on():
                self._wake_all(batch)
                self._is_in_round = True
                chains = self._proposer.propose(batch, self._nap)
                self._is_in_round = False
                self._clear(batch)
                if self.breaker.succeeded():
                    _logger.info("Drafting is tried again, having paused %s.", self.breaker.why)
                self._judge()
        return [[] for _ in batch.request_ids] if chains is None else chains

    def check_integrity(self) -> None:
        """Assert that the proposer is sound, and that nothing is alive in it while there is no drafting."""
        self._proposer.check_integrity()
        assert self._is_drafting or self._proposer.num_requests == 0

    # ---- off and on -------------------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        """Whether this round drafts."""
        is_closed = self.breaker.state != "open"
        if self.enabled and is_closed:
            self._is_drafting = True
        elif self._is_drafting:
            self._stop()
        elif is_closed:
            self._proposer.pause()
        return self._is_drafting

    def _stop(self) -> None:
        self._is_drafting = False
        self._changes.clear()
        self._proposer.reset()

    def _judge(self) -> None:
        """Open the breaker where the last rounds would have been faster without drafts. Say if the draft is of no use."""
        if self.counters.rounds - self._judged[0] < _JUDGED_ROUNDS:
            return
        self.draft_health.judge(self.counters)
        totals = self._totals()
        rounds, rows, committed, proposed, seconds = (now - before for now, before in zip(totals, self._judged, strict=True))
        self._judged = totals
        if rows and speed_up(rounds, rows, committed, proposed, seconds, *self.step_cost.estimate()) < _LEAST_SPEED_UP:
            self.counters.losses += 1
            pause_s = self.breaker.failed("because drafts cost more than they gave")
            _logger.info("Drafts cost more than they give here; they are tried again in %.0f s", pause_s)

    def _totals(self) -> tuple[int, int, int, int, float]:
        counters = self.counters
        return counters.rounds, counters.rows, counters.committed_tokens, counters.proposed_tokens, counters.propose_seconds

    # ---- who has come and gone --------------------------------------------------------------------------------

    def _change(self, request_id: str, tokens: npt.NDArray[np.int32] | None) -> None:
        if self._is_drafting:
            with self.turnstile:
                self._changes.append((request_id, tokens))

    def _take_in(self, request_id: str, tokens: npt.NDArray[np.int32] | None) -> None:
        if tokens is None:
            self._proposer.finish(request_id)
        elif request_id in self._live:
            self._wake(request_id, tokens)

    def _wake_all(self, batch: Batch) -> None:
        """Have the proposer know all requests: what it does not know begins with what its text was before this step."""
        while self._changes:
            self._take_in(*self._changes.popleft())
        if self._proposer.num_requests == len(self._live):
            return
        budget = _WAKE_TOKENS_PER_ROUND
        for row, request_id in enumerate(batch.request_ids):
            if budget > 0 and request_id in self._live and not self._proposer.knows(request_id):
                text = batch.text(row)
                budget -= len(text)
                self._wake(request_id, text[: len(text) - batch.rows.num_sampled[row]])

    def _wake(self, request_id: str, tokens: npt.NDArray[np.int32]) -> None:
        if request_id in self._suspects and request_id not in self._tried:
            return
        self._waking = request_id
        self._proposer.admit(request_id, tokens, self._live[request_id])
        self._waking = ""
