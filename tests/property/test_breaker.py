"""The circuit breaker against a slow obvious twin."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_double.operations.circuit_breaker import CircuitBreaker

FIRST_S, MOST_S = 1.0, 8.0
Event = tuple[float, str]


def pauses(failures: list[float]) -> list[float]:
    """How long each failure opens: the first for FIRST_S, a later one for twice as long as the one before, up to MOST_S, unless
    MOST_S have passed since it was open."""
    found: list[float] = []
    for number, at in enumerate(failures):
        is_alone = number == 0 or at - (failures[number - 1] + found[-1]) >= MOST_S
        found.append(FIRST_S if is_alone else min(2 * found[-1], MOST_S))
    return found


def state(history: list[Event], now: float) -> str:
    failures = [at for at, what in history if what == "failed"]
    if not failures:
        return "closed"
    open_until = failures[-1] + pauses(failures)[-1]
    if now < open_until:
        return "open"
    return "closed" if any(what == "succeeded" and at >= open_until for at, what in history) else "half-open"


@given(st.lists(st.tuples(st.integers(0, 40).map(lambda quarters: quarters / 4), st.sampled_from(["failed", "succeeded"]))))
def test_the_breaker_is_in_the_state_of_its_twin(events: list[Event]) -> None:
    now = 0.0
    breaker = CircuitBreaker(lambda: now, FIRST_S, MOST_S)
    history: list[Event] = []
    for wait_s, what in events:
        now += wait_s
        before = state(history, now)
        assert breaker.state == before
        assert (breaker.paused_s > 0) == (before == "open") and breaker.paused_s <= MOST_S
        history.append((now, what))
        if what == "succeeded":
            assert breaker.succeeded() == (before == "half-open")
        else:
            failures = [at for at, kind in history if kind == "failed"]
            assert breaker.failed("why") == breaker.paused_s == pauses(failures)[-1]
        assert breaker.state == state(history, now)


@given(st.integers(1, 12))
def test_a_failure_at_each_trial_lengthens_the_pause_up_to_a_bound(trials: int) -> None:
    now = 0.0
    breaker = CircuitBreaker(lambda: now, FIRST_S, MOST_S)
    for trial in range(trials):
        pause_s = breaker.failed("why")
        assert pause_s == min(FIRST_S * 2**trial, MOST_S)
        now += pause_s
        assert breaker.state == "half-open"
    assert breaker.succeeded() and breaker.state == "closed"
    now += MOST_S
    assert breaker.failed("why") == FIRST_S
