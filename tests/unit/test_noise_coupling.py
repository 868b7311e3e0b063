"""What the draft learns of the target's draws, on draws whose chances are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_double.draft.arena import DRAW, LISTED
from vllm_double.draft.drawn import weigh
from vllm_double.draft.noise_coupling import NoiseCoupling

NUM_LISTED = 16
TOKENS = np.arange(100, 100 + NUM_LISTED, dtype=np.int32)


class Listing(NamedTuple):
    """What the draft listed behind one text."""

    tokens: np.ndarray
    log_probs: np.ndarray
    noise: np.ndarray


def chances(coupling: NoiseCoupling, temperature: float, log_probs: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """That each listed token is drawn, as the draft works it out."""
    draws, listed = np.zeros(1, DRAW), np.zeros(len(noise), LISTED)
    draws[0] = 0, *coupling.weights(temperature)
    listed["log_q"], listed["noise"] = log_probs, noise
    weigh(draws, 0, listed)
    return listed["prob"]


def coverage(coupling: NoiseCoupling, bucket: int) -> float:
    """How often the drawn token is listed."""
    return float(coupling._listed[bucket] / coupling._tried[bucket])


def listing(rng: np.random.Generator, spread: float = 1.5) -> Listing:
    logits = rng.normal(scale=spread, size=NUM_LISTED)
    log_probs = logits - np.log(np.exp(logits).sum())
    return Listing(TOKENS, log_probs.astype(np.float32), rng.gumbel(size=NUM_LISTED).astype(np.float32))


def learnt(weights: tuple[float, float], num_draws: int, temperature: float = 1.0) -> NoiseCoupling:
    """From draws by a conditional logit of these weights."""
    rng, coupling = np.random.default_rng(0), NoiseCoupling()
    for _ in range(num_draws):
        one = listing(rng)
        scores = weights[0] * one.log_probs + weights[1] * one.noise + rng.gumbel(size=NUM_LISTED)
        coupling.learn(temperature, *one, int(TOKENS[scores.argmax()]))
    return coupling


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 2.0), (2.0, 5.0)], ids=str)
def test_known_weights_are_found_again(weights: tuple[float, float]) -> None:
    coupling = learnt(weights, 4000)
    np.testing.assert_allclose(coupling._weights[3], weights, rtol=0.25)
    assert coupling.noise_scale(1.0) == pytest.approx(weights[1] / weights[0], rel=0.2)


def test_before_anything_is_learnt_lists_are_ranked_as_the_target_draws() -> None:
    coupling = NoiseCoupling()
    assert [coupling.noise_scale(temperature) for temperature in (0.3, 0.7, 1.0, 2.0)] == [1.0] * 4
    assert coupling.noise_scale(0.0) == 0.0


def test_temperatures_are_learnt_apart() -> None:
    coupling = learnt((4.0, 2.0), 1000, temperature=0.7)
    assert coupling.noise_scale(0.8) < 0.7
    assert [coupling.noise_scale(temperature) for temperature in (0.4, 1.0, 2.0)] == [1.0] * 3
    assert [coverage(coupling, bucket) for bucket in (1, 3)] == [1.0] * 2


@pytest.mark.parametrize("error", [0.3, 1.0, 2.0])
def test_chances_are_how_often_a_token_is_drawn(error: float) -> None:
    """The target draws the argmax of log p + G, where log p is log q and an error that the draft does not know."""
    rng, coupling = np.random.default_rng(1), NoiseCoupling()
    said, right = [], []
    for number in range(6000):
        one = listing(rng)
        drawn = int((one.log_probs + rng.normal(scale=error, size=NUM_LISTED) + one.noise).argmax())
        if number >= 2000:
            said.append(chances(coupling, 1.0, one.log_probs, one.noise))
            right.append(np.arange(NUM_LISTED) == drawn)
        coupling.learn(1.0, *one, int(TOKENS[drawn]))
    all_said, all_right = np.concatenate(said), np.concatenate(right)
    assert all_said.sum() == pytest.approx(len(said), rel=1e-3), "every draw was listed"
    for low, high in ((0.02, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1.01)):
        mine = (all_said >= low) & (all_said < high)
        if mine.sum() > 200:
            assert all_right[mine].mean() == pytest.approx(all_said[mine].mean(), abs=0.07)


def test_what_is_often_not_listed_has_smaller_chances() -> None:
    rng, coupling = np.random.default_rng(2), NoiseCoupling()
    for number in range(1000):
        one = listing(rng)
        coupling.learn(1.0, *one, 7 if number % 4 == 0 else int(TOKENS[(one.log_probs + one.noise).argmax()]))
    assert coverage(coupling, 3) == pytest.approx(0.75, abs=0.04)
    one = listing(rng)
    assert chances(coupling, 1.0, one.log_probs, one.noise).sum() == pytest.approx(coverage(coupling, 3), rel=1e-4)


def test_chances_fall_as_the_list_is_ranked() -> None:
    rng, coupling = np.random.default_rng(3), learnt((3.0, 1.5), 300)
    one = listing(rng)
    order = np.argsort(-(one.log_probs + coupling.noise_scale(1.0) * one.noise))
    assert (np.diff(chances(coupling, 1.0, one.log_probs[order], one.noise[order])) <= 0).all()


def test_a_row_of_which_nothing_is_known_has_no_chances() -> None:
    coupling = NoiseCoupling()
    unknown = np.full((2, 4), -np.inf, np.float32)
    unknown[1, 0] = -0.5
    assert chances(coupling, 1.0, unknown[0], np.ones(4, np.float32)).tolist() == [0.0] * 4
    assert chances(coupling, 1.0, unknown[1], np.ones(4, np.float32)).tolist() == [1.0, 0.0, 0.0, 0.0]
    weights = coupling._weights.copy()
    coupling.learn(1.0, TOKENS[:4], unknown[0], np.ones(4, np.float32), 100)
    assert np.array_equal(coupling._weights, weights) and coverage(coupling, 3) < 1.0


LOG_PROBS = st.sampled_from([-np.inf, 0.0, -1e-7, -20.7]) | st.floats(-90, 0, width=32)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            arrays.arrays(np.float32, 4, elements=LOG_PROBS),
            arrays.arrays(np.float32, 4, elements=st.floats(-3, 22, width=32)),
            st.integers(99, 104),
            st.floats(0.0625, 4, width=32),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_chances_are_numbers_whatever_is_learnt(examples: list[tuple[np.ndarray, np.ndarray, int, float]]) -> None:
    coupling = NoiseCoupling()
    for log_probs, noise, drawn, temperature in examples:
        coupling.learn(temperature, TOKENS[:4], log_probs, noise, drawn)
        found = chances(coupling, temperature, log_probs, noise)
        assert ((found >= 0) & (found <= 1)).all() and found.sum() <= 1 + 1e-5
        assert 0.009 < coupling.noise_scale(temperature) < 101
        assert 0 < (coupling._listed / coupling._tried).min() <= 1
