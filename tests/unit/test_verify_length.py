import itertools
import random

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_double.target import _choose_steps as choosing
from vllm_double.target import _round_steps as steps
from vllm_double.target._trie_steps import learn
from vllm_double.target.calibration import NUM_BUCKETS, Calibration
from vllm_double.target.speculation_trie import CHAIN_TOKEN, Tries
from vllm_double.target.step_cost import StepCost
from vllm_double.target.verify_length import least_threshold, speed_up


def chain_lengths(accept_probs: list[list[float]], fixed: float, per_token: float) -> list[int]:
    """As the compiled choice does it."""
    paths = np.zeros((len(accept_probs), 8), CHAIN_TOKEN)
    for path, row in zip(paths, accept_probs, strict=True):
        path["accept_prob"][: len(row)] = row
    lengths = np.array([len(row) for row in accept_probs], np.int32)
    threshold = choosing.pay_threshold(paths, lengths, len(accept_probs), fixed, per_token)
    assert threshold >= least_threshold(len(accept_probs), fixed, per_token) * (1 - 1e-12)
    return [sum(prob > threshold for prob in row) for row in accept_probs]


def observe(calibration: Calibration, source: str, belief: float, temperature: int, is_right: bool) -> None:
    learn(calibration.tables, calibration.sources.index(source), temperature, belief, is_right)


def rate(reaches: list[list[float]], lengths: tuple[int, ...], fixed: float, per_token: float) -> float:
    tokens = len(reaches) + sum(sum(row[:n]) for row, n in zip(reaches, lengths, strict=True))
    return tokens / (fixed + per_token * (len(reaches) + sum(lengths)))


@pytest.mark.parametrize("seed", range(40))
def test_chain_lengths_give_the_most_tokens_per_second_of_all_lengths(seed: int) -> None:
    rng = random.Random(seed)
    reaches = []
    for _ in range(rng.randint(1, 3)):
        reach, row = 1.0, []
        for _ in range(rng.randint(0, 5)):
            reach *= rng.uniform(0.3, 0.98)
            row.append(reach)
        reaches.append(row)
    fixed, per_token = 1.0, rng.choice([0.01, 0.1, 0.4])
    chosen = tuple(chain_lengths(reaches, fixed, per_token))
    best = max(
        rate(reaches, lengths, fixed, per_token) for lengths in itertools.product(*(range(len(row) + 1) for row in reaches))
    )
    assert rate(reaches, chosen, fixed, per_token) == pytest.approx(best)


def test_free_tokens_are_all_taken_and_tokens_as_dear_as_a_step_are_not() -> None:
    assert chain_lengths([[0.5, 0.1]], 1.0, 0.0) == [2]
    assert chain_lengths([[0.5, 0.1]], 0.0, 1.0) == [0]
    assert chain_lengths([], 1.0, 0.1) == []


def test_step_cost_learns_a_line_and_shrugs_off_an_outlier() -> None:
    cost = StepCost()
    rng = random.Random(0)
    for _ in range(300):
        tokens = rng.randint(1, 40)
        cost.observe(tokens, 0.03 + 0.001 * tokens + rng.uniform(-0.0005, 0.0005))
    cost.observe(5, 9.0)
    fixed, per_token = cost.estimate()
    assert fixed == pytest.approx(0.03, rel=0.15)
    assert per_token == pytest.approx(0.001, rel=0.2)


def test_step_cost_of_steps_of_one_size_stays_sane() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.observe(1, 0.01)
    fixed, per_token = cost.estimate()
    assert 0 < per_token < fixed


def test_calibration_learns_how_often_the_target_agrees_and_keeps_sources_apart() -> None:
    calibration = Calibration(["context"])
    rng = random.Random(1)
    greedy, sampled = calibration.curve("draft", 0), calibration.curve("draft", 3)
    bucket = int(0.42 * NUM_BUCKETS)
    assert greedy[bucket] == pytest.approx(0.425)
    for _ in range(3000):
        observe(calibration, "draft", 0.42, 0, rng.random() < 0.8)
        observe(calibration, "draft", 0.42, 3, rng.random() < 0.3)
    assert greedy[bucket] == pytest.approx(0.8, abs=0.04)
    assert sampled[bucket] == pytest.approx(0.3, abs=0.04)
    assert calibration.curve("context", 0)[bucket] == pytest.approx(0.425)
    assert [row[:3] for row in calibration.table()] == [("draft", 0, 0.4), ("draft", 3, 0.4)]


def test_calibration_takes_certainty_without_falling_off_the_table() -> None:
    calibration = Calibration()
    observe(calibration, "draft", 1.0, 0, True)
    assert 0.9 < calibration.curve("draft", 0)[int(1.0 * NUM_BUCKETS)] < 1


@pytest.mark.parametrize("seed", range(5))
def test_the_speed_up_is_that_of_the_two_clocks(seed: int) -> None:
    """Steps are added up one by one, with drafts and then without for the same tokens."""
    rng = random.Random(seed)
    fixed, per_token, batch, steps = 0.03, rng.uniform(0.0001, 0.01), rng.randint(1, 8), 50
    rows = committed = proposed = 0
    drafted_seconds = propose_seconds = 0.0
    for _ in range(steps):
        lengths = [rng.randint(0, 6) for _ in range(batch)]
        seconds = rng.uniform(0, 0.005)
        drafted_seconds += fixed + per_token * (batch + sum(lengths)) + seconds
        propose_seconds += seconds
        rows, proposed = rows + batch, proposed + sum(lengths)
        committed += sum(1 + rng.randint(0, length) for length in lengths)
    plain_seconds = committed / batch * (fixed + per_token * batch)
    found = speed_up(steps, rows, committed, proposed, propose_seconds, fixed, per_token)
    assert found == pytest.approx(plain_seconds / drafted_seconds)


@numba.njit
def observe_use(requests, limits, num_committed, num_accepted):  # type: ignore[no-untyped-def]
    return steps.observe_use(requests[0], limits[0], num_committed, num_accepted)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=400))
def test_the_draft_pauses_twice_as_long_each_time_until_it_is_of_use(rounds: list[tuple[int, int]]) -> None:
    """Against a slow twin that looks at all rounds since the last judgement."""
    tries = Tries.empty(1, 1, 1, 1)
    request, limits = tries.requests, tries.limits
    request["next_pause"] = 256
    trial: list[tuple[int, int]] = []
    rest, failed = 0, 0
    for committed, brought in ((n, min(b, n) if b < 3 else 0) for n, b in rounds):
        begins = False
        if rest > 0:
            rest = max(0, rest - committed)
        else:
            trial.append((committed, brought))
            total = sum(n for n, _ in trial)
            if total >= 64:
                begins = sum(b for _, b in trial) / total < 0.02
                failed = failed + 1 if begins else 0
                rest = min(1024, 128 * 2**failed) if begins else 0
                trial = []
        assert observe_use(request, limits, committed, brought) == begins
        assert (request["pause"][0] > 0) == (rest > 0)
