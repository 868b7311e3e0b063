"""Sampling with drafted chains gives the target's own distribution, and the text that it gives without them.

The joint distribution of a row's first three tokens, drawn with shared noise as a worker with method double draws them, is
compared with exact enumeration. A seed gives one p-value for each of `NUM_CASES` cases. What is asserted:

* per seed, that the whole family is plausible: Bonferroni, `NUM_CASES * min(p) >= 1e-3`, which a right
  sampler passes with probability 0.999 or more, whatever the dependence between the cases;
* over all seeds and cases, whose random streams are disjoint, that Fisher's combination is at least 1e-3, so
  that a bias too small for one case does not pass because it is small everywhere.

That the test can fail is shown with faults: each is rejected at p < 1e-9 for every seed, on as many samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from double_kernels.sample_with_noise import sample_with_noise, sample_with_noise_reference
from scipy import stats

from tests.parity.distribution import (
    Case,
    SamplingRule,
    TokenModel,
    cut,
    exact_joint,
    fixed,
    p_value,
    padded,
    sample_joint,
    sample_texts,
)
from tests.parity.families import OURS, SAMPLES, assert_plausible, p_values
from tests.parity.ratio_test import RatioTest
from tests.parity.v1_steps import SharedNoise

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("cpu_sampler")

SEEDS = range(3)
FAULT_SEEDS = range(1)
NUM_CASES = sum(map(len, OURS))


@pytest.fixture(scope="module", autouse=True)
def search() -> Iterator[Any]:
    """The draw as a worker has it. Tests have its reference, which is quicker for so few tokens and many rows."""
    from vllm_double.integration import v1_sampling

    with patch.object(v1_sampling, "sample_with_noise", sample_with_noise_reference):
        yield sample_with_noise


@cache
def our_p_values(seed: int) -> dict[str, float]:
    return p_values(seed, OURS, SharedNoise(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_distribution_of_three_tokens_is_the_exact_one(seed: int) -> None:
    assert len(our_p_values(seed)) == NUM_CASES
    assert_plausible(our_p_values(seed))


def test_no_small_bias_is_spread_over_cases_and_seeds() -> None:
    everything = [value for seed in SEEDS for value in our_p_values(seed).values()]
    assert stats.combine_pvalues(everything, method="fisher").pvalue >= 1e-3


def test_greedy_rows_beside_sampled_ones_are_the_argmax() -> None:
    model = TokenModel.random(0)
    greedy = SamplingRule(temperature=0)
    cases = (
        Case("greedy-chain4", greedy, fixed(4)),
        Case("T1.5-cut", SamplingRule(temperature=1.5), cut),
        Case("greedy-padded", greedy, padded),
        Case("greedy-cut", greedy, cut),
    )
    counts = sample_joint(model, cases, 20_000, SharedNoise(0))
    for case, count in zip(cases, counts, strict=True):
        exact = exact_joint(model, case.rule)
        if case.rule is greedy:
            assert np.array_equal(count, exact * 20_000), case.name
        else:
            assert p_value(count, exact) >= 1e-3


@pytest.mark.parametrize("family", OURS, ids=[family[0].name for family in OURS])
def test_a_text_is_that_without_chains_and_in_another_batch(family: Sequence[Case]) -> None:
    model, samples = TokenModel.random(7), 3_000
    without = [replace(case, lengths=fixed(0)) for case in family]
    _, texts = sample_texts(model, family, samples, SharedNoise(7))
    for cases, batch in ((without, 4096), (without, 100), (family, 100)):
        _, others = sample_texts(model, cases, samples, SharedNoise(7), batch)
        assert np.array_equal(texts, others)


def test_a_workers_search_draws_the_same_texts(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TokenModel.random(7)
    _, texts = sample_texts(model, OURS[0], 1_000, SharedNoise(7))
    monkeypatch.setattr("vllm_double.integration.v1_sampling.sample_with_noise", search)
    assert np.array_equal(texts, sample_texts(model, OURS[0], 1_000, SharedNoise(7))[1])


def test_other_seeds_give_other_texts() -> None:
    model = TokenModel.random(7)
    one, other = (sample_texts(model, OURS[0], 100, SharedNoise(seed))[1] for seed in (7, 8))
    assert (one != other).any(axis=1).mean() > 0.5


# Faults


@contextmanager
def use_the_noise_of_the_position_before() -> Iterator[None]:
    """Behind a draft token the noise is that of the position before."""
    from vllm_double.integration.v1_sampling import _Expansion

    original = _Expansion.positions

    def late(self: Any, last_positions: Any) -> Any:
        return original(self, last_positions) - (self.depths > 0)

    with patch.object(_Expansion, "positions", late):
        yield


@contextmanager
def let_the_draft_choose_between_the_best_two() -> Iterator[None]:
    """A draft token is accepted if it is one of the two best, as the draft ranks it first."""
    from vllm_double.integration import v1_sampling

    draw, forward = v1_sampling.sample_with_noise, v1_sampling.ChainVerifier.forward
    verified: list[Any] = []

    def verify(self: Any, metadata: Any, *others: Any) -> Any:
        verified.append(metadata)
        try:
            return forward(self, metadata, *others)
        finally:
            verified.clear()

    def choose(logits: Any, *noise: Any) -> Any:
        drawn = draw(logits, *noise)
        if verified:
            second = draw(logits.scatter(1, drawn[:, None], -torch.inf), *noise)
            rows = verified[0].target_logits_indices.long()
            drafts = verified[0].draft_token_ids.long()
            drawn[rows] = torch.where(second[rows] == drafts, drafts, drawn[rows])
        return drawn

    with patch.object(v1_sampling, "sample_with_noise", choose), patch.object(v1_sampling.ChainVerifier, "forward", verify):
        yield


@contextmanager
def draw_before_filters() -> Iterator[None]:
    """The noise decides among all tokens; for one that top_p leaves out the most probable one is taken."""
    from vllm_double.integration import v1_sampling

    draw, leave = v1_sampling.sample_with_noise, v1_sampling.apply_top_k_top_p
    kept: list[Any] = []

    def remember(logits: Any, k: Any, p: Any) -> Any:
        kept[:] = [leave(logits.clone(), k, p)]
        return logits

    def take(logits: Any, *noise: Any) -> Any:
        drawn = draw(logits, *noise)
        is_kept = kept[0].gather(1, drawn[:, None]).squeeze(1) > -torch.inf
        return torch.where(is_kept, drawn, kept[0].argmax(dim=1))

    with patch.object(v1_sampling, "apply_top_k_top_p", remember), patch.object(v1_sampling, "sample_with_noise", take):
        yield


@contextmanager
def heat_rows_behind_drafts() -> Iterator[None]:
    """Rows of a verification are sampled at a temperature that is a fifth too high."""
    from vllm_double.integration.v1_sampling import _Expansion

    original = _Expansion.expand

    def hotter(self: Any, *arguments: Any) -> Any:
        sampling = original(self, *arguments)
        return replace(sampling, temperature=sampling.temperature * 1.2)

    with patch.object(_Expansion, "expand", hotter):
        yield


FAULTS: tuple[tuple[Callable[[], AbstractContextManager[None]], Case], ...] = (
    (use_the_noise_of_the_position_before, Case("T1-chain4", SamplingRule(), fixed(4))),
    (let_the_draft_choose_between_the_best_two, Case("T1-chain4", SamplingRule(), fixed(4))),
    (draw_before_filters, Case("T1.5-top_p-cut", SamplingRule(temperature=1.5, top_p=0.6), cut)),
    (heat_rows_behind_drafts, Case("T0.5-chain4", SamplingRule(temperature=0.5), fixed(4))),
)


@pytest.mark.parametrize("seed", FAULT_SEEDS)
@pytest.mark.parametrize(("fault", "case"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_the_comparison_finds_a_fault(fault: Callable[[], AbstractContextManager[None]], case: Case, seed: int) -> None:
    model = TokenModel.random(seed)
    with fault():
        (count,) = sample_joint(model, (case,), SAMPLES, SharedNoise(seed))
    assert p_value(count, exact_joint(model, case.rule)) < 1e-9


@pytest.mark.parametrize("seed", FAULT_SEEDS)
def test_the_comparison_finds_noise_that_is_shared_with_a_ratio_test(seed: int) -> None:
    model, case = TokenModel.random(seed), Case("T1", SamplingRule(), fixed(1))
    (count,) = sample_joint(model, (case,), SAMPLES, RatioTest(seed))
    assert p_value(count, exact_joint(model, case.rule)) < 1e-9
    (count,) = sample_joint(model, (case,), SAMPLES, RatioTest(seed, is_shared=False))
    assert p_value(count, exact_joint(model, case.rule)) >= 1e-4
